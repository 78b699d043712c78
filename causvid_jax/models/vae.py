"""The Wan 2.1 video VAE: a 3D causal autoencoder, 4x in time and 8x8 in space, whole-clip or streamed.

Every temporal convolution looks only at the past, so a clip may be coded in pieces. A piece continues the one before
through the Flax collection `stream`, an explicit pytree that holds the last input frames of each temporal layer:

    z, state = vae.apply({"params": p}, video[:, :1], method="encode", mutable=["stream"])
    z, state = vae.apply({"params": p, **state}, video[:, 1:9], method="encode", mutable=["stream"])

The first piece of a stream holds 1 + 4n frames (1 + n latent frames), each later one 4n (n): the first latent frame
stands for one pixel frame. Without `stream` a call codes the clip from its beginning.

Reference: Wan 2.1 technical report, section 4.1; `wan/modules/vae.py` of Wan-Video/Wan2.1.
"""

from collections.abc import Callable
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE; `latent_mean` and `latent_std` (one value a channel) normalise the latents."""
  dim: int = 96
  z_dim: int = 16
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latent_mean: tuple[float, ...] = (0.0,)
  latent_std: tuple[float, ...] = (1.0,)
  dtype: str = "float32"

  @property
  def time_factor(self) -> int:
    return 2 ** sum(self.temporal_downsample)

  @property
  def space_factor(self) -> int:
    return 2 ** (len(self.multipliers) - 1)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Shape [F, H, W, C] of the latents of a clip of 1 + 4n frames (a remainder is not coded)."""
    return (1 + (frames - 1) // self.time_factor, height // self.space_factor, width // self.space_factor, self.z_dim)

  def pixel_frames(self, latent_frames: int) -> int:
    """Pixel frames of a clip of `latent_frames` that starts a stream."""
    return 1 + (latent_frames - 1) * self.time_factor


PRESETS = {
    "wan": VAEConfig(
        latent_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        latent_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)),
    "digit_world": VAEConfig(dim=8, multipliers=(1, 2, 4, 8), num_res_blocks=1),
    "test": VAEConfig(dim=4, z_dim=4, num_res_blocks=1),
}


def _image_kernel(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """A fan-in image kernel on the latest frame and zeros on the past: the video network begins as an image network."""
  latest = nn.initializers.lecun_uniform()(key, shape[1:], dtype)
  return jnp.zeros(shape, dtype).at[-1].set(latest)


def _copy_kernel(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Copies the latest frame into each group of output channels: resampling in time begins as repetition."""
  del key
  copies = shape[-1] // shape[-2]
  return jnp.zeros(shape, dtype).at[-1, 0, 0].set(jnp.tile(jnp.eye(shape[-2], dtype=dtype), (1, copies)))



def _moments_bias(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Mean 0 and log-variance -6: with unit variance the first thousand steps would drown in sampling noise."""
  del key
  return jnp.zeros(shape, dtype).at[shape[0] // 2:].set(-6.0)


def _with_past(module: nn.Module, x: jax.Array, frames: int) -> jax.Array:
  """Prepends the `frames` inputs before `x` (zeros before the beginning) and remembers the last ones for the next piece."""
  if module.has_variable("stream", "past"):
    past = module.get_variable("stream", "past")
  else:
    past = jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:]))
  x = jnp.concatenate([past, x], axis=1)
  if module.is_mutable_collection("stream"):
    module.put_variable("stream", "past", x[:, -frames:])
  return x


