"""What a backbone makes of photographs: principal components of its patches, its attention, nearest neighbours.

Shape letters: N images, M images of a bank, Q queries, h, w positions, H, W pixels, C channels, T tokens (class token
first), D width, A heads, E width of a head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax import models
from folk_jax.models import features
from folk_jax.models.norm import LAYER_NORM_EPSILON
from folk_jax.signal.augment import normalise

# A map of fewer positions a side shows nothing: an earlier stage of a ResNet then takes the last one's place.
_LEAST_GRID = 4


@dataclasses.dataclass(frozen=True)
class Network:
  """A backbone with its weights.

  Attributes:
    backbone: from `models.make_backbone`.
    params: its parameters.
    statistics: BatchNorm's, {} for a backbone without any.
    mean, std: per-channel normalisation of images in [0, 1].
    which: 'teacher' or 'student'.
  """

  backbone: Any
  params: Any
  statistics: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]
  which: str

  @property
  def is_vit(self) -> bool:
    """Whether it has a class token, heads and patches."""
    return isinstance(self.backbone, models.ViT)

  def input(self, image_NHWC: jax.Array) -> jax.Array:
    """Images, uint8 or in [0, 1], as the backbone takes them."""
    scale = 255.0 if image_NHWC.dtype == np.uint8 else 1.0
    return normalise(jnp.asarray(image_NHWC, jnp.float32) / scale, self.mean, self.std)

  def encode(self, image_NHWC: jax.Array, **options: Any) -> models.BackboneOutput:
    """What the backbone returns for images, uint8 or in [0, 1]."""
    output, _ = models.encode(
      self.backbone, self.params, self.statistics, self.input(image_NHWC), **options
    )
    return output

  def feature(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function from uint8 images [N, H, W, 3] to their features of length 1, float32 [N, D]; compiled once."""
    options = features.encode_options(name, self.backbone)

    @jax.jit
    def of(image_NHWC: jax.Array) -> jax.Array:
      feature_ND = features.feature(self.encode(image_NHWC, **options), name)
      return feature_ND / jnp.maximum(jnp.linalg.norm(feature_ND, axis=1, keepdims=True), 1e-12)

    return lambda image_NHWC: np.asarray(of(image_NHWC))

  @property
  def cost(self) -> float:
    """About how many floating-point operations an image takes."""
    size = self.backbone.image_size
    height, width = (size, size) if isinstance(size, int) else size
    stride = self.backbone.stride if self.is_vit else 16
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
    return 2.0 * count * max(1, height // stride) * max(1, width // stride)


def patch_map(network: Network, image_NHWC: np.ndarray) -> np.ndarray:
  """The features of positions: float32 [N, h, w, D].

  A ViT's patch tokens; of a ResNet the deepest stage with at least 4 positions a side, or its first.
  """
  chex.assert_rank(image_NHWC, 4)
  if network.is_vit:
    output = jax.jit(network.encode)(image_NHWC)
    return np.asarray(output.patches)
  output = jax.jit(functools.partial(network.encode, layers=(0, 1, 2, 3)))(image_NHWC)
  maps = [np.asarray(output.layers[stage][1]) for stage in (3, 2, 1, 0)]
  return next((one for one in maps if min(one.shape[1:3]) >= _LEAST_GRID), maps[-1])


def components(patch_NhwD: np.ndarray) -> np.ndarray:
  """The three first principal components of all images' patches together, as colours: float64 [N, h, w, 3] in [0, 1].

  The sign of a component is arbitrary. The first is turned so that the middle of the images, where a photograph has
  its subject more often than not, is larger than their border; the others so that their longer tail is positive.
  A component without variance is 0.5.
  """
  chex.assert_rank(patch_NhwD, 4)
  n, h, w, width = patch_NhwD.shape
  row_PD = patch_NhwD.reshape(-1, width).astype(np.float64)
  row_PD = row_PD - row_PD.mean(0)
  _, _, axes_KD = np.linalg.svd(row_PD, full_matrices=False)
  found_PK = row_PD @ axes_KD[:3].T
  found_PK = np.pad(found_PK, ((0, 0), (0, 3 - found_PK.shape[1])))
  found_NhwK = found_PK.reshape(n, h, w, 3)
  inner = np.s_[:, h // 4 : h - h // 4, w // 4 : w - w // 4]
  signs = [np.sign(found_NhwK[inner][..., 0].mean()) or 1.0]
  signs += [np.sign((found_PK[:, k] ** 3).mean()) or 1.0 for k in (1, 2)]
  found_NhwK = found_NhwK * signs
  low, high = np.percentile(found_NhwK, (2, 98), axis=(0, 1, 2))
  spread = high - low
  share_NhwK = (found_NhwK - low) / np.maximum(spread, 1e-12)
  return np.clip(np.where(spread > 1e-9, share_NhwK, 0.5), 0, 1)


def class_attention(network: Network, image_NHWC: np.ndarray) -> np.ndarray | None:
  """How much the class token of a ViT's last block looks at each patch: float32 [N, A, h, w], a head's sum at most 1.

  None for a network without a class token, and for a ViT of one block.
  """
  backbone = network.backbone
  if not network.is_vit or backbone.depth < 2:
    return None

  @jax.jit
  def of(image_NHWC: jax.Array) -> jax.Array:
    before = backbone.depth - 2
    output = network.encode(image_NHWC, layers=(before,))
    pooled_ND, patches_NhwD = output.layers[before]
    n, h, w, width = patches_NhwD.shape
    token_NTD = jnp.concatenate([pooled_ND[:, None], patches_NhwD.reshape(n, -1, width)], axis=1)
    block = jax.tree.map(lambda leaf: leaf[-1], network.params['blocks'])
    centred_NTD = token_NTD - token_NTD.mean(-1, keepdims=True)
    variance_NT1 = jnp.square(centred_NTD).mean(-1, keepdims=True)
    unit_NTD = centred_NTD * jax.lax.rsqrt(variance_NT1 + LAYER_NORM_EPSILON)
    unit_NTD = unit_NTD * block['norm1']['scale'] + block['norm1']['bias']
    qkv = block['attn']['qkv']
    query_NTD, key_NTD, _ = jnp.split(unit_NTD @ qkv['kernel'] + qkv['bias'], 3, axis=-1)
    query_NAE = query_NTD[:, 0].reshape(n, backbone.heads, -1)
    key_NTAE = key_NTD.reshape(n, token_NTD.shape[1], backbone.heads, -1)
    score_NAT = jnp.einsum('nae,ntae->nat', query_NAE, key_NTAE) * query_NAE.shape[-1] ** -0.5
    return jax.nn.softmax(score_NAT)[..., 1:].reshape(n, backbone.heads, h, w)

  return np.asarray(of(image_NHWC))


def overlay(image_HWC: np.ndarray, share_hw: np.ndarray, heat_hw3: np.ndarray) -> np.ndarray:
  """A photograph, dark where a map is low, in the map's colours where it is high: uint8 [H, W, 3].

  Args:
    image_HWC: uint8; h and w divide its sides.
    share_hw: the map, in [0, 1].
    heat_hw3: its colours, uint8.
  """
  rows, columns = image_HWC.shape[0] // share_hw.shape[0], image_HWC.shape[1] // share_hw.shape[1]

  def large(x: np.ndarray) -> np.ndarray:
    return x.repeat(rows, axis=0).repeat(columns, axis=1)

  grey_HW1 = image_HWC.astype(np.float64).mean(-1, keepdims=True)
  weight_HW1 = 0.25 + 0.6 * large(share_hw)[..., None]
  mixed_HWC = grey_HW1 * (1 - weight_HW1) + large(heat_hw3) * weight_HW1
  return np.clip(mixed_HWC, 0, 255).astype(np.uint8)


def nearest(query_QD: np.ndarray, bank_MD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The most similar rows of a bank by cosine: numbers int [Q, count], and similarities, falling.

  Args:
    query_QD, bank_MD: of length 1.
    count: how many; fewer where the bank has fewer.
  """
  chex.assert_rank((query_QD, bank_MD), 2)
  similarity_QM = query_QD @ bank_MD.T
  order_QK = np.argsort(-similarity_QM, axis=1, kind='stable')[:, :count]
  return order_QK, np.take_along_axis(similarity_QM, order_QK, axis=1)
