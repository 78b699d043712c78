"""Step lists: the timesteps at which the teacher's ODE is solved and on which the student is distilled.

Every list is float32 in [0, 1000] (computed in float64), strictly decreasing, and ends in 0. They are numpy
arrays because they are constants of a run: records keep them and programs unroll over them.
"""

from collections.abc import Sequence
import numbers

import jax
import numpy as np

from causvid_jax import errors
from causvid_jax.diffusion import schedules


def shift_sigma(sigma: jax.Array, shift: float) -> jax.Array:
  """Returns s sigma / (1 + (s - 1) sigma) for shift s: s > 1 spends more of the steps at high noise."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def shift_timesteps(timesteps: jax.Array, shift: float) -> jax.Array:
  """Returns `timesteps` (any shape, in [0, 1000]) with sigma = t / 1000 shifted."""
  return schedules.MAX_TIMESTEP * shift_sigma(timesteps / schedules.MAX_TIMESTEP, shift)


def inference_timesteps(num_steps: int, shift: float = 1.0) -> np.ndarray:
  """Returns [num_steps + 1] timesteps: `num_steps` uniform steps from 1000, shifted, then 0.

  Raises:
    UserError: if `num_steps` < 1 or `shift` <= 0.
  """
  if num_steps < 1 or shift <= 0:
    raise errors.UserError(f"num_steps = {num_steps}, shift = {shift}: expected num_steps >= 1 and shift > 0")
  uniform = np.linspace(schedules.MAX_TIMESTEP, 0.0, num_steps + 1)
  return shift_timesteps(uniform, shift).astype(np.float32)


def student_timesteps(steps: int | Sequence[float], shift: float = 1.0) -> np.ndarray:
  """Returns the student's [Q + 1] timesteps: Q denoising steps, then 0 for the clean pass into its cache.

  Args:
    steps: Q, for uniform steps passed through the shift (4 at shift 8: 1000, 960, 888.89, 727.27, 0; the
      fractions are kept, where the authors truncate), or the Q timesteps themselves, with or without the
      closing 0. These are taken as they are, not shifted again: the paper's [999, 748, 502, 247], or 1000,
      757, 522 for three steps.
    shift: see `shift_sigma`.

  Raises:
    UserError: if a list is empty, is not strictly decreasing, or leaves [0, 1000].
  """
  if isinstance(steps, numbers.Integral):
    return inference_timesteps(steps, shift)
  values = np.asarray(steps, np.float64)
  if values.size and values[-1] != 0:
    values = np.append(values, 0.0)
  if values.size < 2 or values[0] > schedules.MAX_TIMESTEP or np.any(np.diff(values) >= 0):
    raise errors.UserError(f"student steps {list(steps)}: expected a strictly decreasing list in (0, 1000]")
  return values.astype(np.float32)
