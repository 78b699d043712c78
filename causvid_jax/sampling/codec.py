"""Chunks between latents and pixels, as streams: the VAE's two halves with their caches carried from chunk to chunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class StreamDecoder:
  """Compiled once, decodes any number of streams; with `independent_chunks` every chunk begins a stream of its own."""

  def __init__(self, vae: Any, params: Any, independent_chunks: bool = False):
    self._params = params
    self._config, self._independent = vae.config, independent_chunks

    def decode(params, state, latents):
      video, state = vae.apply({"params": params, **state}, latents, method="decode", mutable=["stream"])
      return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), {} if independent_chunks else state

    self._decode = jax.jit(decode, donate_argnums=1)

  def chunk_pixels(self, chunk_frames: int, first: bool) -> int:
    """Pixel frames of a chunk of latent frames, the `first` of a stream or a later one."""
    return self._config.pixel_frames(chunk_frames) if first or self._independent else (
        self._config.time_factor * chunk_frames)

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


class StreamEncoder:
  """The way back: pixel chunks of a source video, or an image, to clean latents."""

  def __init__(self, vae: Any, params: Any, independent_chunks: bool = False):
    self._params = params

    def encode(params, state, video):
      video = video.astype(jnp.float32) / 127.5 - 1.0
      latents, state = vae.apply({"params": params, **state}, video, method="encode", mutable=["stream"])
      return latents, {} if independent_chunks else state

    self._encode = jax.jit(encode, donate_argnums=1)

  def __call__(self, state: Any, video: np.ndarray) -> tuple[jax.Array, Any]:
    """uint8 [B, F, 8h, 8w, 3] -> (latents [B, k, h, w, C], the next state), from the state {} on; F as the decoder's."""
    return self._encode(self._params, state, video)
