"""The UMT5 text encoder, and the head that the digit world's own encoder is trained with.

UMT5 is T5 with a relative position bias in every layer: pre-norm blocks whose linear layers have no bias,
attention that is not scaled by 1/sqrt(D), and a gated feed-forward. Attention is written out here because of
the position bias: it serves a few hundred tokens, once a prompt, and needs no kernel.

References: T5 (arXiv 1910.10683, section 2.1), its gated feed-forward (2002.05202), UMT5 (2304.09151).
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import layers


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """Sizes of the encoder.

  Attributes:
    vocab_size: V.
    dim: model dim C, and the size of the text embeddings.
    num_heads: N.
    head_dim: D; N * D need not equal C.
    ffn_dim: hidden dim of the gated feed-forward.
    num_layers: L.
    num_buckets: rows of each position bias table, half for each direction.
    max_distance: from this distance on all positions share the last bucket.
    eps: of every norm.
    dtype: compute dtype; parameters are float32.
  """
  vocab_size: int
  dim: int
  num_heads: int
  head_dim: int
  ffn_dim: int
  num_layers: int
  num_buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  dtype: str = "float32"


PRESETS: dict[str, TextEncoderConfig] = {
    "test": TextEncoderConfig(vocab_size=11, dim=12, num_heads=2, head_dim=4, ffn_dim=20, num_layers=2,
                              num_buckets=8, max_distance=6),
    "digit_world": TextEncoderConfig(vocab_size=64, dim=64, num_heads=4, head_dim=16, ffn_dim=128,
                                     num_layers=2),
    "umt5_xxl": TextEncoderConfig(vocab_size=256_384, dim=4096, num_heads=64, head_dim=64, ffn_dim=10_240,
                                  num_layers=24),
}


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
  """Bucket of every key seen from every query, int32 [query, key] (T5's bidirectional scheme).

  Keys after the query use the upper half of the buckets. In each half the nearer distances have a bucket each
  and the others share buckets that grow geometrically up to `max_distance`.
  """
  offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = num_buckets // 2
  exact = half // 2
  # Counting the edges crossed equals T5's floor of a logarithm. The nudge keeps rounding from moving an edge
  # that is a whole number past the distance that it belongs to.
  steps = np.arange(1, half - exact) / (half - exact)
  edges = exact * (max_distance / exact) ** steps - 1e-9
  distance = np.abs(offsets)
  bucket = np.where(distance < exact, distance, exact + np.searchsorted(edges, distance, side="right"))
  return (bucket + half * (offsets > 0)).astype(np.int32)


def _linear(features: int, names: layers.Names, std: float, dtype: str) -> nn.Dense:
  """A linear layer without a bias, normal with T5's standard deviation."""
  init = nn.with_logical_partitioning(nn.initializers.normal(std), names)
  return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init)


class RMSNorm(nn.Module):
  """T5's norm over the model dim: no mean, no bias; float32 inside, keeps the dtype."""
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
    scale = self.param("scale", init, x.shape[-1:], jnp.float32)
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


class SelfAttention(nn.Module):
  """Attention with a learned bias for each relative position and no 1/sqrt(D)."""
  config: TextEncoderConfig

  def setup(self):
    c = self.config
    inner = c.num_heads * c.head_dim
    # The small standard deviation of q stands in for the missing 1/sqrt(D).
    self.q = _linear(inner, ("embed", "heads"), (c.dim * c.head_dim) ** -0.5, c.dtype)
    self.k = _linear(inner, ("embed", "heads"), c.dim ** -0.5, c.dtype)
    self.v = _linear(inner, ("embed", "heads"), c.dim ** -0.5, c.dtype)
    self.o = _linear(c.dim, ("heads", "embed"), inner ** -0.5, c.dtype)
    init = nn.with_logical_partitioning(nn.initializers.normal(c.dim ** -0.5), (None, "heads"))
    self.relative_bias = self.param("relative_bias", init, (c.num_buckets, c.num_heads), jnp.float32)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Tokens [B, T, C], mask [B, T] of the keys -> [B, T, C]."""
    c = self.config
    batch, length, _ = x.shape
    q, k, v = (f(x).reshape(batch, length, c.num_heads, c.head_dim) for f in (self.q, self.k, self.v))
    bias = self.relative_bias[relative_buckets(length, c.num_buckets, c.max_distance)]  # [T, S, N]
    scores = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32) + bias.transpose(2, 0, 1)
    # The lowest finite number, not -inf: a prompt without any token must not become NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return self.o(jnp.einsum("bnts,bsnd->btnd", weights, v).reshape(batch, length, -1))


class GatedFeedForward(nn.Module):
  """wo(gelu(wi_0 x) * wi_1 x), GELU by tanh."""
  config: TextEncoderConfig

  def setup(self):
    c = self.config
    self.wi_0 = _linear(c.ffn_dim, ("embed", "mlp"), c.dim ** -0.5, c.dtype)
    self.wi_1 = _linear(c.ffn_dim, ("embed", "mlp"), c.dim ** -0.5, c.dtype)
    self.wo = _linear(c.dim, ("mlp", "embed"), c.ffn_dim ** -0.5, c.dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.wo(nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class EncoderBlock(nn.Module):
  """Self-attention and feed-forward, each after a norm and added to the residual."""
  config: TextEncoderConfig

  def setup(self):
    c = self.config
    self.norm1, self.norm2 = RMSNorm(c.eps), RMSNorm(c.eps)
    self.attn = SelfAttention(c)
    self.ffn = GatedFeedForward(c)

  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    x = x + self.attn(self.norm1(x), mask)
    return x + self.ffn(self.norm2(x)), None


class UMT5Encoder(nn.Module):
  """Token ids to text embeddings."""
  config: TextEncoderConfig

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
    self.token_embed = nn.Embed(c.vocab_size, c.dim, embedding_init=init)
    stack = nn.scan(EncoderBlock, variable_axes={"params": 0}, split_rngs={"params": True},
                    in_axes=nn.broadcast, length=c.num_layers, metadata_params={nn.PARTITION_NAME: "layers"})
    self.blocks = stack(c)
    self.norm = RMSNorm(c.eps)

  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Encodes prompts.

    Args:
      ids: token ids int32 [B, T].
      mask: [B, T], nonzero on the tokens of the prompt; no other token is attended.

    Returns:
      Embeddings [B, T, dim] in the compute dtype, zero past the mask, as Wan 2.1 expects them.
    """
    mask = mask.astype(bool)
    x = self.token_embed(ids).astype(self.config.dtype)  # a cast of the rows that are looked up, not of the whole table
    x, _ = self.blocks(x, mask)
    x = self.norm(x)
    return x * mask[..., None].astype(x.dtype)


class ContextHead(nn.Module):
  """Predicts the tokens at `offsets` around a position from its embedding: [B, T, C] -> [B, T, O, V]."""
  vocab_size: int
  offsets: tuple[int, ...]

  @nn.compact
  def __call__(self, embeddings: jax.Array) -> jax.Array:
    logits = layers.dense(len(self.offsets) * self.vocab_size, ("embed", "vocab"), jnp.float32)(embeddings)
    return logits.reshape(*embeddings.shape[:-1], len(self.offsets), self.vocab_size)
