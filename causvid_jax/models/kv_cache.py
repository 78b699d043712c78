"""Keys and values of the past: a ring of constant size for the video, and the prompt's, computed once.

Per layer the ring holds `sink` slots, which keep the first frames for ever, and `window` slots, which keep
the last ones: frame f lives in slot f if f < sink, else in slot sink + (f - sink) % window. Softmax does not
care about the order of keys, so a new frame simply overwrites the one that leaves; nothing is shifted, and
memory and time per chunk never grow. Attention is relative, so only distances must stay in the trained range:
window keys are stored turned (RoPE) to their absolute frame, sink keys unturned in time, and each read turns
the sinks to sit right before the window.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from causvid_jax import errors
from causvid_jax.models import rope


@struct.dataclass
class TextKV:
  """Keys and values of a prompt for the cross-attention of every layer: k, v [L, B, S, N, D]."""
  k: jax.Array
  v: jax.Array


@struct.dataclass
class ChunkKV:
  """Keys and values of a chunk: k, v [L, B, F, T, N, D]; keys are turned by row and column, not by frame."""
  k: jax.Array
  v: jax.Array


@struct.dataclass
class KVCache:
  """The ring: k, v [L, B, sink + window, T, N, D]; `frames` (int32 scalar) counts the frames written."""
  k: jax.Array
  v: jax.Array
  frames: jax.Array
  sink: int = struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    return self.k.shape[2]

  @property
  def window(self) -> int:
    return self.slots - self.sink

  @property
  def filled(self) -> jax.Array:
    """Tokens that hold a frame. Slots fill in order, so they are a prefix."""
    return jnp.minimum(self.frames, self.slots) * self.k.shape[3]


def create(config: Any, batch: int, tokens_per_frame: int, sink_frames: int,
           window_frames: int, dtype: str | None = None) -> KVCache:
  """An empty cache for `batch` streams of a transformer with this `TransformerConfig`, by default in its compute dtype."""
  slots = sink_frames + window_frames
  shape = (config.num_layers, batch, slots, tokens_per_frame, config.num_heads, config.head_dim)
  k, v = (jnp.zeros(shape, dtype or config.dtype) for _ in range(2))
  return KVCache(k=k, v=v, frames=jnp.zeros((), jnp.int32), sink=sink_frames)


def check(cache: KVCache, batch: int, frames: int, tokens: int) -> None:
  """Raises UserError unless a chunk of [batch, frames, tokens] tokens fits the cache."""
  if cache.k.shape[1] != batch:
    raise errors.UserError(f"KV cache: made for a batch of {cache.k.shape[1]}, used with a batch of {batch}")
  if cache.k.shape[3] != tokens:
    raise errors.UserError(f"KV cache: made for {cache.k.shape[3]} tokens a frame, used with {tokens}")
  if cache.window < frames:
    raise errors.UserError(
        f"KV cache: the window of {cache.window} frames must hold a chunk of {frames} frames")


def write(cache: KVCache, chunk: ChunkKV) -> KVCache:
  """The cache after the chunk: its frames take the next positions and overwrite the window's oldest.

  Donate the cache, and the write happens in place.

  Raises:
    UserError: the chunk does not fit the cache (batch, tokens a frame, or more frames than the window).
  """
  batch, frames, tokens, _, head_dim = chunk.k.shape[1:]
  check(cache, batch, frames, tokens)
  positions = cache.frames + jnp.arange(frames, dtype=jnp.int32)
  is_sink = positions < cache.sink
  slots = jnp.where(is_sink, positions, cache.sink + (positions - cache.sink) % cache.window)
  turned = rope.apply(chunk.k, rope.rotations(jnp.where(is_sink, 0, positions), 1, 1, head_dim))
  k, v = cache.k, cache.v
  for i in range(frames):
    # One slice at a time: XLA updates slices in place everywhere, while a scatter is a copy on some backends.
    k = jax.lax.dynamic_update_slice_in_dim(k, turned[:, :, i:i + 1].astype(k.dtype), slots[i], axis=2)
    v = jax.lax.dynamic_update_slice_in_dim(v, chunk.v[:, :, i:i + 1].astype(v.dtype), slots[i], axis=2)
  return cache.replace(k=k, v=v, frames=cache.frames + frames)


def sink_rotation(cache: KVCache) -> rope.Rotation:
  """The turn that puts the sinks right before the window: frame j at j + (frames evicted so far)."""
  evicted = jnp.maximum(cache.frames - cache.slots, 0)
  return rope.rotations(evicted + jnp.arange(cache.sink, dtype=jnp.int32), 1, 1, cache.k.shape[-1])


def read_keys(k: jax.Array, rotation: rope.Rotation) -> jax.Array:
  """One layer's keys [B, S, T, N, D] with the sinks, which come first, turned by `sink_rotation`."""
  sink = rotation[0].shape[0]
  return jnp.concatenate([rope.apply(k[:, :sink], rotation), k[:, sink:]], axis=1)
