"""Tests of unmasked attention against dense masks in NumPy."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import attention


ATTEND = jax.jit(attention.attend)


def _reference(q, k, v, mask):
  """Masked softmax attention in float64; mask [T, S], true where a query sees a key."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
  weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
  return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def _random(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


class AttentionTest(absltest.TestCase):

  def test_attend_matches_reference(self):
    q, k, v = _random((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    np.testing.assert_allclose(ATTEND(q, k, v), _reference(q, k, v, np.ones((5, 7))), atol=1e-5)

  def test_lengths_hide_the_rest(self):
    q, k, v = _random((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    scalar = ATTEND(q, k, v, jnp.int32(4))
    np.testing.assert_allclose(scalar, ATTEND(q, k[:, :4], v[:, :4]), atol=1e-6)
    each = ATTEND(q, k, v, jnp.array([4, 6]))
    np.testing.assert_allclose(each[0], scalar[0], atol=1e-6)
    np.testing.assert_allclose(each[1], ATTEND(q, k[:, :6], v[:, :6])[1], atol=1e-6)

  def test_block_causal_matches_dense_mask(self):
    q, k, v = _random(*[(2, 6, 3, 8)] * 3)
    block_causal = jax.jit(attention.block_causal, static_argnums=3)
    for chunk in (2, 3, 6):
      chunk_of = np.arange(6) // chunk
      mask = chunk_of[None, :] <= chunk_of[:, None]
      np.testing.assert_allclose(block_causal(q, k, v, chunk), _reference(q, k, v, mask), atol=1e-5)

  def test_cached_equals_attention_to_the_filled_part(self):
    q, k, v, k_cache, v_cache = _random((2, 4, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8))
    cached = jax.jit(attention.cached)
    for filled in (0, 5, 9):
      keys = np.concatenate([np.asarray(k_cache)[:, :filled], k], axis=1)
      values = np.concatenate([np.asarray(v_cache)[:, :filled], v], axis=1)
      np.testing.assert_allclose(cached(q, k, v, k_cache, v_cache, jnp.int32(filled)),
                                 _reference(q, keys, values, np.ones((4, 4 + filled))), atol=1e-5)

  def test_softmax_is_float32_in_half_precision(self):
    q, k, v = (x.astype(jnp.bfloat16) for x in _random((1, 4, 2, 8), (1, 600, 2, 8), (1, 600, 2, 8)))
    out = ATTEND(q, k, v)
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_allclose(out.astype(jnp.float32), _reference(q, k, v, np.ones((4, 600))), atol=4e-3)

  def test_unknown_kernel_is_loud(self):
    q, k, v = _random(*[(1, 2, 1, 8)] * 3)
    with self.assertRaises(ValueError):
      attention.attend(q, k, v, implementation="nonesuch")


if __name__ == "__main__":
  absltest.main()
