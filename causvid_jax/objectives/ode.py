"""ODE initialisation of the student: regression from states of the teacher's ODE to its end (paper, section 4.3, eq. 7)."""

from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.diffusion import denoiser as denoiser_lib


def sample_chunk_steps(key: jax.Array, batch: int, frames: int, chunk_frames: int, num_steps: int) -> jax.Array:
  """An independent index into the student's step list for every chunk, repeated over its frames: int [B, F]."""
  steps = jax.random.randint(key, (batch, frames // chunk_frames), 0, num_steps)
  return jnp.repeat(steps, chunk_frames, axis=1)


def ode_loss(student: denoiser_lib.Denoiser, params: Any, states: jax.Array, text: jax.Array, key: jax.Array, *,
             timesteps: jax.Array, chunk_frames: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean squared error of the student's x_0 against the end of the teacher's ODE.

  Every chunk enters at its own step; chunks at the last step (t = 0) are clean context and do not count in the loss.

  Args:
    student: the student.
    params: its parameters.
    states: [B, S, F, H, W, C], the teacher's ODE at `timesteps`, its end last.
    text: [B, T, D].
    key: draws each chunk's step.
    timesteps: [S], decreasing, ending in 0.
    chunk_frames: latent frames a chunk.
  """
  batch, num_steps, frames = states.shape[:3]
  chosen = sample_chunk_steps(key, batch, frames, chunk_frames, num_steps)
  x_t = jnp.take_along_axis(states, chosen[:, None, :, None, None, None], axis=1)[:, 0]
  t = jnp.asarray(timesteps)[chosen]
  error = jnp.square(student.x0(params, x_t, t, text, chunk_frames) - states[:, -1])
  counts = (t > 0).astype(jnp.float32)
  loss = jnp.sum(error.mean(axis=(2, 3, 4)) * counts) / jnp.maximum(jnp.sum(counts), 1.0)
  return loss, {"loss": loss}