class Conv(nn.Module):
  """A convolution [B, F, H, W, C] -> [B, F', H', W', features] with the kernel [time, height, width, in, out].

  It is computed as an image convolution over the time taps laid side by side in the channels: on a CPU that is
  several times faster than a 3D convolution, forward and backward.
  """
  features: int
  kernel: tuple[int, int, int] = (3, 3, 3)
  stride: tuple[int, int] = (1, 1)  # time, space
  dtype: str = "float32"
  kernel_init: Callable[..., jax.Array] = _image_kernel
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x: jax.Array, padding: tuple[int, int] | None = None) -> jax.Array:
    """Convolves over the frames as given (no padding in time); `padding` (before, after) in space, default "same"."""
    init = nn.with_logical_partitioning(self.kernel_init, (None, None, None, "conv_in", "conv_out"))
    kernel = self.param("kernel", init, (*self.kernel, x.shape[-1], self.features)).astype(self.dtype)
    bias = self.param(
        "bias", nn.with_logical_partitioning(self.bias_init, ("conv_out",)), (self.features,)).astype(self.dtype)
    batch, frames = x.shape[:2]
    taps, size, _ = self.kernel
    steps, stride = self.stride
    outputs = (frames - taps) // steps + 1
    pad = (size // 2, size // 2) if padding is None else padding
    x = jnp.concatenate([x[:, tap:tap + steps * (outputs - 1) + 1:steps] for tap in range(taps)], axis=-1)
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]).astype(self.dtype), jnp.concatenate(kernel, axis=2), (stride, stride), (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return (y + bias).reshape(batch, outputs, *y.shape[1:])


class CausalConv(nn.Module):
  """A 3x3x3 convolution that sees the current and the two previous frames."""
  features: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(self.features, dtype=self.dtype, name="conv")(_with_past(self, x, 2))


class ChannelNorm(nn.Module):
  """RMS normalisation over the channels of each pixel, float32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("conv_out",)), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True))
    return (x32 / jnp.maximum(norm, 1e-12) * (math.sqrt(x.shape[-1]) * scale)).astype(x.dtype)


class ResidualBlock(nn.Module):
  features: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = CausalConv(self.features, self.dtype, name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)))
    y = CausalConv(self.features, self.dtype, name="conv2")(nn.silu(ChannelNorm(name="norm2")(y)))
    if x.shape[-1] != self.features:
      x = Conv(self.features, (1, 1, 1), dtype=self.dtype, name="shortcut")(x)
    return x + y


class FrameAttention(nn.Module):
  """Single-head self-attention inside every frame."""
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, f, h, w, c = x.shape
    qkv = Conv(3 * c, (1, 1, 1), dtype=self.dtype, name="qkv")(ChannelNorm(name="norm")(x))
    q, k, v = jnp.split(qkv.reshape(b * f, h * w, 1, 3 * c), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return x + Conv(c, (1, 1, 1), dtype=self.dtype, name="out")(y)


class Middle(nn.Module):
  features: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = ResidualBlock(self.features, self.dtype, name="block1")(x)
    x = FrameAttention(self.dtype, name="attention")(x)
    return ResidualBlock(self.features, self.dtype, name="block2")(x)


class Downsample(nn.Module):
  """Halves space and, with `temporal`, time: the first frame of a stream passes, later pairs merge with the frame before."""
  temporal: bool
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(x.shape[-1], (1, 3, 3), (1, 2), self.dtype, name="space")(x, padding=(0, 1))
    if not self.temporal:
      return x
    merge = Conv(x.shape[-1], (3, 1, 1), (2, 1), self.dtype, _copy_kernel, name="time")
    if self.has_variable("stream", "past"):
      return merge(_with_past(self, x, 1))
    if self.is_mutable_collection("stream"):
      self.put_variable("stream", "past", x[:, -1:])
    if x.shape[1] == 1 and not self.is_initializing():
      return x
    return jnp.concatenate([x[:, :1], merge(x)], axis=1)


class Upsample(nn.Module):
  """Doubles space, halves the channels and, with `temporal`, doubles time after the first frame of a stream."""
  temporal: bool
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = x.shape[-1]
    if self.temporal:
      first = 0 if self.has_variable("stream", "past") else 1
      y = _with_past(self, x[:, first:], 2)
      y = Conv(2 * features, (3, 1, 1), dtype=self.dtype, kernel_init=_copy_kernel, name="time")(y)
      b, f, h, w, _ = y.shape
      y = y.reshape(b, f, h, w, 2, features).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, features)
      x = jnp.concatenate([x[:, :first], y], axis=1)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return Conv(features // 2, (1, 3, 3), dtype=self.dtype, name="space")(x)


class Encoder(nn.Module):
  config: VAEConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    x = CausalConv(cfg.dim, cfg.dtype, name="conv_in")(x)
    for i, multiplier in enumerate(cfg.multipliers):
      for j in range(cfg.num_res_blocks):
        x = ResidualBlock(cfg.dim * multiplier, cfg.dtype, name=f"stage{i}_block{j}")(x)
      if i < len(cfg.temporal_downsample):
        x = Downsample(cfg.temporal_downsample[i], cfg.dtype, name=f"stage{i}_down")(x)
    x = Middle(x.shape[-1], cfg.dtype, name="middle")(x)
    x = nn.silu(ChannelNorm(name="norm_out")(x))
    return CausalConv(2 * cfg.z_dim, cfg.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  config: VAEConfig

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    cfg = self.config
    x = CausalConv(cfg.dim * cfg.multipliers[-1], cfg.dtype, name="conv_in")(z)
    x = Middle(x.shape[-1], cfg.dtype, name="middle")(x)
    for i, multiplier in enumerate(cfg.multipliers[::-1]):
      for j in range(cfg.num_res_blocks + 1):
        x = ResidualBlock(cfg.dim * multiplier, cfg.dtype, name=f"stage{i}_block{j}")(x)
      if i < len(cfg.temporal_downsample):
        x = Upsample(cfg.temporal_downsample[::-1][i], cfg.dtype, name=f"stage{i}_up")(x)
    x = nn.silu(ChannelNorm(name="norm_out")(x))
    return CausalConv(3, cfg.dtype, name="conv_out")(x)


class WanVAE(nn.Module):
  """The VAE; see the module's page for streaming."""
  config: VAEConfig

  def setup(self):
    cfg = self.config
    self.encoder = Encoder(cfg)
    self.decoder = Decoder(cfg)
    self.to_moments = Conv(2 * cfg.z_dim, (1, 1, 1), dtype=cfg.dtype, bias_init=_moments_bias)
    self.from_latents = Conv(cfg.z_dim, (1, 1, 1), dtype=cfg.dtype)

  def __call__(self, video: jax.Array) -> jax.Array:
    """Reconstructs video [B, F, H, W, 3] in [-1, 1] from the mean of its latents."""
    return self.decode(self.encode(video))

  def moments(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the (unnormalised) latents, each [B, F', H/8, W/8, z] float32."""
    mean, log_var = jnp.split(self.to_moments(self.encoder(video)).astype(jnp.float32), 2, axis=-1)
    return mean, log_var

  def encode(self, video: jax.Array) -> jax.Array:
    """Video [B, 1 + 4n, H, W, 3] in [-1, 1] -> normalised latents [B, 1 + n, H/8, W/8, z] (the mean), float32."""
    mean, _ = self.moments(video)
    return (mean - jnp.asarray(self.config.latent_mean)) / jnp.asarray(self.config.latent_std)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Normalised latents [B, 1 + n, h, w, z] -> video [B, 1 + 4n, 8h, 8w, 3] float32, in [-1, 1] up to overshoot."""
    z = latents * jnp.asarray(self.config.latent_std) + jnp.asarray(self.config.latent_mean)
    return self.decoder(self.from_latents(z.astype(self.config.dtype))).astype(jnp.float32)
