"""Attention, principal components and neighbours against what they are by definition; curves; and the command."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.models.layers import gelu
from folk_jax.report import curves, markup, networks

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def network():
  """A ViT of two blocks whose weights are large enough for its attention to differ between patches."""
  backbone = models.make_backbone('vit', 16, width=8, depth=2, heads=2, patch=8)
  image = jnp.zeros((1, 16, 16, 3))
  params = jax.jit(backbone.init)(jax.random.key(0), image)['params']
  params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 2 else leaf, params)
  return networks.Network(backbone, params, {}, (0.5,) * 3, (0.25,) * 3, 'student')


def normed(x, norm):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * norm['scale'] + norm['bias']


def test_attention_is_the_networks_own(network):
  """The last block's class token, made anew from these weights, is the one that the network returns."""
  image = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
  patches_NAhw = networks.class_attention(network, image)
  assert patches_NAhw.shape == (2, 2, 2, 2)
  assert patches_NAhw.std() > 0.01
  output = network.encode(image, layers=(0,))
  pooled, patches = map(np.asarray, output.layers[0])
  token_NTD = np.concatenate([pooled[:, None], patches.reshape(2, 4, 8)], axis=1)
  block = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), network.params['blocks'])
  qkv = block['attn']['qkv']
  value_NTD = (normed(token_NTD, block['norm1']) @ qkv['kernel'] + qkv['bias'])[..., 16:]
  patches_NAT = patches_NAhw.reshape(2, 2, 4)
  weight_NAT = np.concatenate([1 - patches_NAT.sum(-1, keepdims=True), patches_NAT], axis=-1)
  mixed_NAE = np.einsum('nat,ntae->nae', weight_NAT, value_NTD.reshape(2, 5, 2, 4))
  proj, mlp = block['attn']['proj'], block['mlp']
  class_ND = token_NTD[:, 0] + mixed_NAE.reshape(2, 8) @ proj['kernel'] + proj['bias']
  hidden = gelu(normed(class_ND, block['norm2']) @ mlp['fc1']['kernel'] + mlp['fc1']['bias'])
  class_ND = class_ND + np.asarray(hidden) @ mlp['fc2']['kernel'] + mlp['fc2']['bias']
  # Two blocks of float32 sums of eight values of order 1.
  expected = normed(class_ND, jax.tree.map(np.asarray, network.params['norm']))
  np.testing.assert_allclose(output.pooled, expected, atol=2e-5)


def test_the_first_component_is_large_in_the_middle_whatever_its_sign():
  patch_NhwD = np.zeros((2, 4, 4, 5), np.float32)
  patch_NhwD[:, 1:3, 1:3] = [3.0, 0, 0, -4.0, 0]  # A subject in the middle, along one direction.
  patch_NhwD += 1e-3 * np.random.default_rng(0).random(patch_NhwD.shape)
  for features in (patch_NhwD, -patch_NhwD):
    first_Nhw = networks.components(features)[..., 0]
    assert first_Nhw[:, 1:3, 1:3].min() > 0.99
    assert first_Nhw[:, 0].max() < 0.01


def test_equal_patches_have_no_components():
  np.testing.assert_array_equal(networks.components(np.ones((1, 2, 2, 4), np.float32)), 0.5)


def test_neighbours_by_hand():
  bank = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
  order, similarity = networks.nearest(np.array([[0.8, 0.6]], np.float32), bank, 3)
  assert order.tolist() == [[1, 0, 2]]
  np.testing.assert_allclose(similarity, [[0.96, 0.8, 0.6]], rtol=1e-6)


def test_curves_pass_over_what_is_no_number_and_average_many_points(read_page):
  steps = range(1, 1001)
  lines = [{'step': i, 'train/loss': float('nan') if i == 1 else 2.0} for i in steps]
  (card,) = curves.charts(lines)
  page = read_page(card)
  assert page.of('path') and 'nan' not in ' '.join(path['d'] for path in page.of('path'))
  assert len(page.of('rect')) <= 60
  # A NaN among the first five points is one of their mean.
  assert page.of('svg')[0]['aria-label'].endswith('total nan at first, 2 at last')


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
    (3.0, 97.0, [0, 25, 50, 75, 100]),
    (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
    (5.0, 5.0, [2, 4, 6, 8]),
  ],
)
def test_ticks_are_round_and_reach_the_ends(low, high, expected):
  assert curves.ticks(low, high, 4) == pytest.approx(expected)


def test_what_enters_an_element_is_text():
  made = markup.tag('p', '<b>', markup.tag('i', 1), [None, '&'], title='"', class_='x', hidden=True)
  assert made == '<p title="&quot;" class="x" hidden>&lt;b&gt;<i>1</i>&amp;</p>'
  assert markup.escape('a\x00b') == 'a\N{REPLACEMENT CHARACTER}b'


def command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'folk_jax.report', *arguments],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_the_command_helps_and_says_mistakes_in_one_line():
  helped = command('--help')
  assert helped.returncode == 0 and '--image' in helped.stdout
  for arguments, said in (
    ((), 'give --workdir'),
    (('--workdir=/nowhere',), 'holds no run'),
  ):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and said in done.stderr
    assert done.stderr.count('\n') == 1
