"""Stage: the VAE, on crops of digit-world clips."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import weights
from causvid_jax.data import digit_world
from causvid_jax.data import latents as latents_lib
from causvid_jax.models import vae as vae_lib
from causvid_jax.objectives import vae as objective
from causvid_jax.training import state as state_lib
from causvid_jax.training.stages import base

_STATISTICS_CLIPS = 128


class VAE(base.Stage):
  """Trains on `config.frames` frames of `config.crop` pixels; exports with the measured mean and std of the latents."""

  def __init__(self, config):
    super().__init__(config)
    self.module = vae_lib.WanVAE(base.preset(vae_lib.PRESETS, config.model))

  @functools.cached_property
  def source(self):
    return digit_world.build(self.config.data_dir, self.config.clips, self.config.validation_clips).as_data_source("train")

  def transform(self, example, rng):
    video = digit_world.decode(example)["video"]
    frames, crop = self.config.frames, self.config.crop
    first = rng.integers(video.shape[0] - frames + 1)
    corners = rng.integers(0, digit_world.SIZE - crop + 1, (self.config.crop_candidates, 2))
    # Most of a clip is black: of a few places, take the one with most to learn from.
    crops = [video[first:first + frames, y:y + crop, x:x + crop] for y, x in corners]
    return {"video": latents_lib.to_unit(max(crops, key=np.sum))}

  def pretrained(self):
    return weights.load(self.config.init_from)[1] if self.config.init_from else None

  def init(self, key, pretrained):
    return state_lib.create(base.initial_params(self.module, key, pretrained), self.optimizer, with_ema=True)

  def step(self, state, frozen, batch, key, phase):
    loss = lambda params, batch, key: objective.vae_loss(self.module, params, batch["video"], key, self.config.kl_weight)
    grads, metrics = state_lib.gradients(loss, state.params, batch, key, self.config.microbatches)
    state, more = state_lib.update(state, grads, self.optimizer, self.config.ema_decay)
    return state, metrics | more

  def export(self, state, folder: pathlib.Path):
    encode = jax.jit(lambda params, video: self.module.apply({"params": params}, video, method="encode"))
    source = self.source
    chosen = np.linspace(0, len(source) - 1, _STATISTICS_CLIPS).astype(int)
    clips = [latents_lib.to_unit(digit_world.decode(source[int(i)])["video"])[None] for i in chosen]
    latents = jnp.concatenate([encode(state.ema, clip) for clip in clips])
    moments = {f"latent_{name}": tuple(np.round(np.asarray(f(latents, axis=(0, 1, 2, 3)), np.float64), 6).tolist())
               for name, f in (("mean", jnp.mean), ("std", jnp.std))}
    config = vae_lib.dataclasses.replace(self.module.config, **moments)
    weights.save(folder, vae_lib.WanVAE(config), state.ema)
