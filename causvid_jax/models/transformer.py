"""The Wan 2.1 text-to-video transformer: one model for the bidirectional teacher and the causal student.

`WanTransformer` predicts the flow of noisy latents with one timestep a frame. Called on a whole clip it
attends in both directions, or, given `chunk_frames`, block-causally (paper eq. 5). `extend` runs the next
chunk of a stream on a KV cache with the same blocks; only the source of keys and values differs.

Reference: Wan 2.1 technical report, section 4.2; `wan/modules/model.py` of Wan-Video/Wan2.1.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from causvid_jax import errors
from causvid_jax.models import attention
from causvid_jax.models import kv_cache
from causvid_jax.models import layers
from causvid_jax.models import rope

_REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Queries, keys, values [B, F, T, N, D] -> attended values [B, F T, N, D], and what is kept of the layer.
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes of the transformer.

  Attributes:
    dim: model dim C; num_heads divides it.
    ffn_dim: hidden dim of the feed-forward layers.
    num_heads: N.
    num_layers: L.
    patch: latent frames (always 1), rows and columns of one token.
    in_channels: channels of the input latents.
    out_channels: channels of the prediction.
    freq_dim: size of the sinusoidal timestep features.
    text_dim: size of the text embeddings.
    text_tokens: text tokens of a prompt, padding included; all are attended.
    eps: of every norm.
    remat: what the backward pass recomputes: "none", "full" (whole blocks) or "dots" (all but linear layers).
    dtype: compute dtype; parameters are float32.
    attention: the kernel (see `attention.attend`); None chooses by dtype and backend.
  """
  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  patch: tuple[int, int, int] = (1, 2, 2)
  in_channels: int = 16
  out_channels: int = 16
  freq_dim: int = 256
  text_dim: int = 4096
  text_tokens: int = 512
  eps: float = 1e-6
  remat: str = "none"
  dtype: str = "float32"
  attention: str | None = None

  def __post_init__(self):
    if self.dim % (2 * self.num_heads):
      raise errors.UserError(
          f"transformer: dim {self.dim} must split into {self.num_heads} heads of even size")
    if self.remat not in _REMAT_POLICIES:
      raise errors.UserError(
          f"transformer: remat is {self.remat!r}, expected one of {', '.join(_REMAT_POLICIES)}")

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  def tokens_per_frame(self, height: int, width: int) -> int:
    """Tokens T of a latent frame of height x width."""
    return (height // self.patch[1]) * (width // self.patch[2])


PRESETS: dict[str, TransformerConfig] = {
    "test": TransformerConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, freq_dim=16,
        text_dim=8, text_tokens=5),
    # On CPU it is faster to recompute a small model's elementwise work than to store it: a third off a step.
    "digit_world": TransformerConfig(
        dim=192, ffn_dim=768, num_heads=6, num_layers=6, freq_dim=64, text_dim=64, text_tokens=24,
        remat="dots"),
    "wan_1_3b": TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan_14b": TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}


class Block(nn.Module):
  """Self-attention, cross-attention and feed-forward, with six modulations a frame."""
  config: TransformerConfig

  def setup(self):
    c = self.config
    self.modulation = layers.modulation_table(self, 6, c.dim)
    self.self_attn = layers.Attention(c.dim, c.num_heads, c.eps, c.dtype)
    self.norm3 = layers.AffineLayerNorm(c.eps)
    self.cross_attn = layers.Attention(c.dim, c.num_heads, c.eps, c.dtype)
    self.ffn = layers.FeedForward(c.dim, c.ffn_dim, c.dtype)

  def text_kv(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embedded text [B, S, C] -> keys and values of the cross-attention [B, S, N, D]."""
    return self.cross_attn.keys_values(text)

  def __call__(self, x: jax.Array, time: jax.Array, text: kv_cache.TextKV, mix: Mix) -> tuple[jax.Array, Any]:
    """Tokens [B, F, T, C], modulations [B, F, 6, C], one layer's text -> tokens, and what `mix` keeps."""
    c = self.config
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.moveaxis(self.modulation + time, 2, 0)
    y = layers.modulated_norm(x, shift_a, scale_a, c.eps, c.dtype)
    y, kept = mix(self.self_attn.queries(y), *self.self_attn.keys_values(y))
    x = layers.gated_add(x, self.self_attn.merge(y).reshape(x.shape), gate_a)
    q = _flat(self.cross_attn.queries(self.norm3(x)))
    y = attention.attend(q, text.k, text.v, implementation=c.attention)
    x = x + self.cross_attn.merge(y).reshape(x.shape)
    y = layers.modulated_norm(x, shift_f, scale_f, c.eps, c.dtype)
    return layers.gated_add(x, self.ffn(y), gate_f), kept


class WanTransformer(nn.Module):
  """Predicts the flow v = eps - x_0 of latents [B, F, H, W, C], given timesteps and embedded text."""
  config: TransformerConfig

  def setup(self):
    c = self.config
    self.patch_embed = layers.dense(c.dim, (None, "embed"), c.dtype)
    self.text_embed = layers.FeedForward(c.dim, c.dim, c.dtype, "text_embed", nn.initializers.normal(0.02))
    self.time_embed = layers.TimeEmbedding(c.dim, c.freq_dim)
    self.blocks = Block(c)
    self.head = layers.Head(c.dim, c.patch[1] * c.patch[2] * c.out_channels, c.eps)

  def __call__(self, latents: jax.Array, timesteps: jax.Array, text: jax.Array,
               chunk_frames: int | None = None) -> jax.Array:
    """The flow of a whole clip.

    Args:
      latents: noisy latents [B, F, H, W, C].
      timesteps: [B, F], in [0, 1000].
      text: text embeddings [B, S, text_dim], zero past the prompt; all S tokens are attended.
      chunk_frames: k of the block-causal mask (paper eq. 5); None attends in both directions.

    Returns:
      [B, F, H, W, out_channels], float32.

    Raises:
      UserError: `chunk_frames` does not divide F, or H x W is no multiple of the patch.
    """
    frames = latents.shape[1]
    chunk_frames = frames if chunk_frames is None else chunk_frames
    if chunk_frames < 1 or frames % chunk_frames:
      raise errors.UserError(
          f"chunk_frames: {chunk_frames} does not divide the clip's {frames} latent frames")
    height, width = self._grid(latents)
    rotation = rope.rotations(jnp.arange(frames), height, width, self.config.head_dim)

    def mix(_, q, k, v):
      q, k, v = _flat(rope.apply(q, rotation)), _flat(rope.apply(k, rotation)), _flat(v)
      out = attention.block_causal(q, k, v, chunk_frames * height * width, self.config.attention)
      return out, None

    return self._run(latents, timesteps, self.encode_text(text), mix)[0]

  def encode_text(self, text: jax.Array) -> kv_cache.TextKV:
    """Text embeddings [B, S, text_dim] -> keys and values of every cross-attention, k, v [L, B, S, N, D]."""
    text = self.text_embed(text)
    _, (k, v) = self._over_layers(lambda block, carry, _: (carry, block.text_kv(text)), None, None)
    return kv_cache.TextKV(k=k, v=v)

  def extend(self, latents: jax.Array, timesteps: jax.Array, text_kv: kv_cache.TextKV,
             cache: kv_cache.KVCache) -> tuple[jax.Array, kv_cache.ChunkKV]:
    """The flow of a stream's next chunk, which attends to itself, the sinks and the window (Algorithm 2).

    Args:
      latents: noisy latents of the chunk [B, F, H, W, C].
      timesteps: [B, F], in [0, 1000].
      text_kv: of `encode_text`.
      cache: the frames before; it is only read. `kv_cache.write` adds the chunk once it is clean.

    Returns:
      The flow [B, F, H, W, out_channels], float32, and the keys and values of the chunk.

    Raises:
      UserError: the chunk does not fit the cache.
    """
    height, width = self._grid(latents)
    batch, frames = latents.shape[:2]
    kv_cache.check(cache, batch, frames, height * width)
    if text_kv.k.shape[1] != batch:
      raise errors.UserError(
          f"text keys: made for a batch of {text_kv.k.shape[1]}, used with a batch of {batch}")
    in_space = rope.rotations(jnp.zeros(1, jnp.int32), height, width, self.config.head_dim)
    positions = cache.frames + jnp.arange(frames, dtype=jnp.int32)
    in_time = rope.rotations(positions, 1, 1, self.config.head_dim)
    sink_rotation = kv_cache.sink_rotation(cache)

    def mix(layer, q, k, v):
      k = rope.apply(k, in_space)
      q = rope.apply(rope.apply(q, in_space), in_time)
      k_cache, v_cache = kv_cache.read_keys(layer[0], sink_rotation), layer[1]
      out = attention.cached(
          _flat(q), _flat(rope.apply(k, in_time)), _flat(v), _flat(k_cache), _flat(v_cache), cache.filled,
          self.config.attention)
      return out, kv_cache.ChunkKV(k=k, v=v)

    return self._run(latents, timesteps, text_kv, mix, (cache.k, cache.v))

  def _grid(self, latents: jax.Array) -> tuple[int, int]:
    """Rows and columns of tokens in a frame."""
    (height, width), (_, ph, pw) = latents.shape[2:4], self.config.patch
    if height % ph or width % pw:
      raise errors.UserError(
          f"latents: {height}x{width} is no multiple of the transformer's patch of {ph}x{pw}")
    return height // ph, width // pw

  def _run(self, latents: jax.Array, timesteps: jax.Array, text: kv_cache.TextKV, mix: Callable[..., Any],
           per_layer: Any = None) -> tuple[jax.Array, Any]:
    """Embeds, runs all blocks and projects; `mix` also receives each layer's slice of `per_layer`."""
    c = self.config
    embedding, time = self.time_embed(timesteps)
    x = self.patch_embed(layers.patchify(latents, c.patch))

    def body(block, x, inputs):
      text, layer = inputs
      return block(x, time, text, functools.partial(mix, layer))

    if policy := _REMAT_POLICIES[c.remat]:
      body = nn.remat(body, prevent_cse=False, policy=policy)
    x, kept = self._over_layers(body, x, (text, per_layer))
    return layers.unpatchify(self.head(x, embedding), c.patch, *latents.shape[2:4]), kept

  def _over_layers(self, body: Callable[..., Any], carry: Any, per_layer: Any) -> tuple[Any, Any]:
    """Scans body(block, carry, layer inputs) -> (carry, outputs) over the layers; parameters stack."""
    scan = nn.scan(
        body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"})
    return scan(self.blocks, carry, per_layer)


def _flat(x: jax.Array) -> jax.Array:
  """[B, F, T, N, D] -> [B, F T, N, D]."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])
