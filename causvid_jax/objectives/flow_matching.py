"""Denoising regression: the bidirectional teacher, the causal teacher (Diffusion Forcing) and the fake score.

Equation 3 of the paper (arXiv 2412.07772), in the network's own prediction: E |network(x_t, t) - target(x_0, eps)|^2.
"""

from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import parameterization
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import steps

Metrics = dict[str, jax.Array]


def sample_timesteps(key: jax.Array, batch: int, frames: int, shift: float, chunk_frames: int | None = None,
                     low: float = 0.0, high: float = schedules.MAX_TIMESTEP) -> jax.Array:
  """Uniform timesteps [B, F], shifted and clamped to [low, high].

  One for the whole clip, or with `chunk_frames` an independent one for every chunk (Diffusion Forcing, arXiv 2407.01392).
  """
  repeats = chunk_frames or frames
  t = schedules.MAX_TIMESTEP * jax.random.uniform(key, (batch, frames // repeats))
  return jnp.repeat(jnp.clip(steps.shift_timesteps(t, shift), low, high), repeats, axis=1)


def drop_text(key: jax.Array, text: jax.Array, null_text: jax.Array, rate: float) -> jax.Array:
  """Replaces a share `rate` of the prompts' embeddings [B, T, D] by the null prompt's [1, T, D]."""
  return jnp.where(jax.random.bernoulli(key, rate, (text.shape[0], 1, 1)), null_text, text)


def denoising_loss(denoiser: denoiser_lib.Denoiser, params: Any, x0: jax.Array, text: jax.Array, timesteps: jax.Array,
                   key: jax.Array, chunk_frames: int | None = None) -> tuple[jax.Array, Metrics]:
  """Mean squared error of the network's prediction at noised `x0` [B, F, H, W, C], `timesteps` [B, F]."""
  noise = jax.random.normal(key, x0.shape)
  x_t = schedules.add_noise(denoiser.schedule, x0, noise, timesteps)
  output = denoiser.module.apply({"params": params}, x_t, timesteps, text, chunk_frames=chunk_frames)
  alpha, sigma = denoiser.schedule.alpha_sigma(timesteps)
  target = parameterization.target(denoiser.prediction, x0, noise, alpha, sigma)
  loss = jnp.mean(jnp.square(output.astype(jnp.float32) - target))
  return loss, {"loss": loss}


def teacher_loss(denoiser: denoiser_lib.Denoiser, params: Any, x0: jax.Array, text: jax.Array, null_text: jax.Array,
                 key: jax.Array, *, shift: float, text_dropout: float,
                 chunk_frames: int | None = None) -> tuple[jax.Array, Metrics]:
  """The teacher's loss: bidirectional with one t a clip, or causal with one t a chunk when `chunk_frames` is given."""
  time_key, noise_key, text_key = jax.random.split(key, 3)
  timesteps = sample_timesteps(time_key, *x0.shape[:2], shift, chunk_frames)
  text = drop_text(text_key, text, null_text, text_dropout)
  return denoising_loss(denoiser, params, x0, text, timesteps, noise_key, chunk_frames)
