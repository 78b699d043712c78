"""`Pipeline`: prompts in, video out; the Python API over weights, sampling and the VAE."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import os
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.data import latents as latents_lib
from causvid_jax.data import tokenizer as tokenizer_lib
from causvid_jax.data import video as video_lib
from causvid_jax.sampling import bidirectional
from causvid_jax.sampling import build
from causvid_jax.sampling import codec
from causvid_jax.sampling import stream as stream_lib
from causvid_jax.weights import formats
from causvid_jax.weights import layouts
from causvid_jax.weights import store


class Pipeline:
  """Text, image or video to video with a causal student (streamed, any length); text to clips with a teacher.

  Weights are read when they are first needed: the prompt is encoded before the transformer is in memory.

  Attributes:
    fps: frame rate of the videos.
    clip_frames: pixel frames of a training clip.
    frame_size: (height, width) of the videos.
    seconds: of the last call: `first_frames` until the first frames were there, `total` until the last.
  """

  def __init__(self, model: layouts.Model, keep_text_encoder: bool = True, sink_frames: int | None = None,
               window_frames: int | None = None):
    """See `from_checkpoint`."""
    settings = dict(model.settings)
    self.fps, self.clip_frames = settings["fps"], settings["clip_frames"]
    self.frame_size = tuple(settings["frame_size"])
    self.seconds: dict[str, float] = {}
    self._components = {kind: _Loaded(component) for kind, component in model.components.items()}
    self.module, self.vae = (self._components[kind].module for kind in ("transformer", "vae"))
    cache = {"sink_frames": sink_frames, "window_frames": window_frames}
    self.sampler = build.sampler(
        self.module, {**settings["sampler"], **{name: size for name, size in cache.items() if size is not None}})
    encoder = self._components["text_encoder"]
    self._embedder = latents_lib.TextEmbedder(
        encoder.module, lambda: encoder.params, tokenizer_lib.Tokenizer.from_file(model.tokenizer / "tokenizer.json"),
        self.module.config.text_tokens, encoder.jit)
    self._keep_text_encoder = keep_text_encoder
    self._negative_prompt = settings["negative_prompt"]
    self._coding = latents_lib.ClipCoding(
        self.clip_frames, *self.frame_size, settings["chunk_frames"], settings["independent_chunks"])
    self._frame_shape = self._coding.latent_shape(self.vae.config)[1:]

  @classmethod
  def from_checkpoint(cls, path: str | os.PathLike = "digit_world", *, base: str | os.PathLike | None = None,
                      select: str | None = None, keep_text_encoder: bool = True, sink_frames: int | None = None,
                      window_frames: int | None = None) -> "Pipeline":
    """Opens a pipeline.

    Args:
      path: a folder in any format (a run's `export/`, a converted model, Wan's or diffusers' own), or the name of one
        that ships: "digit_world", "digit_world/teacher".
      base: a pipeline that lends what `path` lacks, such as the VAE and text encoder of a lone transformer.
      select: which generator of a training checkpoint, "generator_ema" or "generator".
      keep_text_encoder: whether it stays in memory between prompts.
      sink_frames: first latent frames that a stream attends for ever; default the checkpoint's.
      window_frames: last latent frames that a stream attends; default the checkpoint's.

    Raises:
      UserError: when anything is missing, damaged or does not fit.
    """
    model = layouts.open_model(store.resolve(path), select, store.resolve(base) if base else None)
    if not model.is_pipeline:
      raise errors.UserError(f"{path} holds a lone {', '.join(model.components)}: expected a whole pipeline, or a base"
                             " that lends the rest")
    return cls(model, keep_text_encoder, sink_frames, window_frames)

  @property
  def causal(self) -> bool:
    return not isinstance(self.sampler, bidirectional.BidirectionalSampler)

  @property
  def params(self) -> Any:
    """Of the transformer."""
    return self._components["transformer"].params

  def embed(self, prompts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Embeddings [B, T, D] of prompts, and [1, T, D] of the null prompt (none, [0, T, D], if nothing is guided)."""
    null = [self._negative_prompt] if self.sampler.guided else []
    embeddings = self._embedder([*prompts, *null])
    if not self._keep_text_encoder:
      embeddings.block_until_ready()
      self._components["text_encoder"].free()
    return embeddings[:len(prompts)], embeddings[len(prompts):]

  def __call__(self, prompt: str | Sequence[str], num_frames: int | None = None, seed: int = 0,
               callback: Callable[[int, np.ndarray], None] | None = None, **options: Any) -> np.ndarray:
    """Generates uint8 [F, H, W, 3] for a prompt, or [B, F, H, W, 3] for a list of them.

    Args:
      prompt: what to show.
      num_frames: pixel frames, at least 1; default a training clip.
      seed: of all noise; the same seed and prompts give the same video.
      callback: called with the number and the frames of each chunk as soon as it is there (causal models).
      **options: of `stream`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    num_frames = self.clip_frames if num_frames is None else num_frames
    if num_frames < 1:
      raise errors.UserError(f"num_frames = {num_frames}: expected at least 1")
    start = time.perf_counter()
    if self.causal:
      parts, made = [], 0
      stream = self.stream(prompts, seed, **options)
      for frames in stream:
        parts.append(frames)
        made += frames.shape[1]
        if callback:
          callback(len(parts) - 1, frames)
        if made >= num_frames:
          break
      if not parts:
        raise errors.UserError("the source video has no frames")
      video, first = np.concatenate(parts, axis=1), stream.seconds["first_frames"]
    elif options:
      raise errors.UserError(f"{', '.join(options)}: this checkpoint is bidirectional and makes clips from text only")
    else:
      video = self._clip(prompts, self._coding.latent_frames(self.vae.config, num_frames), seed)
      first = time.perf_counter() - start
    self.seconds = {"first_frames": first, "total": time.perf_counter() - start}
    return video[0, :num_frames] if isinstance(prompt, str) else video[:, :num_frames]

  def stream(self, prompt: str | Sequence[str], seed: int = 0, *, image: np.ndarray | None = None,
             video: Iterable[np.ndarray] | None = None, state: stream_lib.StreamState | bytes | None = None,
             **options: Any) -> stream_lib.Stream:
    """An endless iterator of uint8 chunks, each as soon as it is made, which can be steered: see `stream_lib.Stream`.

    Args:
      prompt: one (chunks [F, H, W, 3]) or several (chunks [B, F, H, W, 3]).
      seed: of all noise.
      image: uint8 [H, W, 3] to begin with, of any size.
      video: pieces uint8 [n, H, W, 3], of any size and number, of a source video to make anew.
      state: of an earlier stream, to continue.
      **options: policy, blend_chunks, strength, one_step, refresh, schedule.

    Raises:
      UserError: the model is bidirectional, or both an image and a video are given.
    """
    if not self.causal:
      raise errors.UserError("this checkpoint is bidirectional and cannot stream: expected a causal one")
    if image is not None and video is not None:
      raise errors.UserError("a stream begins with an image or follows a video, not both")
    if isinstance(state, bytes):
      state = stream_lib.from_bytes(self.engine, [prompt] if isinstance(prompt, str) else prompt, state)
    fit = functools.partial(video_lib.fit, height=self.frame_size[0], width=self.frame_size[1])
    return stream_lib.Stream(
        self.engine, prompt, state, seed=seed, image=None if image is None else fit(image[None])[0],
        video=None if video is None else map(fit, video), **options)

  def latents(self, prompts: Sequence[str], num_chunks: int, seed: int = 0) -> jax.Array:
    """Latents [B, num_chunks k, H, W, C] of a causal model, by one compiled scan."""
    embeddings = self.embed(prompts)
    return self._scan(self.params, *embeddings, jax.random.key(seed), num_chunks=num_chunks,
                      frame_shape=self._frame_shape)

  def _clip(self, prompts: list[str], latent_frames: int, seed: int) -> np.ndarray:
    embeddings = self.embed(prompts)
    noise = jax.random.normal(jax.random.key(seed), (len(prompts), latent_frames, *self._frame_shape))
    latents = self._sample(self.params, noise, *embeddings)
    return self._decoder.clip(latents, self._coding.chunk_frames)

  @functools.cached_property
  def engine(self) -> stream_lib.Engine:
    """What the streams of this model share."""
    vae_params, independent = self._components["vae"].params, self._coding.independent_chunks
    return stream_lib.Engine(
        self.sampler, self._frame_shape, self.embed, lambda: self.params,
        codec.StreamEncoder(self.vae, vae_params, independent), self._decoder, self._components["transformer"].jit)

  @functools.cached_property
  def _decoder(self) -> codec.StreamDecoder:
    return codec.StreamDecoder(self.vae, self._components["vae"].params, self._coding.independent_chunks)

  @functools.cached_property
  def _sample(self) -> Callable[..., jax.Array]:
    return self._components["transformer"].jit(self.sampler.sample)

  @functools.cached_property
  def _scan(self) -> Callable[..., jax.Array]:
    return self._components["transformer"].jit(self.sampler.sample, static_argnames=("num_chunks", "frame_shape"))


class _Loaded:
  """A component whose parameters are read at first use: in bfloat16 if that is how they are stored, else in float32."""

  def __init__(self, component: formats.Component):
    self._tensors = component.tensors
    self._half = any(tensor.dtype == jnp.bfloat16 for tensor in component.tensors.values())
    self.module: nn.Module = component.module
    self.jit = jax.jit
    if self._half and jax.default_backend() == "cpu":
      # CPUs compute in float32. Left to itself, XLA would cast all layers at once, ahead of the loop over them.
      self.jit = functools.partial(
          jax.jit, compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"})
    elif self._half:
      self.module = type(component.module)(dataclasses.replace(component.module.config, dtype="bfloat16"))

  @functools.cached_property
  def params(self) -> Any:
    return formats.read(self._tensors, None if self._half else "float32")

  def free(self) -> None:
    self.__dict__.pop("params", None)
