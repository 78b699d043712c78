"""The ODE solvers and step lists against diffusers' UniPC and flow-match Euler schedulers."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import UniPCMultistepScheduler
import jax
import jax.numpy as jnp
import numpy as np
import torch

from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import solvers
from causvid_jax.diffusion import steps
import parity

TOLERANCE = 1e-5
SHIFTS = (1.0, 5.0, 8.0)
_rng = np.random.default_rng(0)
START = _rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
MIX_IN, MIX_OUT = (_rng.normal(size=(5, 5)).astype(np.float32) / 5 ** 0.5 for _ in range(2))


def velocity(tanh, sin, x, sigma):
  """A smooth network: mixes the channels, depends on the noise level."""
  return tanh(x @ MIX_IN + 1.5 * sigma) @ MIX_OUT + 0.3 * sin(2 * x + 3 * sigma)


@functools.partial(jax.jit, static_argnums=0)
def _solve(name, times):
  def x0_fn(x, t):
    sigma = t / 1000
    return x - sigma * velocity(jnp.tanh, jnp.sin, x, sigma)

  return solvers.solve(name, x0_fn, START, times, schedules.FlowMatching())


def solve_theirs(scheduler):
  """Steps the scheduler; the network sees its sigma (UniPC's `timesteps` are cut to whole numbers)."""
  x = torch.from_numpy(START)
  for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
    x = scheduler.step(torch.from_numpy(velocity(np.tanh, np.sin, x.numpy(), sigma.numpy())), t, x).prev_sample
  return x.numpy()


def make_unipc(shift):
  return UniPCMultistepScheduler(
      solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


class SolversTest(parameterized.TestCase):

  @parameterized.product(shift=SHIFTS, num_steps=(1, 2, 3, 4, 10, 20, 50))
  def test_unipc(self, shift, num_steps):
    scheduler = make_unipc(shift)
    # Our steps are uniform down to 0 before the shift; diffusers' own default, below, ends at 1.
    for uniform in (np.linspace(1000, 0, num_steps + 1), np.linspace(1000, 1, num_steps + 1)):
      scheduler.set_timesteps(num_steps, sigmas=uniform[:-1] / 1000)
      times = np.append(steps.shift_timesteps(uniform[:-1], shift), 0).astype(np.float32)
      np.testing.assert_allclose(scheduler.sigmas, times / 1000, atol=2e-6)  # it starts at 1 - 1e-6
      error = parity.error(_solve("unipc", times), solve_theirs(scheduler))
      print(f"UniPC, {num_steps} steps, shift {shift}: relative error {error:.1e}")
      self.assertLess(error, TOLERANCE)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_allclose(scheduler.sigmas, times / 1000, atol=2e-6)

  @parameterized.product(shift=SHIFTS, num_steps=(1, 2, 3, 4, 10, 20, 50))
  def test_euler(self, shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    times = steps.inference_timesteps(num_steps, shift)
    np.testing.assert_allclose(scheduler.sigmas, times / 1000, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps, times[:-1], rtol=1e-6)
    error = parity.error(_solve("euler", times), solve_theirs(scheduler))
    print(f"Euler, {num_steps} steps, shift {shift}: relative error {error:.1e}")
    self.assertLess(error, TOLERANCE)


class StepListsTest(parameterized.TestCase):

  @parameterized.parameters(*SHIFTS)
  def test_four_steps_through_the_shift(self, shift):
    # The authors look 1000, 750, 500, 250 up in the 1,000 shifted steps that they train on.
    grid = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).timesteps.numpy()
    looked_up = [grid[1000 - step] for step in (1000, 750, 500, 250)]
    np.testing.assert_allclose(steps.student_timesteps(4, shift), [*looked_up, 0], rtol=1e-6)
    if shift == 8.0:
      np.testing.assert_array_equal(np.round(looked_up), [1000, 960, 889, 727])

  def test_three_steps_are_shifted_already(self):
    grid = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=8.0).timesteps.numpy()
    listed = steps.student_timesteps((1000, 757, 522))
    np.testing.assert_array_equal(listed, [1000, 757, 522, 0])
    nearest = np.array([grid[np.abs(grid - step).argmin()] for step in listed[:-1]])
    np.testing.assert_array_equal(np.round(nearest), listed[:-1])
    np.testing.assert_allclose(nearest, steps.shift_timesteps(np.array([1000, 280, 120]), 8.0), rtol=1e-6)
    # Nothing is gained by the detour: sigma = t / 1000 is within a rounding of the grid's.
    _, sigma = schedules.FlowMatching().alpha_sigma(listed[:-1])
    np.testing.assert_allclose(sigma, nearest / 1000, atol=5e-4)


if __name__ == "__main__":
  absltest.main()
