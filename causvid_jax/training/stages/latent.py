"""What the stages after the VAE share: latents and text instead of pixels and words, and how a sample becomes a clip."""

import abc
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from causvid_jax import weights
from causvid_jax.data import digit_world
from causvid_jax.data import latents as latents_lib
from causvid_jax.data import records
from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import schedules
from causvid_jax.models import transformer
from causvid_jax.sampling import build
from causvid_jax.sampling import codec
from causvid_jax.training.stages import base
from causvid_jax.weights import store

_PREVIEW_PROMPTS = ("a red seven moving left", "a blue two moving up", "a green four moving right and a yellow nine moving down")


class LatentStage(base.Stage):
  """Trains a transformer on the latent records in `config.latents`; by default on the built-in world's, made on demand."""

  def __init__(self, config):
    super().__init__(config)
    self.module = transformer.WanTransformer(base.preset(transformer.PRESETS, config.model))
    self.embed = latents_lib.load_embedder(config.text_encoder, config.tokenizer, self.module.config.text_tokens)
    self.null_text = self.embed([config.negative_prompt])
    clip = config.clip
    self.coding = latents_lib.ClipCoding(
        clip.frames, clip.height, clip.width, config.chunk_frames, clip.independent_chunks)
    self.latent_shape = self.coding.latent_shape(weights.load_config(config.vae).config)

  @functools.cached_property
  def source(self):
    config = self.config
    if config.latents:
      return records.RecordSource(config.latents, "latent")
    made_by = {"clips": config.clips, "coding": dataclasses.asdict(self.coding), "vae": _digest(config.vae),
               "text_encoder": _digest(config.text_encoder)}
    folder = pathlib.Path(config.data_dir) / f"latents_{config.clips}"
    if not records.finished(folder, made_by):
      world = digit_world.build(config.data_dir, config.clips, config.validation_clips, config.clip.frames)
      clips = world.as_data_source("train")
      decoded = (digit_world.decode(clips[i]) for i in tqdm.trange(len(clips), desc="encoding clips", unit="clip"))
      latents_lib.write_latents(folder, decoded, *weights.load(config.vae), self.coding, self.embed, made_by)
    return records.RecordSource(folder, "latent")

  def transform(self, example, rng):
    del rng
    return {"latents": example["latents"].astype(np.float32), "text": example["text"]}

  def denoiser(self, module: Any = None) -> denoiser_lib.Denoiser:
    """A network (default: the one in training) read through the config's schedule and prediction."""
    return denoiser_lib.Denoiser(
        module or self.module, schedules.get_schedule(self.config.schedule), self.config.prediction)

  def pretrained(self):
    """The transformer of the pipeline `config.init_from`."""
    return weights.load(f"{self.config.init_from}/transformer")[1] if self.config.init_from else None

  @abc.abstractmethod
  def sampler_settings(self) -> dict[str, Any]:
    """How the trained network samples, for its pipeline.json."""

  def exported(self, state: Any) -> Any:
    """The parameters that the stage leaves."""
    return state.ema

  def export(self, state, folder):
    config = self.config
    weights.save_pipeline(folder, self.module, self.exported(state), {
        "vae": config.vae, "text_encoder": config.text_encoder, "tokenizer": config.tokenizer,
        "negative_prompt": config.negative_prompt, "fps": config.clip.fps, "clip_frames": config.clip.frames,
        "frame_size": [config.clip.height, config.clip.width], "independent_chunks": config.clip.independent_chunks,
        "chunk_frames": config.chunk_frames, "sampler": self.sampler_settings()})

  def preview(self, state):
    decoder, sample = self._preview_tools
    latents = sample(self.exported(state), self.embed(list(_PREVIEW_PROMPTS)), self.null_text, jax.random.key(0))
    return dict(zip(_PREVIEW_PROMPTS, decoder.clip(latents, self.config.chunk_frames)))

  @functools.cached_property
  def _preview_tools(self):
    settings = self.sampler_settings()
    sampler = build.sampler(self.module, settings)

    frames, *frame_shape = self.latent_shape

    def sample(params, text, null_text, key):
      if settings["kind"] == "teacher":
        return sampler.sample(params, jax.random.normal(key, (text.shape[0], *self.latent_shape)), text, null_text)
      return sampler.sample(params, text, null_text, key, frames // self.config.chunk_frames, tuple(frame_shape))

    decoder = codec.StreamDecoder(*weights.load(self.config.vae), self.coding.independent_chunks)
    return decoder, jax.jit(sample)


def _digest(component: str) -> str:
  """Identifies a component's weights."""
  return hashlib.sha256((store.resolve(component) / "weights.safetensors").read_bytes()).hexdigest()[:16]
