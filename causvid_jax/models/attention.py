"""Attention without masks, and the only file that names a kernel.

Block-causal attention (paper eq. 5) needs no mask: the queries of chunk i attend, unmasked, to every key up
to the end of chunk i. So a static loop over the chunks runs any fused kernel at full speed and skips the
hidden half.
"""

import jax
import jax.numpy as jnp


def _implementation(dtype: jnp.dtype) -> str:
  """The kernel for this dtype on the default backend: cuDNN's flash attention has half precision only."""
  half = dtype in (jnp.bfloat16, jnp.float16)
  return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None,
           implementation: str | None = None) -> jax.Array:
  """Softmax attention, unmasked; the softmax is float32.

  Args:
    q: queries [B, T, N, D].
    k: keys [B, S, N, D].
    v: values [B, S, N, D].
    lengths: how many of the first keys count, int32 [B] or a scalar; None means all.
    implementation: "xla" or "cudnn"; None chooses by dtype and backend. What cannot serve raises.

  Returns:
    [B, T, N, D] in the dtype of q.
  """
  if lengths is not None:
    lengths = jnp.broadcast_to(lengths, q.shape[:1])
  return jax.nn.dot_product_attention(
      q, k, v, key_value_seq_lengths=lengths, implementation=implementation or _implementation(q.dtype))


def block_causal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_tokens: int,
                 implementation: str | None = None) -> jax.Array:
  """Attention of [B, T, N, D] to its own and earlier chunks of `chunk_tokens`, a divisor of T; eq. 5."""
  ends = range(chunk_tokens, q.shape[1] + 1, chunk_tokens)
  chunks = [attend(q[:, end - chunk_tokens:end], k[:, :end], v[:, :end], implementation=implementation)
            for end in ends]
  return jnp.concatenate(chunks, axis=1)


def cached(q: jax.Array, k_new: jax.Array, v_new: jax.Array, k_cache: jax.Array, v_cache: jax.Array,
           filled: jax.Array, implementation: str | None = None) -> jax.Array:
  """Attention of a chunk to itself and to the first `filled` tokens of a cache.

  Args:
    q: queries of the chunk [B, T, N, D].
    k_new: keys of the chunk [B, T, N, D].
    v_new: values of the chunk [B, T, N, D].
    k_cache: earlier keys [B, S, N, D]; their order is free, for softmax does not care.
    v_cache: earlier values [B, S, N, D].
    filled: int32 scalar; the rest of the cache is ignored.
    implementation: see `attend`.

  Returns:
    [B, T, N, D].
  """
  k = jnp.concatenate([k_new, k_cache], axis=1)
  v = jnp.concatenate([v_new, v_cache], axis=1)
  return attend(q, k, v, k_new.shape[1] + filled, implementation)
