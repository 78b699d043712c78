"""Deterministic samplers of the probability-flow ODE, as `lax.scan` over a list of timesteps.

Both solvers step the exact linear part of the ODE and approximate the data prediction x_0(x_t, t), so both
hold for any schedule and both end exactly on the last data prediction when the list ends in t = 0.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from causvid_jax import errors
from causvid_jax.diffusion import schedules

X0Fn = Callable[[jax.Array, jax.Array], jax.Array]

# Stands in for alpha = 0, where log(alpha / sigma) is -inf: 1 - (1 - 1e-6) in float32, as in diffusers.
_MIN_ALPHA = 1.0132789611816406e-06


def solve(
    name: str,
    x0_fn: X0Fn,
    x: jax.Array,
    timesteps: jax.Array,
    schedule: schedules.NoiseSchedule,
    return_trajectory: bool = False,
) -> jax.Array:
  """Solves the ODE from `x` at `timesteps[0]` to a sample at t = 0, with n calls of `x0_fn`.

  Args:
    name: "euler", first order: x' = alpha' x_0 + sigma' eps, which is Euler on the velocity in flow matching
      and deterministic DDIM (arXiv 2010.02502) in the variance-preserving schedule; or "unipc", second order:
      UniPC with B(h) = e^h - 1 (arXiv 2302.04867), as Wan 2.1 samples its teacher.
    x0_fn: maps (x, scalar timestep) to the prediction of x_0, the shape of x, guidance included.
    x: the start, any shape: standard normal noise where alpha is 0.
    timesteps: [n + 1], strictly decreasing in noise level, ending in 0.
    schedule: the noise schedule.
    return_trajectory: return every state instead of the last.

  Returns:
    The sample, float32, the shape of `x`; or the states at all timesteps, [n + 1, ...], the start first.
    UniPC's states are the corrected ones.

  Raises:
    UserError: if the solver is unknown.
  """
  if name not in _SOLVERS:
    raise errors.UserError(f"unknown solver {name!r}: expected one of {sorted(_SOLVERS)}")
  timesteps = jnp.asarray(timesteps, jnp.float32)
  alpha, sigma = schedule.alpha_sigma(timesteps)
  final, states = _SOLVERS[name](x0_fn, jnp.asarray(x, jnp.float32), timesteps, alpha, sigma)
  return jnp.concatenate([states, final[None]]) if return_trajectory else final


def _euler(
    x0_fn: X0Fn, x: jax.Array, timesteps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the final state and the [n, ...] states before each step."""

  def step(x, inputs):
    t, alpha, sigma, next_alpha, next_sigma = inputs
    x0 = x0_fn(x, t).astype(jnp.float32)
    eps = (x - alpha * x0) / sigma
    return next_alpha * x0 + next_sigma * eps, x

  return lax.scan(step, x, (timesteps[:-1], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]))


def _unipc(
    x0_fn: X0Fn, x: jax.Array, timesteps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Predicts, evaluates, corrects: one evaluation serves the correction of its state and the next prediction.

  Predictor and corrector are linear in the states and data predictions at hand; their weights depend on the
  timesteps alone. Returns as `_euler` does.
  """

  def step(carry, inputs):
    x, previous_x, x0_1, x0_2 = carry
    t, (c_x, c_0, c_1, c_2), (p_x, p_0, p_1) = inputs
    x0_0 = x0_fn(x, t).astype(jnp.float32)
    x = c_x * previous_x + c_0 * x0_0 + c_1 * x0_1 + c_2 * x0_2
    predicted = p_x * x + p_0 * x0_0 + p_1 * x0_1
    return (predicted, x, x0_0, x0_1), x

  zeros = jnp.zeros_like(x)
  weights = _unipc_weights(alpha, sigma)
  (final, *_), states = lax.scan(step, (x, x, zeros, zeros), (timesteps[:-1], *weights))
  return final, states


def _unipc_weights(alpha: jax.Array, sigma: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Returns the corrector's and the predictor's weights at each of the n timesteps before the last, [n] each.

  Corrector: of the previous corrected state, x_0 here, x_0 one and two steps ago. The start has nothing to be
  corrected by. Predictor: of the corrected state, x_0 here, x_0 one step ago. The first step knows only one
  x_0 and the last, to sigma = 0, is exactly x_0: both are of order 1.
  """
  lam = jnp.log(jnp.maximum(alpha, _MIN_ALPHA)) - jnp.log(sigma)
  h = jnp.diff(lam)  # Infinite in the last step, where every use below is finite or masked.
  decay = -jnp.expm1(-h)
  linear, gain = sigma[1:] / sigma[:-1], alpha[1:] * decay
  index = jnp.arange(h.size)
  second_order = (index > 0) & (index < h.size - 1)
  # Where the data prediction before the current one lies, in units of the step, seen from the current one.
  behind = jnp.where(second_order, -jnp.roll(h, 1) / h, -1.0)

  p_1 = jnp.where(second_order, 0.5 * gain / behind, 0.0)
  predictor = (linear, gain - p_1, p_1)

  # The order conditions: rho_behind + rho_ahead = b_1 and behind * rho_behind + rho_ahead = b_2.
  b_1 = 1 / decay - 1 / h
  b_2 = 1 / decay - 2 * b_1 / h
  rho_behind = jnp.where(second_order, (b_1 - b_2) / (1 - behind), 0.0)
  rho_ahead = jnp.where(second_order, b_1 - rho_behind, 0.5)
  c_0, c_2 = gain * rho_ahead, gain * rho_behind / behind
  corrector = (linear, c_0, gain - c_0 - c_2, c_2)
  # A step is corrected at its end, one timestep later than it is predicted.
  corrector = tuple(jnp.roll(w, 1).at[0].set(start) for w, start in zip(corrector, (1.0, 0.0, 0.0, 0.0)))
  return corrector, predictor


_SOLVERS = {"euler": _euler, "unipc": _unipc}
