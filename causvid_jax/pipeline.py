"""`Pipeline`: prompts in, video out; the Python API over weights, sampling and the VAE."""

from collections.abc import Iterator, Sequence
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import latents as latents_lib
from causvid_jax.sampling import bidirectional
from causvid_jax.sampling import build
from causvid_jax.sampling import decode


class Pipeline:
  """Text to video with a causal student (streamed, any length) or a bidirectional teacher (whole clips).

  Attributes:
    fps: frame rate of the videos.
    clip_frames: pixel frames of a training clip.
    seconds: of the last call: `first_frames` until the first frames were there, `total` until the last.
  """

  def __init__(self, module: Any, params: Any, vae: Any, vae_params: Any, embed: latents_lib.TextEmbedder,
               description: dict[str, Any]):
    self.module, self.params, self.vae = module, params, vae
    self.sampler = build.sampler(module, description["sampler"])
    self.fps, self.clip_frames = description["fps"], description["clip_frames"]
    self.seconds: dict[str, float] = {}
    self._embed, self._null_text = embed, embed([description["negative_prompt"]])
    self._coding = latents_lib.ClipCoding(
        self.clip_frames, *description["frame_size"], description["chunk_frames"], description["independent_chunks"])
    self._frame_shape = self._coding.latent_shape(vae.config)[1:]
    self._decoder = decode.StreamDecoder(vae, vae_params, self._coding.independent_chunks)
    if self.causal:
      self._start = jax.jit(self.sampler.start, static_argnames="frame_shape")
      self._step = jax.jit(self.sampler.step, donate_argnums=1)
      self._scan = jax.jit(self.sampler.sample, static_argnames=("num_chunks", "frame_shape"))
    else:
      self._sample = jax.jit(self.sampler.sample)

  @classmethod
  def from_checkpoint(cls, path: str | os.PathLike = "digit_world") -> "Pipeline":
    """Loads a pipeline folder (a run's `export/`), or the name of one that ships: "digit_world", "digit_world/teacher"."""
    folder, description = weights.load_pipeline(path)
    module, params = weights.load(description["transformer"], folder)
    vae, vae_params = weights.load(description["vae"], folder)
    embed = latents_lib.load_embedder(
        description["text_encoder"], description["tokenizer"], module.config.text_tokens, folder)
    return cls(module, params, vae, vae_params, embed, description)

  @property
  def causal(self) -> bool:
    return not isinstance(self.sampler, bidirectional.BidirectionalSampler)

  def __call__(self, prompt: str | Sequence[str], num_frames: int | None = None, seed: int = 0) -> np.ndarray:
    """Generates uint8 [F, H, W, 3] for a prompt, or [B, F, H, W, 3] for a list of them.

    Args:
      prompt: what to show.
      num_frames: pixel frames, at least 1; default a training clip.
      seed: of all noise; the same seed and prompts give the same video.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    num_frames = self.clip_frames if num_frames is None else num_frames
    if num_frames < 1:
      raise errors.UserError(f"num_frames = {num_frames}: expected at least 1")
    call = self._call_causal if self.causal else self._call_teacher
    video = call(prompts, self._coding.latent_frames(self.vae.config, num_frames), seed)[:, :num_frames]
    return video[0] if isinstance(prompt, str) else video

  def stream(self, prompt: str, seed: int = 0) -> Iterator[np.ndarray]:
    """Endlessly yields uint8 chunks [F, H, W, 3], each as soon as it is made; the first is 3 frames shorter."""
    return (chunk[0] for chunk in self.stream_batch([prompt], seed))

  def stream_batch(self, prompts: Sequence[str], seed: int = 0) -> Iterator[np.ndarray]:
    """`stream` for several prompts at once: chunks [B, F, H, W, 3]."""
    if not self.causal:
      raise errors.UserError("this checkpoint is bidirectional and cannot stream: expected a causal one")
    return self._stream(prompts, seed)

  def _stream(self, prompts: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    text = self._embed(list(prompts))
    cache, text_kv = self._start(self.params, text, self._null_text, frame_shape=self._frame_shape)
    key = jax.random.key(seed)
    zeros = jnp.zeros((len(prompts), self.sampler.chunk_frames, *self._frame_shape))
    state, chunk = self._decoder.start(), 0
    while True:
      cache, latents = self._step(self.params, cache, text_kv, jax.random.fold_in(key, chunk), zeros)
      frames, state = self._decoder(state, latents)
      yield frames
      chunk += 1

  def latents(self, prompts: Sequence[str], num_chunks: int, seed: int = 0) -> jax.Array:
    """Latents [B, num_chunks k, H, W, C] of a causal model, by one compiled scan."""
    return self._scan(self.params, self._embed(list(prompts)), self._null_text, jax.random.key(seed),
                      num_chunks=num_chunks, frame_shape=self._frame_shape)

  def _call_causal(self, prompts: list[str], latent_frames: int, seed: int) -> np.ndarray:
    start = time.perf_counter()
    parts = []
    stream = self.stream_batch(prompts, seed)
    for _ in range(math.ceil(latent_frames / self.sampler.chunk_frames)):
      parts.append(next(stream))
      self.seconds = {"total": time.perf_counter() - start, "first_frames": self.seconds.get("first_frames", 0.0)}
      if len(parts) == 1:
        self.seconds["first_frames"] = self.seconds["total"]
    return np.concatenate(parts, axis=1)

  def _call_teacher(self, prompts: list[str], latent_frames: int, seed: int) -> np.ndarray:
    start = time.perf_counter()
    noise = jax.random.normal(jax.random.key(seed), (len(prompts), latent_frames, *self._frame_shape))
    latents = self._sample(self.params, noise, self._embed(prompts), self._null_text)
    video = self._decoder.clip(latents, self._coding.chunk_frames)
    self.seconds = dict.fromkeys(("first_frames", "total"), time.perf_counter() - start)
    return video
