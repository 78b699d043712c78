"""A network together with what its output means: its noise schedule and its kind of prediction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.diffusion import guidance
from causvid_jax.diffusion import parameterization
from causvid_jax.diffusion import schedules


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """Predictions of x_0 by a transformer `module` (of `models/transformer.py`, or anything called alike).

  Shapes: x_t [B, F, H, W, C], timesteps [B, F], text [B, T, D]; all results float32, of the shape of x_t.
  """
  module: Any
  schedule: schedules.NoiseSchedule
  prediction: str

  def x0(self, params: Any, x_t: jax.Array, timesteps: jax.Array, text: jax.Array,
         chunk_frames: int | None = None) -> jax.Array:
    """x_0 of a whole clip, bidirectional or block-causal with chunks of `chunk_frames`."""
    output = self.module.apply({"params": params}, x_t, timesteps, text, chunk_frames=chunk_frames)
    return self.output_to_x0(output, x_t, timesteps)

  def guided_x0(self, params: Any, x_t: jax.Array, timesteps: jax.Array, text: jax.Array, null_text: jax.Array,
                scale: float, chunk_frames: int | None = None) -> jax.Array:
    """x_0 under classifier-free guidance; `null_text` [1, T, D]. Both branches are one call of twice the batch."""
    if scale == 1.0:
      return self.x0(params, x_t, timesteps, text, chunk_frames)
    twice = lambda x: jnp.concatenate([x, x])
    texts = jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
    cond, uncond = jnp.split(self.x0(params, twice(x_t), twice(timesteps), texts, chunk_frames), 2)
    return guidance.classifier_free(cond, uncond, scale)

  def output_to_x0(self, output: jax.Array, x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
    """x_0 from what the network returned at `x_t`."""
    alpha, sigma = self.schedule.alpha_sigma(timesteps)
    return parameterization.to_x0(
        self.prediction, output.astype(jnp.float32), x_t.astype(jnp.float32), alpha, sigma)
