"""Clips and captions -> latent records: the VAE and the text encoder run once, here, and never again in training."""

from collections.abc import Callable, Iterable
import dataclasses
import itertools
import math
import os
import pathlib
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import records
from causvid_jax.data import tokenizer as tokenizer_lib
from causvid_jax.models import vae as vae_lib
from causvid_jax.weights import store


class TextEmbedder:
  """Prompts -> embeddings [B, T, D] float32, zero past each prompt; the text encoder and its tokenizer as one."""

  def __init__(self, module, params: Callable[[], Any], tokenizer: tokenizer_lib.Tokenizer, tokens: int,
               jit: Callable[..., Any] = jax.jit):
    """`params` is called for each batch, so that its owner may load and free them; `tokens` is the padded length."""
    self._tokenizer, self._tokens, self._params = tokenizer, tokens, params
    self._apply = jit(lambda params, ids, mask: module.apply({"params": params}, ids, mask))

  def __call__(self, prompts: list[str]) -> jax.Array:
    ids, mask = self._tokenizer(prompts, self._tokens)
    return self._apply(self._params(), ids, mask)


def load_embedder(text_encoder: str, tokenizer: str, tokens: int, base: pathlib.Path | None = None) -> TextEmbedder:
  """The embedder of a text encoder's and a tokenizer's folder; `tokens` is the length prompts are padded to."""
  module, params = weights.load(text_encoder, base)
  backend = tokenizer_lib.Tokenizer.from_file(store.resolve(tokenizer, base) / "tokenizer.json")
  return TextEmbedder(module, lambda: params, backend, tokens)


def to_unit(video: np.ndarray) -> np.ndarray:
  """uint8 pixels -> float32 in [-1, 1]."""
  return video.astype(np.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> np.ndarray:
  """Float pixels in [-1, 1] (overshoot is cut) -> uint8."""
  return np.asarray(jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ClipCoding:
  """How clips become latents, and back.

  Attributes:
    frames: pixel frames of a clip.
    height: pixels.
    width: pixels.
    chunk_frames: latent frames of a chunk.
    independent_chunks: whether the VAE codes every chunk on its own, each beginning with a latent frame for a single
      pixel frame (the paper's setting), rather than the clip as one stream.
  """
  frames: int
  height: int
  width: int
  chunk_frames: int
  independent_chunks: bool = False

  def chunk_pixels(self, vae: vae_lib.VAEConfig) -> int:
    """Pixel frames of a chunk that is coded on its own."""
    return vae.pixel_frames(self.chunk_frames)

  def latent_shape(self, vae: vae_lib.VAEConfig) -> tuple[int, int, int, int]:
    """[F, H, W, C] of a clip."""
    frames, *rest = vae.latent_shape(self.frames, self.height, self.width)
    if self.independent_chunks:
      frames = self.frames // self.chunk_pixels(vae) * self.chunk_frames
    if frames % self.chunk_frames:
      raise errors.UserError(f"chunk_frames = {self.chunk_frames} does not divide the clip's {frames} latent frames"
                             f" ({self.frames} pixel frames)")
    return frames, *rest

  def latent_frames(self, vae: vae_lib.VAEConfig, frames: int) -> int:
    """The fewest latent frames that decode to at least `frames` pixel frames."""
    if self.independent_chunks:
      return math.ceil(frames / self.chunk_pixels(vae)) * self.chunk_frames
    return 1 + math.ceil((frames - 1) / vae.time_factor)

  def encode(self, vae: Any, params: Any, video: jax.Array) -> jax.Array:
    """Video [B, F, H, W, 3] in [-1, 1] -> latents; for `jax.jit`."""
    encode = lambda x: vae.apply({"params": params}, x, method="encode")
    if not self.independent_chunks:
      return encode(video)
    size = self.chunk_pixels(vae.config)
    chunks = einops.rearrange(video[:, :video.shape[1] // size * size], "b (n f) h w c -> (b n) f h w c", f=size)
    return einops.rearrange(encode(chunks), "(b n) f h w c -> b (n f) h w c", b=video.shape[0])


def write_latents(folder: str | os.PathLike, clips: Iterable[dict[str, Any]], vae, vae_params: Any, coding: ClipCoding,
                  embed: TextEmbedder, made_by: dict[str, Any], batch_size: int = 16) -> None:
  """Encodes `clips` (dicts of `video` uint8 [F, H, W, 3] and `caption`) into a folder of latent records, float16."""
  encode = jax.jit(lambda params, video: coding.encode(vae, params, video))
  with records.RecordWriter(folder, "latent", made_by) as writer:
    clips = iter(clips)
    while batch := list(itertools.islice(clips, batch_size)):
      videos = to_unit(np.stack([clip["video"] for clip in batch]))
      videos = np.pad(videos, [(0, batch_size - len(batch))] + [(0, 0)] * 4)  # one compiled shape
      latents = np.asarray(encode(vae_params, videos), np.float16)
      text = np.asarray(embed([clip["caption"] for clip in batch]))
      for i, clip in enumerate(batch):
        writer.write(latents[i], 0.0, text[i], clip["caption"])
