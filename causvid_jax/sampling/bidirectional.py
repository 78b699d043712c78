"""The many-step teacher: whole clips by the probability-flow ODE."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import solvers


@dataclasses.dataclass(frozen=True)
class BidirectionalSampler:
  """Solves the ODE over `timesteps` (decreasing, ending in 0) with classifier-free guidance."""
  denoiser: denoiser_lib.Denoiser
  timesteps: tuple[float, ...]
  solver: str
  guidance: float
  guided: ClassVar[bool] = True

  def sample(self, params: Any, noise: jax.Array, text: jax.Array, null_text: jax.Array,
             return_trajectory: bool = False) -> jax.Array:
    """Noise [B, F, H, W, C] and text [B, T, D] -> clean latents, or all S states [S, B, F, H, W, C], noise first."""
    def x0_fn(x, t):
      return self.denoiser.guided_x0(
          params, x, jnp.broadcast_to(t, x.shape[:2]), text, null_text, self.guidance)

    return solvers.solve(self.solver, x0_fn, noise, np.asarray(self.timesteps, np.float32), self.denoiser.schedule,
                         return_trajectory)
