"""Clips and captions -> latent records: the VAE and the text encoder run once, here, and never again in training."""

from collections.abc import Iterable
import itertools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import weights
from causvid_jax.data import records
from causvid_jax.data import tokenizer as tokenizer_lib
from causvid_jax.weights import store


class TextEmbedder:
  """Prompts -> embeddings [B, T, D] float32, zero past each prompt; the text encoder and its tokenizer as one."""

  def __init__(self, module, params: Any, tokenizer: tokenizer_lib.Tokenizer, tokens: int):
    self._tokenizer, self._tokens, self._params = tokenizer, tokens, params
    self._apply = jax.jit(lambda params, ids, mask: module.apply({"params": params}, ids, mask))

  def __call__(self, prompts: list[str]) -> jax.Array:
    ids, mask = self._tokenizer(prompts, self._tokens)
    return self._apply(self._params, ids, mask)


def load_embedder(text_encoder: str, tokenizer: str, tokens: int, base: pathlib.Path | None = None) -> TextEmbedder:
  """The embedder of a text encoder's and a tokenizer's folder; `tokens` is the length prompts are padded to."""
  module, params = weights.load(text_encoder, base)
  backend = tokenizer_lib.Tokenizer.from_file(store.resolve(tokenizer, base) / "tokenizer.json")
  return TextEmbedder(module, params, backend, tokens)


def to_unit(video: np.ndarray) -> np.ndarray:
  """uint8 pixels -> float32 in [-1, 1]."""
  return video.astype(np.float32) / 127.5 - 1.0


def to_uint8(video: jax.Array) -> np.ndarray:
  """Float pixels in [-1, 1] (overshoot is cut) -> uint8."""
  return np.asarray(jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5)).astype(np.uint8)


def write_latents(folder: str | os.PathLike, clips: Iterable[dict[str, Any]], vae, vae_params: Any,
                  embed: TextEmbedder, made_by: dict[str, Any], batch_size: int = 16) -> None:
  """Encodes `clips` (dicts of `video` uint8 [F, H, W, 3] and `caption`) into a folder of latent records, float16."""
  encode = jax.jit(lambda params, video: vae.apply({"params": params}, video, method="encode"))
  with records.RecordWriter(folder, "latent", made_by) as writer:
    clips = iter(clips)
    while batch := list(itertools.islice(clips, batch_size)):
      videos = to_unit(np.stack([clip["video"] for clip in batch]))
      videos = np.pad(videos, [(0, batch_size - len(batch))] + [(0, 0)] * 4)  # one compiled shape
      latents = np.asarray(encode(vae_params, videos), np.float16)
      text = np.asarray(embed([clip["caption"] for clip in batch]))
      for i, clip in enumerate(batch):
        writer.write(latents[i], 0.0, text[i], clip["caption"])
