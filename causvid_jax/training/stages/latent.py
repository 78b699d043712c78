"""What the stages after the VAE share: latents and text instead of pixels and words, and how a sample becomes a clip."""

import functools
import hashlib
import pathlib
from typing import Any

from flax import linen as nn
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
from causvid_jax.sampling import decode
from causvid_jax.training.stages import base
from causvid_jax.weights import store

_PREVIEW_PROMPTS = ("a red seven moving left", "a blue two moving up", "a green four moving right and a yellow nine moving down")


class LatentStage(base.Stage):
  """Trains a transformer on latent records of the built-in world, which it makes if they are not there."""

  def __init__(self, config):
    super().__init__(config)
    self.module = transformer.WanTransformer(transformer.PRESETS[config.model])
    self.embed = latents_lib.load_embedder(config.text_encoder, config.tokenizer, self.module.config.text_tokens)
    self.null_text = self.embed([config.negative_prompt])

  @functools.cached_property
  def source(self):
    config = self.config
    made_by = {"clips": config.clips, "vae": _digest(config.vae), "text_encoder": _digest(config.text_encoder)}
    folder = pathlib.Path(config.data_dir) / f"latents_{config.clips}"
    if not records.finished(folder, made_by):
      clips = digit_world.build(config.data_dir, config.clips, config.validation_clips).as_data_source("train")
      decoded = (digit_world.decode(clips[i]) for i in tqdm.trange(len(clips), desc="encoding clips", unit="clip"))
      latents_lib.write_latents(folder, decoded, *weights.load(config.vae), self.embed, made_by)
    return records.RecordSource(folder, "latent")

  def transform(self, example, rng):
    del rng
    return {"latents": example["latents"].astype(np.float32), "text": example["text"]}

  def denoiser(self, module: Any = None) -> denoiser_lib.Denoiser:
    """A network (default: the one in training) read through the config's schedule and prediction."""
    return denoiser_lib.Denoiser(
        module or self.module, schedules.get_schedule(self.config.schedule), self.config.prediction)

  def initial_params(self, key: jax.Array) -> Any:
    """The transformer of the pipeline `config.init_from`, or a fresh one; boxed with its logical names."""
    fresh = store.init(self.module, key)
    if not self.config.init_from:
      return fresh
    _, params = weights.load(f"{self.config.init_from}/transformer")
    return boxed_like(fresh, params)

  def sampler_settings(self) -> dict[str, Any]:
    """How the trained network samples, for its pipeline.json."""
    raise NotImplementedError

  def exported(self, state: Any) -> Any:
    """The parameters that the stage leaves."""
    return state.ema

  def export(self, state, folder):
    config = self.config
    weights.save_pipeline(folder, self.module, self.exported(state), {
        "vae": config.vae, "text_encoder": config.text_encoder, "tokenizer": config.tokenizer,
        "negative_prompt": config.negative_prompt, "fps": config.clip.fps, "clip_frames": config.clip.frames,
        "frame_size": [config.clip.height, config.clip.width], "sampler": self.sampler_settings()})

  def preview(self, state):
    config = self.config
    vae, vae_params, decoder, sample = self._preview_tools
    shape = vae.config.latent_shape(config.clip.frames, config.clip.height, config.clip.width)
    text = self.embed(list(_PREVIEW_PROMPTS))
    latents = sample(self.exported(state), text, self.null_text, jax.random.key(0), shape)
    videos = decoder.clip(latents, config.chunk_frames)
    return dict(zip(_PREVIEW_PROMPTS, videos))

  @functools.cached_property
  def _preview_tools(self):
    vae, vae_params = weights.load(self.config.vae)
    settings = self.sampler_settings()
    sampler = build.sampler(self.module, settings)

    def sample(params, text, null_text, key, shape):
      if settings["kind"] == "teacher":
        return sampler.sample(params, jax.random.normal(key, (text.shape[0], *shape)), text, null_text)
      return sampler.sample(params, text, null_text, key, shape[0] // self.config.chunk_frames, shape[1:])

    return vae, vae_params, decode.StreamDecoder(vae, vae_params), jax.jit(sample, static_argnames="shape")


def boxed_like(boxed: Any, params: Any) -> Any:
  """`params` in the boxes of a tree of the same structure, so that they keep their logical axis names."""
  return jax.tree.map(lambda box, value: box.replace_boxed(value), boxed, params,
                      is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _digest(component: str) -> str:
  """Identifies a component's weights."""
  return hashlib.sha256((store.resolve(component) / "weights.safetensors").read_bytes()).hexdigest()[:16]
