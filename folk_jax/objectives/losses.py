"""Losses that methods share: distillation with centring, masked patches, frequency reductions.

Shape letters: B images, V student views, Q teacher views, T patch tokens, t tokens of a chunk, E
bottleneck and K outputs of the projection head.

Every loss returns one float32 value an image, [B]: the caller takes the mean, so that padding,
microbatches and shards compose. Whatever dtype the logits come in, the arithmetic is float32: a
softmax at temperature 0.04 multiplies the rounding of its logits by 25. No gradient reaches the
teacher or the centre.

Sources: DINO, https://arxiv.org/abs/2104.14294; iBOT, https://arxiv.org/abs/2111.07832;
MFM, https://arxiv.org/abs/2206.07706; FOLK, https://arxiv.org/abs/2409.10362.
"""

import chex
import jax
import numpy as np
from jax import numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models import compare
from folk_jax.signal.shard import one_a_device, over_batch

REDUCTIONS = ('per_image', 'pooled')


def teacher_probabilities(
  teacher: jax.Array, centre_K: jax.Array, temperature: jax.Array | float
) -> jax.Array:
  """The teacher's centred and sharpened distribution: softmax((logits - centre) / temperature).

  Args:
    teacher: logits [..., K], any float dtype.
    centre_K: the running mean of the teacher's logits, float32 [K].
    temperature: positive scalar, may be traced (it follows a schedule).

  Returns:
    Probabilities, float32 [..., K], cut off from the gradient.

  Source: DINO, section 3.1, equation (1) and "Avoiding collapse".
  """
  chex.assert_shape(centre_K, teacher.shape[-1:])
  centred = teacher.astype(jnp.float32) - centre_K.astype(jnp.float32)
  return jax.lax.stop_gradient(jax.nn.softmax(centred / temperature, axis=-1))


def cross_view_pairs(student_views: int, teacher_views: int) -> np.ndarray:
  """Which pairs of views are compared: bool [V, Q], true where the two views differ.

  View number i is the same view on both sides; the student may have further views (local crops)
  that the teacher never sees.

  Raises:
    ValueError: if the teacher has more views than the student, or no pair is left.
  """
  if teacher_views > student_views:
    raise ValueError(
      f'the teacher has {teacher_views} views and the student {student_views}: '
      'the views of the teacher must be the first views of the student'
    )
  pairs_VQ = ~np.eye(student_views, teacher_views, dtype=bool)
  if not pairs_VQ.any():
    raise ValueError('a cross-view loss needs at least two student views, found one')
  return pairs_VQ


def distillation_loss(
  student_BVK: jax.Array,
  teacher_BVK: jax.Array,
  centre_K: jax.Array,
  student_temperature: jax.Array | float,
  teacher_temperature: jax.Array | float,
) -> jax.Array:
  """Cross-entropy between the student on one view and the teacher on another.

  In FOLK the student's views are filtered and the teacher's are not; which views come in is the
  caller's affair.

  Args:
    student_BVK: the student's logits, [B, V, K].
    teacher_BVK: the teacher's logits, [B, Q, K] with Q <= V; view i is the student's view i.
    centre_K: float32 [K].
    student_temperature: positive scalar, 0.1 in DINO.
    teacher_temperature: positive scalar, 0.04 to 0.07 in DINO.

  Returns:
    Mean cross-entropy over the pairs of different views in nats, float32 [B]; ln K where both are
    uniform.

  Raises:
    ValueError: if no pair of different views exists.

  Source: DINO, equation (3); FOLK, abstract, for which views meet.
  """
  chex.assert_rank([student_BVK, teacher_BVK, centre_K], [3, 3, 1])
  chex.assert_equal_shape([student_BVK, teacher_BVK], dims=(0, 2))
  pairs_VQ = cross_view_pairs(student_BVK.shape[1], teacher_BVK.shape[1])

  # 1. P_t, centred and sharpened; no gradient (DINO, equation 1).
  teacher_BQK = teacher_probabilities(teacher_BVK, centre_K, teacher_temperature)
  # 2. ln P_s (DINO, equation 1).
  student_BVK = jax.nn.log_softmax(student_BVK.astype(jnp.float32) / student_temperature, axis=-1)
  # 3. The sum over the teacher's views x' != x (DINO, equation 3) is taken first: the cross-entropy
  # is linear in the target. The product with the constant 0/1 table fuses, so that no [B, V, Q, K]
  # array is made, and unlike "all views minus the same one" nothing cancels.
  table_VQ1 = jnp.asarray(pairs_VQ, jnp.float32)[..., None]
  target_BVK = jnp.sum(table_VQ1 * teacher_BQK[:, None], axis=2)
  # 4. H(P_t, P_s), and the mean over pairs (DINO's code; its equation 3 is the plain sum).
  return -jnp.sum(target_BVK * student_BVK, axis=(1, 2)) / pairs_VQ.sum()


