"""Conversions between what a network predicts and the clean sample, the noise and the score.

The kinds, for x_t = alpha x_0 + sigma eps (CausVid, arXiv 2412.07772, eq. 1):

  "flow"  eps - x_0                the velocity of Wan 2.1
  "v"     alpha eps - sigma x_0    v-prediction (arXiv 2202.00512)
  "eps"   eps
  "x0"    x_0

Each holds for any alpha and sigma, so kinds and schedules combine freely. `prediction`, `x_t`, `x0` and `eps`
share one shape, say [B, F, H, W, C]; `alpha` and `sigma` are scalars, [B], [B, F] or already broadcastable.

At the two ends some quantities are undetermined: x_0 from an "eps" prediction at alpha = 0, eps from an "x0"
prediction at sigma = 0, and the score at sigma = 0. They are returned as 0, with finite gradients.
"""

import jax
import jax.numpy as jnp

from causvid_jax import errors
from causvid_jax.diffusion import schedules

KINDS = ("flow", "v", "eps", "x0")


def to_x0(kind: str, prediction: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """Returns the clean sample x_0 that a network's `prediction` at `x_t` implies."""
  _check(kind)
  alpha, sigma = _expand(alpha, sigma, x_t)
  if kind == "flow":
    return (x_t - sigma * prediction) / (alpha + sigma)
  if kind == "v":
    return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
  if kind == "eps":
    return _divide(x_t - sigma * prediction, alpha)
  return prediction


def to_eps(kind: str, prediction: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """Returns the noise eps that a network's `prediction` at `x_t` implies."""
  _check(kind)
  alpha, sigma = _expand(alpha, sigma, x_t)
  if kind == "flow":
    return (x_t + alpha * prediction) / (alpha + sigma)
  if kind == "v":
    return (sigma * x_t + alpha * prediction) / (alpha**2 + sigma**2)
  if kind == "x0":
    return _divide(x_t - alpha * prediction, sigma)
  return prediction


def score(x0: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """Returns the score of the noised data, -(x_t - alpha x0) / sigma^2 = -eps / sigma (paper, eq. 2)."""
  alpha, sigma = _expand(alpha, sigma, x_t)
  return -_divide(x_t - alpha * x0, sigma**2)


def target(kind: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """Returns what a network of this kind should predict for the pair (x0, eps): its regression target."""
  _check(kind)
  alpha, sigma = _expand(alpha, sigma, x0)
  if kind == "flow":
    return eps - x0
  if kind == "v":
    return alpha * eps - sigma * x0
  return eps if kind == "eps" else x0


def _expand(alpha: jax.Array, sigma: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gives both trailing axes: as they are, [B, F] would be matched against [W, C]."""
  return schedules.expand(alpha, like), schedules.expand(sigma, like)


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Returns the quotient, or 0 where the denominator is 0."""
  zero = denominator == 0
  # The inner `where` keeps the gradient finite as well.
  return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))


def _check(kind: str) -> None:
  if kind not in KINDS:
    raise errors.UserError(f"unknown prediction kind {kind!r}: expected one of {list(KINDS)}")
