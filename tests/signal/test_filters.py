"""The filters' laws, entry by entry of the table; golden files; mistakes; several devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import bands, filters, fourier, wavelet
from folk_jax.signal.filters import FILTERS, Filter

PORTIONS = (0.1, 0.3)
# Even, odd, neither square; each has self-conjugate columns of its own kind.
SIZES = [(8, 8), (7, 9), (6, 5), (5, 12)]
BATCH = 8
PLAIN = Filter('com_rcom', PORTIONS, 0.5, 'shared', radius=70.0, clamp=False)
FREE = [name for name, kind in FILTERS.items() if kind.keep is None]
# Names that always keep or always remove what another one selects.
FORCED = {'com': 'com_rcom', 'rcom': 'com_rcom', 'low_pass': 'radial', 'high_pass': 'radial'}
WAVELETS = {'wavelet', 'wavelet_random'}
FOURIER = [name for name in FREE if name not in WAVELETS]


def random_image(height, width, batch=BATCH, seed=0):
  return np.random.default_rng(seed).random((batch, height, width, 3), dtype=np.float32)


def keys_of(batch=BATCH, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


# All in one program: a program an entry, size and kind would take minutes to compile.
@functools.partial(jax.jit, static_argnames='settings')
def apply_each(image_BHWC, k_B, keep_B, keys_B, settings=PLAIN):
  """{name: Filtered}, of the entries that select, with k and keep or remove as given."""
  return {
    name: FILTERS[name].apply(
      dataclasses.replace(settings, name=name), image_BHWC, k_B, keep_B, keys_B
    )
    for name in FREE
  }


@functools.partial(jax.jit, static_argnames='settings')
def call_each(image_BHWC, keys_B, settings=PLAIN):
  """{name: Filtered} of the whole table, called as an objective calls them."""
  return {name: dataclasses.replace(settings, name=name)(image_BHWC, keys_B) for name in FILTERS}


def counts_of(height, width):
  """A k for each image, of both portions."""
  counts = [fourier.coefficient_count(portion, height, width) for portion in PORTIONS]
  return np.resize(counts, BATCH).astype(np.int32)


@functools.cache
def results(height, width):
  """({name: kept}, {name: removed}): the same selections."""
  image, k = random_image(height, width), counts_of(height, width)
  return tuple(apply_each(image, k, np.full(BATCH, keep), keys_of()) for keep in (True, False))


def full_mask(half_BHFC, width):
  """The mask over the full spectrum that a mask over the half of it stands for."""
  half_BHFC = np.asarray(half_BHFC)
  rows = -np.arange(half_BHFC.shape[1]) % half_BHFC.shape[1]
  mirrored = half_BHFC[:, rows][:, :, width - np.arange(half_BHFC.shape[2], width)]
  return np.concatenate([half_BHFC, mirrored], axis=2)


def is_conjugate_symmetric(full_BHWC):
  rows, columns = (-np.arange(size) % size for size in full_BHWC.shape[1:3])
  return np.array_equal(full_BHWC, full_BHWC[:, rows][:, :, columns])


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', FREE)
def test_kept_and_removed_make_the_image(name, size):
  kept, removed = (found[name] for found in results(*size))
  # Two transforms of numbers below 1, each a few float32 roundings off.
  np.testing.assert_allclose(kept.image_BHWC + removed.image_BHWC, random_image(*size), atol=1e-6)
  assert kept.image_BHWC.dtype == jnp.float32
  assert kept.kept_BHFC.shape == (BATCH, size[0], size[1] // 2 + 1, 1)
  assert kept.kept_BHFC.dtype == bool
  # Neither half is all of it.
  for half in (kept, removed):
    assert np.abs(half.image_BHWC).max(axis=(1, 2, 3)).min() > 0.05
  if name in WAVELETS:
    assert not np.any(kept.kept_BHFC) and not np.any(removed.kept_BHFC)
  else:
    np.testing.assert_array_equal(kept.kept_BHFC, ~np.asarray(removed.kept_BHFC))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', FOURIER)
def test_masks_are_symmetric_so_that_a_real_image_has_the_masked_spectrum(name, size):
  filtered = results(*size)[0][name]
  assert is_conjugate_symmetric(full_mask(filtered.kept_BHFC, size[1]))
  spectrum = np.fft.rfft2(random_image(*size).astype(np.float64), axes=(1, 2))
  found = np.fft.rfft2(np.asarray(filtered.image_BHWC, np.float64), axes=(1, 2))
  # Float32 roundings of the transforms, whose values go up to 64.
  np.testing.assert_allclose(found, np.where(filtered.kept_BHFC, spectrum, 0), atol=3e-5)


# The most that a filter may select where k were asked for; never fewer.
MOST = {
  'com_rcom': lambda k: k + 1,
  'magnitude_weighted': lambda k: k + 1,
  'gabor': lambda k: k + 1,
  'random': lambda k: k + 1,
  'random_block': lambda k: k + 2 * math.sqrt(k) + 1,
  'random_band': lambda k: k + 2,
  'gabor_random': lambda k: k + 1,
}


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', MOST)
def test_as_many_are_selected_as_the_portion_says(name, size):
  selected = full_mask(results(*size)[0][name].kept_BHFC, size[1])
  for count, k in zip(selected.sum(axis=(1, 2, 3)), counts_of(*size), strict=True):
    assert k <= count <= MOST[name](k)


def test_as_many_wavelet_coefficients_are_kept_as_the_portion_says():
  # Whole numbers of 2 ** levels coefficients: the transform of the kept image is what was kept.
  for name in WAVELETS:
    transform = wavelet.dwt(results(8, 8)[0][name].image_BHWC, bands.WAVELET, bands.octaves(8, 8))
    for image, k in enumerate(counts_of(8, 8)):
      kept = [np.abs(band[image]).max(axis=-1) > 1e-5 for band in jax.tree.leaves(transform)]
      assert sum(band.sum() for band in kept) == k


def test_every_entry_of_the_table_is_covered():
  assert set(MOST) | WAVELETS | {'radial'} == set(FREE)
  assert set(FREE) | set(FORCED) == set(FILTERS)


def test_a_call_draws_portion_and_kind_and_forced_names_keep_to_theirs():
  image, keys = random_image(7, 9), keys_of()
  called = call_each(image, keys)
  k, com = fourier.draw_filters(keys, PORTIONS, 0.5, 7, 9)
  assert len(set(np.asarray(k))) == 2 and 0 < com.sum() < BATCH
  selection_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
  kept, drawn, removed = (
    apply_each(image, k, keep, selection_keys)
    for keep in (np.full(BATCH, True), com, np.full(BATCH, False))
  )
  expected = drawn | {
    'com': kept['com_rcom'],
    'rcom': removed['com_rcom'],
    'low_pass': kept['radial'],
    'high_pass': removed['radial'],
  }
  assert expected.keys() == called.keys()
  for name, filtered in called.items():
    np.testing.assert_array_equal(filtered.kept_BHFC, expected[name].kept_BHFC, err_msg=name)
    # Programs of the same operations on the same numbers, fused differently.
    np.testing.assert_allclose(
      filtered.image_BHWC, expected[name].image_BHWC, atol=1e-6, err_msg=name
    )
    if name in drawn:
      difference = np.abs(kept[name].image_BHWC - removed[name].image_BHWC)
      assert difference.max(axis=(1, 2, 3)).min() > 0.1


def test_each_image_is_filtered_by_its_own_key():
  image, keys = random_image(7, 9), keys_of()
  order = np.roll(np.arange(BATCH), 3)
  expected, moved = call_each(image, keys), call_each(image[order], keys[order])
  other = call_each(
    np.concatenate([image[:1], random_image(7, 9, seed=1)[1:]]),
    jnp.concatenate([keys[:1], keys_of(seed=1)[1:]]),
  )
  for name in FILTERS:
    for ours, theirs, beside in zip(expected[name], moved[name], other[name], strict=True):
      np.testing.assert_array_equal(np.asarray(ours)[order], theirs, err_msg=name)
      np.testing.assert_array_equal(ours[0], beside[0], err_msg=name)


def test_informed_selections_look_at_the_image_and_the_others_do_not():
  image, other = random_image(7, 9), random_image(7, 9, seed=1)
  keep, keys = np.full(BATCH, True), keys_of()
  ours, theirs, of_sum = (
    apply_each(x, counts_of(7, 9), keep, keys) for x in (image, other, image + other)
  )
  for name in FREE:
    linear = np.asarray(ours[name].image_BHWC + theirs[name].image_BHWC)
    gap = np.abs(of_sum[name].image_BHWC - linear).max()
    # A filter that doesn't look is linear, up to roundings as above.
    assert gap > 0.05 if FILTERS[name].informed else gap < 3e-6, name


# One of each way to select; operation by operation takes a second an entry.
@pytest.mark.parametrize('name', ['magnitude_weighted', 'gabor', 'random_block', 'random_band'])
def test_compiled_equals_as_it_stands(name):
  compiled = results(6, 5)[0][name]
  settings = dataclasses.replace(PLAIN, name=name)
  plain = FILTERS[name].apply(
    settings, random_image(6, 5), jnp.asarray(counts_of(6, 5)), jnp.full(BATCH, True), keys_of()
  )
  np.testing.assert_array_equal(plain.kept_BHFC, compiled.kept_BHFC)
  np.testing.assert_allclose(plain.image_BHWC, compiled.image_BHWC, atol=1e-6)


@pytest.mark.parametrize('name', ['rcom', 'gabor_random', 'wavelet'])
def test_bfloat16_images_are_filtered_in_float32_and_the_clamp_cuts(name):
  image = jnp.asarray(random_image(7, 9), jnp.bfloat16)
  settings = dataclasses.replace(PLAIN, name=name, clamp=True)
  filtered = jax.jit(settings)(image, keys_of())
  plain = call_each(np.asarray(image, np.float32), keys_of())[name]
  assert filtered.image_BHWC.dtype == jnp.float32
  np.testing.assert_array_equal(filtered.kept_BHFC, plain.kept_BHFC)
  assert np.min(plain.image_BHWC) < -0.1
  cut = np.clip(plain.image_BHWC, 0, 1)
  np.testing.assert_allclose(filtered.image_BHWC, cut, atol=1e-6)


def test_integer_images_are_refused():
  image = jnp.zeros((2, 8, 8, 3), jnp.uint8)
  for name in ('com_rcom', 'random_block', 'wavelet'):
    with pytest.raises(TypeError, match='uint8 by / 255'):
      dataclasses.replace(PLAIN, name=name)(image, keys_of(2))


@pytest.mark.parametrize('ranking', ['shared', 'per_channel'])
def test_com_rcom_is_what_the_signal_room_filters(ranking):
  image, keys = random_image(24, 21), keys_of()

  def expected(image, keys):
    k, com = fourier.draw_filters(keys, PORTIONS, 0.3, 24, 21)
    return fourier.filter_images(image, k, com, ranking)

  ours = Filter('com_rcom', PORTIONS, 0.3, ranking, radius=16.0, clamp=False)
  for found, wanted in zip(jax.jit(ours)(image, keys), jax.jit(expected)(image, keys), strict=True):
    np.testing.assert_array_equal(found, wanted)


def test_per_channel_selects_for_each_channel_alone():
  image, keys = random_image(7, 9), keys_of()
  arguments = counts_of(7, 9), np.full(BATCH, True), keys
  settings = dataclasses.replace(PLAIN, ranking='per_channel')
  found = apply_each(image, *arguments, settings)
  # In all channels the same, and the third one's neighbours different.
  grey = apply_each(image[..., [0, 0, 0]], *arguments, settings)
  mixed = apply_each(np.concatenate([image[..., 1:], image[..., :1]], -1), *arguments, settings)
  for name in FREE:
    disk, informed = FILTERS[name].sized_by == 'radius', FILTERS[name].informed
    if name in FOURIER:
      assert found[name].kept_BHFC.shape[-1] == (1 if disk else 3)
    same = [np.allclose(x[..., 0], x[..., 1], atol=1e-6) for x in (grey[name].image_BHWC,)]
    ranked = disk or (informed and name != 'magnitude_weighted')
    # What is ranked is the same for the same channel; what is drawn is drawn for each.
    assert same == [ranked], name
    if ranked:
      np.testing.assert_allclose(
        mixed[name].image_BHWC[..., 2], found[name].image_BHWC[..., 0], atol=1e-6, err_msg=name
      )
    if name in FOURIER and not disk:
      assert np.any(found[name].kept_BHFC[..., 0] != found[name].kept_BHFC[..., 1])


@pytest.mark.parametrize('case', ['s32.r0', 's32.r1', 's33.r0', 's64.r0', 's224.r0'])
def test_radial_filters_match_mfm(golden, case):
  arrays = golden('mfm_filter')
  image, radius = arrays[f'{case.split(".")[0]}.images'], float(arrays[f'{case}.radius'])
  side = image.shape[1]
  # MFM's radius is meant at 224 pixels: case r0 of 32, 64 and 224 is 16 there.
  radius_224 = 16.0 if radius == 16 * side / 224 else radius * 224 / side
  assert radius_224 * side / 224 == radius
  table = {
    (kind, clamp): Filter('radial', (), probability, 'shared', radius_224, clamp)
    for kind, probability in (('low', 1.0), ('high', 0.0))
    for clamp in (False, True)
  }
  found = jax.jit(lambda *batch: [run(*batch) for run in table.values()])(
    image, keys_of(len(image))
  )
  for (kind, clamp), filtered in zip(table, found, strict=True):
    mask = np.fft.ifftshift(arrays[f'{case}.mask_{kind}']).astype(bool)
    np.testing.assert_array_equal(full_mask(filtered.kept_BHFC, side)[0, :, :, 0], mask)
    name = f'{case}.{kind}{"_clamped" * clamp}'
    step = 1 if name in arrays else 4
    expected = arrays[name if step == 1 else f'{name}_sub4']
    # The golden file's own tolerance for float32.
    np.testing.assert_allclose(
      filtered.image_BHWC[:, ::step, ::step], expected, atol=2e-6, rtol=1e-5
    )


def test_the_radius_scales_with_the_shorter_side():
  # Radius 28 at 224 pixels is 1 at 8 pixels, and only distance 0 lies strictly within.
  run = Filter('low_pass', (), 0.5, 'shared', 28.0, False)
  kept = full_mask(run(random_image(8, 12, 1), keys_of(1)).kept_BHFC, 12)
  assert kept.sum() == 1 and kept[0, 0, 0, 0]
  run = dataclasses.replace(run, radius=28.01)
  assert full_mask(run(random_image(8, 12, 1), keys_of(1)).kept_BHFC, 12).sum() == 5
  np.testing.assert_array_equal(filters.squared_radius(3, 4), [[0, 1, 4], [1, 2, 5], [1, 2, 5]])


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'name': 'com-rcom'}, r"config.objective.filter 'com-rcom'. Did you mean 'com_rcom'\?"),
    ({'name': 'zzz'}, r"filter 'zzz'. Known: com, com_rcom, gabor, .*wavelet_random.$"),
    ({'portions': ()}, 'config.objective.portions .* at least one'),
    ({'portions': (0.1, 1.0)}, 'config.objective.portions .* between 0 and 1'),
    ({'name': 'radial', 'portions': (math.nan,)}, 'config.objective.portions'),
    ({'com_probability': 1.1}, 'config.objective.com_probability 1.1'),
    ({'com_probability': math.nan}, 'config.objective.com_probability nan'),
    ({'ranking': 'sharde'}, "config.objective.ranking 'sharde'. Known: shared, per_channel"),
    ({'radius': 0.0}, 'config.objective.radius 0.0 must be positive'),
  ],
)
def test_mistakes_are_named(change, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(PLAIN, **change)


TWO_DEVICES = """
import dataclasses
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from folk_jax.signal import shard
from folk_jax.signal.filters import FILTERS, Filter