def patch_distillation_loss(
  student_BVTE: jax.Array,
  teacher_BVTE: jax.Array,
  student_EK: jax.Array,
  teacher_EK: jax.Array,
  centre_K: jax.Array,
  student_temperature: jax.Array | float,
  teacher_temperature: jax.Array | float,
  mask_BVT: jax.Array,
  chunk: int = 16,
) -> jax.Array:
  """Cross-entropy between student and teacher on the same view's masked patch tokens.

  Logits of every token would be the largest arrays of the step by far ([B, V, 196, 8192] is 0.8 GB
  for 64 pairs of ViT-B, of student and teacher, each several times over). So `chunk` tokens a view
  are compared with the prototypes at a time, and again in the backward pass.

  Args:
    student_BVTE: the student's patch tokens as the projection head embeds them, [B, V, T, E].
    teacher_BVTE: the teacher's, of the unmasked views, [B, V, T, E].
    student_EK: the student's prototypes, [E, K]; logits are products with them.
    teacher_EK: the teacher's.
    centre_K: the patch tokens' own centre, float32 [K].
    student_temperature: positive scalar.
    teacher_temperature: positive scalar.
    mask_BVT: bool or 0/1, true where the token was masked for the student.
    chunk: tokens of a view at a time, above 0.

  Returns:
    Mean over the masked tokens of a view (zero where it has none), then over views; nats, float32
    [B].

  Source: iBOT, equation (2), and its code for the order of the means.
  """
  chex.assert_rank([student_BVTE, teacher_BVTE, centre_K, mask_BVT], [4, 4, 1, 3])
  chex.assert_equal_shape([student_BVTE, teacher_BVTE])
  chex.assert_equal_shape([student_EK, teacher_EK])
  chex.assert_shape(mask_BVT, student_BVTE.shape[:3])
  tokens = mask_BVT.shape[2]
  chunks = -(-tokens // chunk)

  def entropy(prototypes, centre_K, temperature, student_BVtE, teacher_BVtE):
    # 1. P_t of each token, centred and sharpened; no gradient.
    teacher_BVtK = teacher_probabilities(
      compare(teacher_BVtE, prototypes['teacher']), centre_K, temperature
    )
    # 2. ln P_s of each token.
    student_BVtK = compare(student_BVtE, prototypes['student']) / student_temperature
    # 3. H(P_t, P_s) (iBOT, equation 2).
    return -jnp.sum(teacher_BVtK * jax.nn.log_softmax(student_BVtK, axis=-1), axis=-1)

  def entropies(student_BVTE, teacher_BVTE, *whole):
    whole = one_a_device(whole)
    parts = [_chunked(tokens_BVTE, chunks) for tokens_BVTE in (student_BVTE, teacher_BVTE)]
    found = jax.lax.map(lambda part: jax.checkpoint(entropy)(*whole, *part), parts)
    return jnp.moveaxis(found, 0, 2).reshape(*student_BVTE.shape[:2], -1)[..., :tokens]

  entropy_BVT = over_batch(
    entropies,
    student_BVTE,
    jax.lax.stop_gradient(teacher_BVTE),
    replicated=(
      {'student': student_EK, 'teacher': jax.lax.stop_gradient(teacher_EK)},
      jax.lax.stop_gradient(centre_K),
      jnp.asarray(teacher_temperature, jnp.float32),
    ),
  )
  # 4. m_i, averaged over the masked tokens of each view; and the mean over views.
  mask_BVT = mask_BVT.astype(jnp.float32)
  masked_BV = jnp.maximum(mask_BVT.sum(axis=2), 1.0)
  return jnp.mean(jnp.sum(entropy_BVT * mask_BVT, axis=2) / masked_BV, axis=1)


def _chunked(tokens_BVTE: jax.Array, chunks: int) -> jax.Array:
  """[chunks, B, V, t, E], the last filled up with zeros."""
  batch, views, tokens, channels = tokens_BVTE.shape
  size = -(-tokens // chunks)
  filled = jnp.pad(tokens_BVTE, ((0, 0), (0, 0), (0, chunks * size - tokens), (0, 0)))
  return jnp.moveaxis(filled.reshape(batch, views, chunks, size, channels), 2, 0)


def updated_centre(
  centre_K: jax.Array, teacher: jax.Array, momentum: jax.Array | float
) -> jax.Array:
  """The centre after a step: an exponential moving average of the mean of the teacher's logits.

  The step's loss uses the centre from before it. The result is affine in the mean, so the mean of
  the results of equal microbatches that started from one centre is the result of the whole batch:
  that is how it moves once a step.

  Args:
    centre_K: float32 [K].
    teacher: logits [..., K]; the mean runs over all leading axes (images, views, tokens).
    momentum: in [0, 1], 0.9 in DINO.

  Returns:
    float32 [K], cut off from the gradient.

  Source: DINO, equation (4).
  """
  chex.assert_rank(centre_K, 1)
  chex.assert_shape(centre_K, teacher.shape[-1:])
  mean_K = teacher.astype(jnp.float32).mean(axis=tuple(range(teacher.ndim - 1)))
  return jax.lax.stop_gradient(centre_K * momentum + mean_K * (1.0 - momentum))


def distillation_statistics(
  student_BVK: jax.Array,
  teacher_BVK: jax.Array,
  centre_K: jax.Array,
  student_temperature: jax.Array | float,
  teacher_temperature: jax.Array | float,
) -> dict[str, jax.Array]:
  """Whether the distillation is alive: numbers that the loss hides.

  All are float32 scalars in [0, 1], up to rounding, and let no gradient through:

  `teacher_entropy`: mean over images and views of the entropy of P_t, over ln K. 1 is collapse to
    the uniform distribution (the loss then rests at ln K), 0 is a teacher that is always certain.
  `teacher_entropy_of_mean`: entropy of the mean of P_t over images and views, over ln K. 0 is
    collapse to one output. A healthy run has a low `teacher_entropy` and a high
    `teacher_entropy_of_mean`.
  `student_entropy`: as `teacher_entropy`, of P_s.
  `agreement`: share of the cross-view pairs in which student and teacher have the same largest
    output.

  Arguments and errors are those of `distillation_loss`; K is at least 2. Source: DINO, section 5.3
  and figure 7 (entropy).
  """
  chex.assert_rank([student_BVK, teacher_BVK, centre_K], [3, 3, 1])
  chex.assert_equal_shape([student_BVK, teacher_BVK], dims=(0, 2))
  if centre_K.size < 2:
    raise ValueError(
      'the entropy of a single output says nothing: the head needs at least two outputs'
    )
  pairs_VQ = cross_view_pairs(student_BVK.shape[1], teacher_BVK.shape[1])
  student_BVK = jax.lax.stop_gradient(student_BVK).astype(jnp.float32)
  student_probability_BVK = jax.nn.softmax(student_BVK / student_temperature, axis=-1)
  teacher_BQK = teacher_probabilities(teacher_BVK, centre_K, teacher_temperature)

  student_best_BV, teacher_best_BQ = (
    jnp.argmax(student_BVK, axis=-1),
    jnp.argmax(teacher_BQK, axis=-1),
  )
  same_BVQ = student_best_BV[:, :, None] == teacher_best_BQ[:, None, :]
  return {
    'teacher_entropy': _entropy_share(teacher_BQK).mean(),
    'teacher_entropy_of_mean': _entropy_share(teacher_BQK.mean(axis=(0, 1))),
    'student_entropy': _entropy_share(student_probability_BVK).mean(),
    'agreement': jnp.sum(same_BVQ & pairs_VQ, axis=(1, 2)).mean(dtype=jnp.float32) / pairs_VQ.sum(),
  }


def _entropy_share(probability: jax.Array) -> jax.Array:
  """Entropy over the last axis as a share of its maximum, ln K; 0 ln 0 is 0."""
  return jax.scipy.special.entr(probability).sum(axis=-1) / np.log(probability.shape[-1])


def reduce_frequency(sum_B: jax.Array, count_B: jax.Array, reduce: str) -> jax.Array:
  """One number from each image's summed frequency distance and number of masked coefficients.

  MFM pools: one mean over all masked coefficients of the batch. FOLK's RCom masks 0.5-5 % of the
  coefficients and Com the others, so that pooled, RCom's images would hardly count; `per_image`
  takes each image's own mean first.

  Args:
    sum_B: summed distance over the masked coefficients of each image, [B].
    count_B: how many there are, [B], integer or float.
    reduce: 'per_image' or 'pooled'.

  Returns:
    float32 scalar. An image, or a batch, without masked coefficients gives zero.

  Raises:
    UserError: for another `reduce`.

  Source: MFM, its official code (pooled); FOLK leaves it open.
  """
  chex.assert_rank([sum_B, count_B], 1)
  chex.assert_equal_shape([sum_B, count_B])
  if reduce not in REDUCTIONS:
    raise UserError(f'reduce is {reduce!r}, expected one of {", ".join(REDUCTIONS)}')
  sum_B = sum_B.astype(jnp.float32)
  # float32 before the sum: counts of a large batch of large images overflow int32.
  count_B = count_B.astype(jnp.float32)
  if reduce == 'pooled':
    return sum_B.sum() / jnp.maximum(count_B.sum(), 1.0)
  return jnp.mean(sum_B / jnp.maximum(count_B, 1.0))
