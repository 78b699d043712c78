"""Noise schedules behind one interface: x_t = alpha_t x_0 + sigma_t eps (CausVid, arXiv 2412.07772, eq. 1).

Timesteps are floats in [0, 1000]. In both schedules t = 0 is clean data (alpha 1, sigma 0, exactly), so that
the causal student's pass that fills its KV cache sees uncorrupted latents; t = 1000 is the noisiest state.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors

MAX_TIMESTEP = 1000.0


class NoiseSchedule(Protocol):
  """The two coefficients of the forward process as functions of the timestep."""

  def alpha_sigma(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (alpha, sigma), each of the shape of `timesteps` (any shape, in [0, 1000])."""

  def timesteps_of_sigma(self, sigma: jax.Array) -> jax.Array:
    """Returns the float32 timesteps at which the noise level is `sigma` (any shape, in [0, 1]).

    The inverse of `alpha_sigma`, as sharp as sigma is: near 1, float32 hardly tells one
    variance-preserving step from the next.
    """


@dataclasses.dataclass(frozen=True)
class FlowMatching:
  """Rectified flow, as Wan 2.1 is trained: sigma = t / 1000 and alpha = 1 - sigma."""

  def alpha_sigma(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    timesteps = jnp.asarray(timesteps, jnp.float32)
    # Not 1 - sigma, which a compiler may fuse into something below 0 at t = 1000.
    return (MAX_TIMESTEP - timesteps) / MAX_TIMESTEP, timesteps / MAX_TIMESTEP

  def timesteps_of_sigma(self, sigma: jax.Array) -> jax.Array:
    return jnp.asarray(sigma, jnp.float32) * MAX_TIMESTEP


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
  """alpha^2 + sigma^2 = 1 with scaled-linear betas: the schedule of the paper's own teacher (CogVideoX).

  Step i of the discrete process is t = 1000 i / num_steps, so the paper's list [999, 748, 502, 247] means
  here what it means to a network trained on 1,000 discrete steps. Between steps the angle whose cosine is
  alpha and whose sine is sigma is interpolated linearly, which keeps alpha^2 + sigma^2 = 1. Step 0, which the
  discrete process noises slightly (sigma 0.03), is clean here. Beyond the last step (t > 999) the noise level
  stays that of the last step, which is pure noise (alpha 0, exactly) under `zero_terminal_snr` (arXiv
  2305.08891).
  """

  beta_start: float = 0.00085
  beta_end: float = 0.012
  num_steps: int = 1000
  zero_terminal_snr: bool = True

  def alpha_sigma(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    nodes, angles, complements = _angle_tables(self)
    timesteps = jnp.asarray(timesteps, jnp.float32)
    # The sine of the complement, not the cosine of the angle: cos(float32(pi / 2)) is not 0.
    return jnp.sin(jnp.interp(timesteps, nodes, complements)), jnp.sin(jnp.interp(timesteps, nodes, angles))

  def timesteps_of_sigma(self, sigma: jax.Array) -> jax.Array:
    nodes, angles, _ = _angle_tables(self)
    return jnp.interp(jnp.arcsin(jnp.asarray(sigma, jnp.float32)), angles, nodes)


@functools.lru_cache
def _angle_tables(schedule: VariancePreserving) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns float32 (timesteps, angles, pi / 2 - angles) of the discrete steps, computed in float64."""
  betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_steps) ** 2
  alphas = np.sqrt(np.cumprod(1.0 - betas))
  if schedule.zero_terminal_snr:
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
  alphas[0] = 1.0
  complements = np.arcsin(alphas)
  nodes = np.arange(schedule.num_steps) * (MAX_TIMESTEP / schedule.num_steps)
  return tuple(x.astype(np.float32) for x in (nodes, np.pi / 2 - complements, complements))


_SCHEDULES = {"flow_matching": FlowMatching, "variance_preserving": VariancePreserving}


def get_schedule(name: str) -> NoiseSchedule:
  """Returns the schedule that a config names: "flow_matching" or "variance_preserving".

  Raises:
    UserError: if the name is neither.
  """
  if name not in _SCHEDULES:
    raise errors.UserError(f"unknown noise schedule {name!r}: expected one of {sorted(_SCHEDULES)}")
  return _SCHEDULES[name]()


def expand(t: jax.Array, like: jax.Array) -> jax.Array:
  """Appends axes of size 1 to `t` (a scalar, [B] or [B, F]) until it broadcasts over `like` [B, F, ...]."""
  t = jnp.asarray(t)
  return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def add_noise(schedule: NoiseSchedule, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
  """Returns x_t = alpha_t x0 + sigma_t noise (eq. 1).

  Args:
    schedule: the noise schedule.
    x0: clean latents [B, F, H, W, C].
    noise: standard normal, the shape of `x0`.
    timesteps: [B, F], [B] or a scalar, in [0, 1000].
  """
  alpha, sigma = schedule.alpha_sigma(expand(timesteps, x0))
  return alpha * x0 + sigma * noise
