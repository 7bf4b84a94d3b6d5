"""Schedules of learning rate, weight decay, momentum and temperature: pure functions of the step.

Each function here returns `f(step) -> float32 scalar`, where step counts from 0 and is a Python int
or a traced integer. Past its last step a schedule keeps its final value.

Numerics: the distance to either end of a schedule is an exact integer before it becomes a float32,
and a cosine is written as a squared sine of the distance to the *nearer* end. In float32,
`(1 + cos(pi * t)) / 2` loses its digits near the end, where a rate is small: with a final rate of
a thousandth of the peak it is wrong in the fifth digit.
"""

import math
from collections.abc import Callable

import jax
from jax import numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]

CONVENTIONS = ('dino', 'timm')


def cosine(start: float, final: float, total_steps: int) -> Schedule:
  """Half a cosine from `start` at step 0 to `final` at step `total_steps`.

  A run of `total_steps` steps never takes the last one, so it never quite reaches `final`.

  Source: DINO's weight decay (0.04 to 0.4) and teacher momentum (0.996 to 1),
  https://arxiv.org/abs/2104.14294, section 3.2 and appendix.

  Raises:
    ValueError: if a value is not finite or `total_steps` is not a positive integer.
  """
  _check_values(start=start, final=final)
  _check_steps('total_steps', total_steps, at_least=1)

  def schedule(step: jax.Array | int) -> jax.Array:
    return _cosine(start, final, _integer(step), total_steps)

  return schedule


def linear_then_constant(start: float, final: float, ramp_steps: int) -> Schedule:
  """A straight line from `start` at step 0 to `final` at step `ramp_steps`, then `final`.

  `ramp_steps` 0 is the constant `final`. DINO's teacher temperature (0.04 to 0.07) climbs by
  epochs, in stairs; ours climbs by steps.

  Raises:
    ValueError: if a value is not finite or `ramp_steps` is not an integer of at least 0.
  """
  _check_values(start=start, final=final)
  _check_steps('ramp_steps', ramp_steps, at_least=0)

  def schedule(step: jax.Array | int) -> jax.Array:
    return _line(start, final, _integer(step), ramp_steps)

  return schedule


def warmup_cosine(
  peak: float,
  final: float,
  warmup_steps: int,
  total_steps: int,
  start: float = 0.0,
  convention: str = 'dino',
) -> Schedule:
  """Linear warm-up from `start` to `peak`, then half a cosine to `final`.

  Two conventions, which differ at both ends of the warm-up:
    'dino': the line reaches `peak` at step `warmup_steps - 1`, and the cosine starts from `peak` at
      step `warmup_steps`: the peak is used twice, and the cosine takes the remaining steps.
    'timm' (MFM's): the line would reach `peak` at step `warmup_steps`, but the cosine counts from
      step 0, so that the value drops below the peak there: its first `warmup_steps` are never seen.
  Either way `final` belongs to step `total_steps`, which a run of that length never takes.

  Args:
    peak: the largest value, for instance a learning rate.
    final: the value at `total_steps` and after.
    warmup_steps: steps of the line, at least 0.
    total_steps: steps of the run, above `warmup_steps`.
    start: the value at step 0, if there is a warm-up.
    convention: 'dino' or 'timm'.

  Raises:
    ValueError: if a value is not finite, the steps are no integers in that order, or the convention
      is unknown.

  Source: DINO's `cosine_scheduler`; timm's `CosineLRScheduler` as MFM configures it
  (https://arxiv.org/abs/2206.07706).
  """
  _check_values(peak=peak, final=final, start=start)
  _check_steps('warmup_steps', warmup_steps, at_least=0)
  _check_steps('total_steps', total_steps, at_least=1)
  if warmup_steps >= total_steps:
    raise ValueError(
      f'warmup_steps is {warmup_steps} and total_steps {total_steps}: '
      'the warm-up must end before the run does'
    )
  if convention not in CONVENTIONS:
    raise ValueError(f'convention is {convention!r}, expected one of {", ".join(CONVENTIONS)}')
  if not warmup_steps:
    return cosine(peak, final, total_steps)
  line_steps = warmup_steps if convention == 'timm' else warmup_steps - 1
  skipped = 0 if convention == 'timm' else warmup_steps

  def schedule(step: jax.Array | int) -> jax.Array:
    step = _integer(step)
    after = _cosine(peak, final, step - skipped, total_steps - skipped)
    # linspace of one value is its start, so one step of DINO's warm-up is spent at `start`.
    before = _line(start, peak if line_steps else start, step, line_steps)
    return jnp.where(step < warmup_steps, before, after)

  return schedule


def _cosine(start: float, final: float, step: jax.Array, steps: int) -> jax.Array:
  """sin^2 of a quarter turn times the share: (1 - cos(pi * share)) / 2 without the cancellation."""
  done, left = _shares(step, steps)
  return _blend(
    start, final, jnp.sin(done * (math.pi / 2)) ** 2, jnp.sin(left * (math.pi / 2)) ** 2
  )


def _line(start: float, final: float, step: jax.Array, steps: int) -> jax.Array:
  if steps == 0:
    return jnp.float32(final)
  return _blend(start, final, *_shares(step, steps))


def _shares(step: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
  """The shares of the way done and left, each in [0, 1] and each from an exact integer."""
  step = jnp.clip(step, 0, steps)
  return step.astype(jnp.float32) / steps, (steps - step).astype(jnp.float32) / steps


def _blend(start: float, final: float, done: jax.Array, left: jax.Array) -> jax.Array:
  """From start to final, measured from the nearer one: exact at both, and if they are equal."""
  change = final - start
  return jnp.where(
    done < left,
    jnp.float32(start) + jnp.float32(change) * done,
    jnp.float32(final) - jnp.float32(change) * left,
  )


def _integer(step: jax.Array | int) -> jax.Array:
  step = jnp.asarray(step)
  if not jnp.issubdtype(step.dtype, jnp.integer):
    raise TypeError(f'a schedule counts whole optimiser steps, found a step of dtype {step.dtype}')
  return step


def _check_values(**values: float) -> None:
  for name, value in values.items():
    if not math.isfinite(value):
      raise ValueError(f'{name} is {value}, expected a finite number')


def _check_steps(name: str, steps: int, at_least: int) -> None:
  if isinstance(steps, bool) or not isinstance(steps, int) or steps < at_least:
    raise ValueError(f'{name} is {steps!r}, expected an integer of at least {at_least}')
