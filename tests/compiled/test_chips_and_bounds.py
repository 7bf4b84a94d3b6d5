"""Published rates, the roofline, topologies by name, and the search for a batch."""

import pytest

from folk_jax.compiled import gpus, search, topology
from folk_jax.compiled.chips import CHIPS, GIB, chip_of
from folk_jax.compiled.roofline import roofline
from folk_jax.errors import UserError


def test_rates_are_in_the_units_that_they_say():
  for chip in CHIPS.values():
    # FLOP/s and bytes/s: no chip of 2020 to 2025 is outside these, and a slip of a thousand is.
    assert 1e14 < chip.peak_flops < 3e15
    assert 5e11 < chip.hbm_bandwidth < 1e13
    assert 3e10 < chip.ici_bandwidth < 1e12
    assert 16 * GIB <= chip.hbm_bytes <= 180 * GIB
    assert chip.ici_bandwidth < chip.hbm_bandwidth
    default, high, highest = chip.passes
    assert 1 <= default <= high <= highest


def test_a_gpus_lanes_and_clock_give_its_float32_rate():
  """Two tables of different pages: the units and clocks that the compiler is told, the rates of the data sheets."""
  assert {name for name, chip in CHIPS.items() if chip.platform == 'gpu'} == set(gpus.PROPERTIES)
  for name, one in gpus.PROPERTIES.items():
    float32 = CHIPS[name].peak_flops / CHIPS[name].passes[2]
    # Data sheets have two digits, and B200's are of a lower clock than the boost.
    assert 2 * one.multiprocessors * one.lanes * one.clock * 1e9 == pytest.approx(float32, rel=0.02)
    assert chip_of(one.kind).name == name


@pytest.mark.parametrize(('name', 'units'), [('v4', 8), ('v5e', 4), ('v5p', 8)])
def test_the_clock_is_the_peak_over_the_matrix_units(name, units):
  chip = CHIPS[name]
  # Published peaks have three digits.
  assert chip.clock * units * 2 * 128 * 128 == pytest.approx(chip.peak_flops, rel=5e-3)


def test_a_v5e_pods_all_reduce_bandwidth_is_its_chips():
  # 51.2 TB/s for 256 chips, on the same page as the rate of a chip.
  assert 256 * CHIPS['v5e'].ici_bandwidth == pytest.approx(51.2e12)


def test_devices_by_the_name_that_jax_gives_them():
  assert chip_of('TPU v5 lite').name == 'v5e' and chip_of('TPU v6 lite').name == 'v6e'
  assert chip_of('TPU v4').name == 'v4' and chip_of('TPU v5').name == 'v5p'
  assert chip_of('NVIDIA H200').name == 'h200'
  assert chip_of('cpu') is None and chip_of('NVIDIA T4') is None


@pytest.mark.parametrize(
  ('matrix', 'moved', 'sent', 'by', 'seconds', 'mfu'),
  [
    (197e12, 81.9e9, 20e9, 'compute', 1.0, 0.5),
    (197e11, 2 * 819e9, 20e9, 'memory', 2.0, 0.25),
    (197e11, 81.9e9, 4 * 200e9, 'links', 4.0, 0.125),
  ],
)
def test_the_longest_of_three_bounds(matrix, moved, sent, by, seconds, mfu):
  bound = roofline(CHIPS['v5e'], [(matrix, moved, sent)], model_flops=98.5e12)
  assert bound.bound_by == by
  assert bound.seconds == pytest.approx(seconds) and bound.mfu == pytest.approx(mfu)


def test_kernels_one_after_the_other_take_each_its_own_longest():
  """A product that reads little, a copy and a sum over chips: together they could overlap, in turn they can't."""
  kernels = [(197e12, 81.9e9, 0.0), (0.0, 2 * 819e9, 0.0), (0.0, 81.9e9, 100e9)]
  bound = roofline(CHIPS['v5e'], kernels, model_flops=98.5e12)
  assert (bound.compute, bound.memory, bound.links) == pytest.approx((1.0, 2.2, 0.5))
  assert bound.seconds == pytest.approx(2.2) and bound.serial == pytest.approx(3.5)
  nothing = roofline(CHIPS['v5e'], [], model_flops=0)
  assert (nothing.seconds, nothing.serial, nothing.mfu) == (0, 0, 0)


def test_topologies_by_name():
  assert topology.parse('v5e:4x4') == (CHIPS['v5e'], (4, 4))
  assert topology.parse('v4:2x2x4') == (CHIPS['v4'], (2, 2, 4))
  # Hosts, and GPUs of each.
  assert topology.parse('h200:8') == (CHIPS['h200'], (1, 8))
  assert topology.parse('rtx4090:2x4') == (CHIPS['rtx4090'], (2, 4))


@pytest.mark.parametrize(
  ('name', 'complaint'),
  [
    ('v7:4x4', 'unknown topology .* v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, a100:1, h100:1'),
    ('', 'unknown topology'),
    ('v5e', '2 sides, such as v5e:4x4'),
    ('v5e:4x4x4', '2 sides'),
    ('v5p:4x4', '3 sides, such as v5p:2x2x4'),
    ('v5e:4y4', '2 sides'),
    ('v5e:0x4', '2 sides'),
    ('h200', 'number of GPUs, such as h200:8'),
    ('h200:0', 'number of GPUs'),
    ('h100:2x2x2', 'hosts and GPUs of each, such as h100:2x8'),
  ],
)
def test_mistaken_topologies_are_answered_with_known_ones(name, complaint):
  with pytest.raises(UserError, match=complaint):
    topology.parse(name)


@pytest.mark.parametrize('most', [0, 1, 7, 8, 40, 63, 64, 65, 100, 1000, 5000])
@pytest.mark.parametrize('unit', [1, 4])
@pytest.mark.parametrize('start', [1, 64])
def test_the_largest_batch_that_fits_to_an_eighth(most, unit, start):
  tried = []

  def fits(number):
    assert number % unit == 0 and number not in tried
    tried.append(number)
    return number <= most

  found = search.largest_that_fits(fits, start, unit, 4096)
  best = min(most, 4096) // unit * unit
  assert found <= best and found % unit == 0
  assert best - found <= max(unit, found / 8)
  assert found == 0 or found in tried  # What is recommended has been compiled.
  assert len(tried) <= 17  # 12 doublings and 4 halvings; each takes minutes
