"""Parts of the Wan 2.1 transformer: projections, norms, attention layers, embeddings and the output head.

Matrix products run in the compute dtype; norms, modulation, rotary embedding, softmax and the whole time
embedding run in float32. Every parameter names its logical axes, for the sharding rules above to map onto a
mesh.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

Names = tuple[str | None, ...]


def dense(features: int, names: Names, dtype: jnp.dtype,
          init: nn.initializers.Initializer = nn.initializers.xavier_uniform()) -> nn.Dense:
  """A linear layer with a bias whose kernel [in, out] has the logical axes `names`."""
  return nn.Dense(
      features, dtype=dtype,
      kernel_init=nn.with_logical_partitioning(init, names),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), names[1:]))


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """LayerNorm over the last axis without parameters; float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float,
                   dtype: jnp.dtype) -> jax.Array:
  """LN(x) * (1 + scale) + shift in float32: tokens [B, F, T, C], a shift and a scale a frame [B, F, C]."""
  return (layer_norm(x, eps) * (1 + scale[:, :, None]) + shift[:, :, None]).astype(dtype)


def gated_add(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
  """x + gate * y for tokens [B, F, T, C] and one gate a frame [B, F, C], in float32; keeps x's dtype."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate[:, :, None]).astype(x.dtype)


def modulation_table(module: nn.Module, rows: int, dim: int) -> jax.Array:
  """A learned table [rows, dim], added to the projected time embedding; normal / sqrt(dim), as in Wan."""
  init = nn.with_logical_partitioning(nn.initializers.normal(dim ** -0.5), (None, "embed"))
  return module.param("modulation", init, (rows, dim), jnp.float32)


class AffineLayerNorm(nn.Module):
  """LayerNorm with a learned scale and bias; float32 inside, keeps the dtype."""
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    scale = self.param("scale", nn.with_logical_partitioning(ones, ("embed",)), x.shape[-1:])
    bias = self.param("bias", nn.with_logical_partitioning(zeros, ("embed",)), x.shape[-1:])
    return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
  """RMSNorm with a learned scale over the full model dim, before the split into heads; float32 inside."""
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones = nn.initializers.ones_init()
    scale = self.param("scale", nn.with_logical_partitioning(ones, ("heads",)), x.shape[-1:])
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


class Attention(nn.Module):
  """The projections of self-attention and of cross-attention; which tokens meet is the caller's choice."""
  dim: int
  num_heads: int
  eps: float
  dtype: jnp.dtype

  def setup(self):
    self.q, self.k, self.v = (dense(self.dim, ("embed", "heads"), self.dtype) for _ in range(3))
    self.o = dense(self.dim, ("heads", "embed"), self.dtype)
    self.norm_q, self.norm_k = RMSNorm(self.eps), RMSNorm(self.eps)

  def queries(self, x: jax.Array) -> jax.Array:
    """[..., C] -> [..., N, D]."""
    return self._heads(self.norm_q(self.q(x)))

  def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., C] -> keys and values, each [..., N, D]."""
    return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

  def merge(self, x: jax.Array) -> jax.Array:
    """[..., N, D] -> [..., C]."""
    return self.o(x.reshape(*x.shape[:-2], self.dim))

  def _heads(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.num_heads, self.dim // self.num_heads)


class FeedForward(nn.Module):
  """Linear, GELU (tanh), Linear: [..., C] -> [..., dim]; the text embedding of Wan has the same form."""
  dim: int
  hidden_dim: int
  dtype: jnp.dtype
  input_axis: str = "embed"
  init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

  def setup(self):
    self.up = dense(self.hidden_dim, (self.input_axis, "mlp"), self.dtype, self.init)
    self.down = dense(self.dim, ("mlp", "embed"), self.dtype, self.init)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(nn.gelu(self.up(x), approximate=True))


class TimeEmbedding(nn.Module):
  """Timesteps [...] in [0, 1000] -> embedding [..., dim], block modulations [..., 6, dim]; all float32."""
  dim: int
  freq_dim: int

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.up = dense(self.dim, (None, "mlp"), jnp.float32, init)
    self.down = dense(self.dim, ("mlp", "embed"), jnp.float32, init)
    self.project = dense(6 * self.dim, ("embed", "mlp"), jnp.float32)

  def __call__(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = self.freq_dim // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    embedding = self.down(nn.silu(self.up(waves)))
    return embedding, self.project(nn.silu(embedding)).reshape(*timesteps.shape, 6, self.dim)


class Head(nn.Module):
  """Tokens [B, F, T, C], time embedding [B, F, C] -> [B, F, T, features], float32; zero at initialisation."""
  dim: int
  features: int
  eps: float

  def setup(self):
    self.modulation = modulation_table(self, 2, self.dim)
    self.out = dense(self.features, ("embed", None), jnp.float32, nn.initializers.zeros_init())

  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    shift, scale = time + self.modulation[0], time + self.modulation[1]
    x = modulated_norm(x, shift, scale, self.eps, jnp.float32)
    return self.out(x)


def patchify(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
  """Latents [B, F, H, W, C] -> tokens [B, F, T, p C], row-major; a patch is ordered by row, column, C."""
  _, ph, pw = patch
  b, f, h, w, c = x.shape
  x = x.reshape(b, f, h // ph, ph, w // pw, pw, c).swapaxes(3, 4)
  return x.reshape(b, f, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(x: jax.Array, patch: tuple[int, int, int], height: int, width: int) -> jax.Array:
  """The inverse of `patchify`, for latents of `height` x `width`."""
  _, ph, pw = patch
  b, f = x.shape[:2]
  x = x.reshape(b, f, height // ph, width // pw, ph, pw, -1).swapaxes(3, 4)
  return x.reshape(b, f, height, width, -1)
