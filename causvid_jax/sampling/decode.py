"""Latent chunks -> pixels, as a stream: the VAE's decoder with its cache carried from chunk to chunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class StreamDecoder:
  """Compiled once, decodes any number of streams; with `independent_chunks` every chunk begins a stream of its own."""

  def __init__(self, vae: Any, params: Any, independent_chunks: bool = False):
    self._params = params

    def decode(params, state, latents):
      video, state = vae.apply({"params": params, **state}, latents, method="decode", mutable=["stream"])
      return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), {} if independent_chunks else state

    self._decode = jax.jit(decode, donate_argnums=1)

  def start(self) -> Any:
    """The state before the first chunk of a stream."""
    return {}

  def __call__(self, state: Any, latents: jax.Array) -> tuple[np.ndarray, Any]:
    """Latents [B, k, h, w, C] -> (uint8 [B, F, 8h, 8w, 3], the next state); the first latent frame of a stream is one
    pixel frame, every other one four."""
    video, state = self._decode(self._params, state, latents)
    return np.asarray(video), state

  def clip(self, latents: jax.Array, chunk_frames: int) -> np.ndarray:
    """Decodes whole latents [B, F, h, w, C], a chunk at a time."""
    state, parts = self.start(), []
    for first in range(0, latents.shape[1], chunk_frames):
      part, state = self(state, latents[:, first:first + chunk_frames])
      parts.append(part)
    return np.concatenate(parts, axis=1)
