"""Tests of unmasked attention against dense masks in NumPy."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import attention


def _reference(q, k, v, mask):
  """Masked softmax attention in float64; mask [T, S], true where a query sees a key."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
  weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
  return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def _random(*shapes):
  return [jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes)]


class AttentionTest(absltest.TestCase):

  def test_attend_matches_reference(self):
    q, k, v = _random((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    np.testing.assert_allclose(attention.attend(q, k, v), _reference(q, k, v, np.ones((5, 7))), atol=1e-5)

  def test_lengths_hide_the_rest(self):
    q, k, v = _random((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    scalar = attention.attend(q, k, v, jnp.int32(4))
    np.testing.assert_allclose(scalar, attention.attend(q, k[:, :4], v[:, :4]), atol=1e-6)
    each = attention.attend(q, k, v, jnp.array([4, 6]))
    np.testing.assert_allclose(each[0], scalar[0], atol=1e-6)
    np.testing.assert_allclose(each[1], attention.attend(q, k[:, :6], v[:, :6])[1], atol=1e-6)

  def test_block_causal_matches_dense_mask(self):
    q, k, v = _random(*[(2, 12, 3, 8)] * 3)
    for chunk in (1, 3, 4, 12):
      chunk_of = np.arange(12) // chunk
      mask = chunk_of[None, :] <= chunk_of[:, None]
      np.testing.assert_allclose(attention.block_causal(q, k, v, chunk), _reference(q, k, v, mask), atol=1e-5)

  def test_cached_equals_attention_to_the_filled_part(self):
    q, k, v, k_cache, v_cache = _random((2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8))
    cached = jax.jit(attention.cached)
    for filled in (0, 5, 9):
      keys = jnp.concatenate([k_cache[:, :filled], k], axis=1)
      values = jnp.concatenate([v_cache[:, :filled], v], axis=1)
      np.testing.assert_allclose(cached(q, k, v, k_cache, v_cache, jnp.int32(filled)),
                                 _reference(q, keys, values, np.ones((4, 4 + filled))), atol=1e-5)

  def test_softmax_is_float32_in_half_precision(self):
    q, k, v = (x.astype(jnp.bfloat16) for x in _random((1, 4, 2, 8), (1, 600, 2, 8), (1, 600, 2, 8)))
    out = attention.attend(q, k, v)
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_allclose(out.astype(jnp.float32), _reference(q, k, v, np.ones((4, 600))), atol=4e-3)

  def test_unknown_kernel_is_loud(self):
    q, k, v = _random(*[(1, 2, 1, 8)] * 3)
    with self.assertRaises(ValueError):
      attention.attend(q, k, v, implementation="nonesuch")


if __name__ == "__main__":
  absltest.main()