plain = Filter('com_rcom', (0.1, 0.3), 0.5, 'shared', 70.0, False)
names = [name for name, kind in FILTERS.items() if kind.keep is None]
table = [dataclasses.replace(plain, name=name) for name in names]
step = jax.jit(lambda image, keys: [shard.over_batch(run, image, keys) for run in table])
reference = np.load(sys.argv[1])
keys = jax.random.split(jax.random.key(0), 8)

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
with jax.set_mesh(mesh):
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  batch = jax.device_put((reference['image'], keys), sharding)
  compiled = step.lower(*batch).compile()
  together = compiled(*batch)
for collective in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute'):
  assert collective not in compiled.as_text(), collective
for name, found in zip(names, together, strict=True):
  assert found.image_BHWC.sharding.is_equivalent_to(sharding, 4), name
  np.testing.assert_array_equal(found.kept_BHFC, reference[f'{name}.kept'], err_msg=name)
  # The same programs on fewer images each.
  np.testing.assert_allclose(
    found.image_BHWC, reference[f'{name}.image'], atol=1e-6, err_msg=name
  )
"""


def test_two_devices_equal_one_and_tell_each_other_nothing(run_with_devices, tmp_path):
  image = random_image(7, 9)
  reference = {'image': image}
  for name, filtered in call_each(image, keys_of()).items():
    reference |= {f'{name}.image': filtered.image_BHWC, f'{name}.kept': filtered.kept_BHFC}
  np.savez(tmp_path / 'one_device.npz', **reference)
  run_with_devices(TWO_DEVICES, str(tmp_path / 'one_device.npz'), devices=2)
