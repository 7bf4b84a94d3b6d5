"""What a step must compute: traced products against hand counts, closed forms and what XLA executes."""

import jax
import jax.numpy as jnp
import pytest

from folk_jax import config as config_lib
from folk_jax import models
from folk_jax.compiled import analytic, cost, hlo

VIT_B = {'image_size': 224, 'patch': 16, 'width': 768, 'depth': 12}


def total(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return sum(product.flops for product in analytic.products(function, *args))


def test_a_scan_counts_every_iteration_and_remat_its_recomputation():
  def f(x, weights, remat):
    def layer(x, w):
      return jnp.sin(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()

  product = 5 * 2 * 8 * 16 * 16
  shapes = (8, 16), (5, 16, 16)
  assert total(lambda x, w: f(x, w, False), *shapes) == product
  assert total(jax.grad(lambda w, x: f(x, w, False)), *shapes[::-1]) == 3 * product
  assert total(jax.grad(lambda w, x: f(x, w, True)), *shapes[::-1]) == 4 * product


def test_a_conditional_counts_its_largest_branch():
  def f(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: (x @ w) @ w, lambda: x @ w)

  assert total(f, (3, 5), (5, 5)) == 2 * (2 * 3 * 5 * 5)


def test_a_convolution_and_its_gradients_cost_the_same_each():
  def f(image, kernel):
    return jax.lax.conv_general_dilated(
      image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    ).sum()

  # Along an axis 3 taps at 3 of the 4 positions, and 2 at the first, whose third lies on the padding.
  forward = 2 * 3 * 11 * 11 * 5 * 7
  assert total(f, (3, 8, 8, 5), (3, 3, 5, 7)) == forward
  assert total(jax.grad(f, argnums=0), (3, 8, 8, 5), (3, 3, 5, 7)) == 2 * forward
  assert total(jax.grad(f, argnums=1), (3, 8, 8, 5), (3, 3, 5, 7)) == 2 * forward


def test_products_know_their_scope():
  def f(x, w):
    with jax.named_scope('student'):
      y = jax.jit(lambda x: x @ w)(x)
    return (y @ w).sum()

  found = analytic.products(jax.grad(f), jnp.ones((2, 3)), jnp.ones((3, 3)))
  scopes = [cost.scope_of(product.name, ('student',)) for product in found]
  assert sorted(scopes) == ['', '', 'student', 'student']  # Each with its gradient.


def test_a_mapped_function_counts_on_every_device(run_with_devices):
  code = """
    import jax, jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec as P
    from folk_jax.compiled import analytic
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P(('a', 'b')), out_specs=P(('a', 'b')))
    print(sum(p.flops for p in analytic.products(f, jnp.ones((16, 5)))))
  """
  assert float(run_with_devices(code).splitlines()[-1]) == 8 * 2 * 2 * 2 * 5


@pytest.mark.parametrize(
  ('recipe', 'gflop'),
  [
    ('vit_s.py', 9.2),  # 4.6 G multiply-adds, as published tables have them
    ('vit_b.py', 35.2),  # 17.6
    ('vit_l.py', 123.2),  # 61.6
  ],
)
def test_vits_have_the_published_multiply_adds(recipe, gflop):
  model = config_lib.load_recipe(f'configs/{recipe}').model
  fields = {name: model[name] for name in ('patch', 'width', 'depth', 'mlp_ratio')}
  found = analytic.vit_forward_flops(image_size=224, **fields)
  # Papers round to a tenth of a billion multiply-adds.
  assert found / 1e9 == pytest.approx(gflop, abs=0.2)


@pytest.fixture(scope='module')
def vit():
  model = models.make_backbone('vit', 224, width=768, depth=12, heads=12, patch=16)
  image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  return model, jax.eval_shape(model.init, jax.random.key(0), image), image


@pytest.mark.parametrize('class_only', [False, True])
def test_the_traced_forward_pass_is_the_closed_form(vit, class_only):
  model, variables, image = vit

  def encode(variables, image):
    return model.apply(variables, image, patches=not class_only)

  found = sum(p.flops for p in analytic.products(encode, variables, image))
  expected = analytic.vit_forward_flops(**VIT_B, class_only=class_only)
  # Of the last block's scores and values: 12 heads on all channels, where one is counted.
  zeros = 2 * 2 * 197 * 768 * 11 if class_only else 0
  assert found == 2 * (expected + zeros)


def test_a_class_token_alone_spares_most_of_a_block():
  whole, alone = (analytic.vit_forward_flops(**VIT_B, class_only=only) for only in (False, True))
  # 196 of 197 tokens: 10 of a block's 12 products with weights of D x D, and both of attention.
  spared = 2 * 196 * (10 * 768**2 + 2 * 197 * 768)
  assert whole - alone == spared
  assert spared / whole == pytest.approx(0.069, abs=0.001)


def test_a_training_step_of_folk_is_eight_forward_passes_an_image():
  """Two views, each three times the student (forward, two gradients) and once the teacher; no gradient to pixels."""
  from folk_jax.compiled import report, step

  config = config_lib.load_recipe('configs/vit_b.py')
  config.batch_size = 2
  target = step.Target('', 1, jax.devices()[:1], None, None)
  known, parameters = step.Compiler('', target, 1281167, 1000).expected(config)
  forward = analytic.vit_forward_flops(**VIT_B)
  of_class_tokens = analytic.vit_forward_flops(**VIT_B, class_only=True)
  per_image = known.model_flops / 2
  # Of the teacher only class tokens are read. Heads and the reconstruction's linear layer are about 1 % of it.
  assert 1.0 < per_image / (6 * forward + 2 * of_class_tokens) < 1.015
  assert 8 * forward / 1e9 == pytest.approx(281.6, rel=0.005)
  assert parameters > 85_798_656  # the backbone's own
  assert set(report.SIGNAL) < set(report.SCOPES)


def test_xla_executes_what_was_traced():
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  args = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  step = jax.grad(f, argnums=(0, 1))
  visits, _ = cost.visits(hlo.parse(jax.jit(step).lower(*args).compile().as_text()))
  executed = sum(v.times * cost.flops(v) for v in visits)
  assert executed == sum(p.flops for p in analytic.products(step, *args))
