"""The ODE solvers against diffusers' UniPC (pinned values) and the closed-form solution for Gaussian data."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import solvers
from causvid_jax.diffusion import steps

MEAN, STD = 0.7, 0.5
START = np.linspace(-2, 2, 5, dtype=np.float32)

# {(shift, number of steps): final states} from START under `nonlinear_denoiser`, by diffusers 0.42.1:
# UniPCMultistepScheduler(solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True,
# flow_shift=shift).
DIFFUSERS = {
    (8.0, 2): [-0.5743637, -0.1387993, -0.2004179, 0.5099660, 0.3220671],
    (8.0, 3): [-0.6355867, -0.1687053, -0.1593256, 0.4673692, 0.5494498],
    (8.0, 6): [-0.7591041, -0.2453338, 0.0013045, 0.3103457, 0.7418991],
    (5.0, 20): [-0.9227866, -0.6085984, 0.3489452, 0.6114206, 0.6053228],
}


def nonlinear_denoiser(x, t):
  return jnp.tanh(1.3 * x) * (1 - t / 1500) + 0.2 * jnp.sin(3 * x + t / 200)


def gaussian_denoiser(schedule, x, t):
  """E[x_0 | x_t = x] for x_0 ~ N(MEAN, STD^2)."""
  alpha, sigma = schedule.alpha_sigma(t)
  return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def gaussian_state(schedule, start, times):
  """The exact states [n + 1, ...]: the ODE keeps (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)."""
  alpha, sigma = (np.asarray(c, np.float64)[:, None] for c in schedule.alpha_sigma(times))
  scale = np.sqrt(alpha**2 * STD**2 + sigma**2)
  return alpha * MEAN + scale * (start - alpha[0] * MEAN) / scale[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve_gaussian(name, schedule, x, times):
  denoiser = functools.partial(gaussian_denoiser, schedule)
  return solvers.solve(name, denoiser, x, times, schedule, return_trajectory=True)


@functools.partial(jax.jit, static_argnums=0)
def solve_nonlinear(name, x, times):
  return solvers.solve(name, nonlinear_denoiser, x, times, schedules.FlowMatching(), return_trajectory=True)


class SolversTest(parameterized.TestCase):

  @parameterized.parameters(*DIFFUSERS)
  def test_unipc_matches_diffusers(self, shift, num_steps):
    uniform = np.linspace(1000, 1, num_steps + 1)[:-1]
    times = np.append(steps.shift_timesteps(uniform, shift), 0)
    result = solve_nonlinear("unipc", START, times)[-1]
    np.testing.assert_allclose(result, DIFFUSERS[shift, num_steps], atol=1e-5)

  @parameterized.product(schedule_name=("flow_matching", "variance_preserving"), start_sigma=(0.7, 0.9))
  def test_orders_of_convergence(self, schedule_name, start_sigma):
    schedule = schedules.get_schedule(schedule_name)

    def error(name, num_steps):
      # Uniform in sigma: in t, the variance-preserving sigma ~ sqrt(t) would end on a jump of first order.
      times = schedule.timesteps_of_sigma(jnp.linspace(start_sigma, 0, num_steps + 1))
      exact = gaussian_state(schedule, START, times)[-1]
      return np.abs(solve_gaussian(name, schedule, START, times)[-1] - exact).max()

    for name, order in (("euler", 1), ("unipc", 2)):
      coarse, fine = error(name, 64), error(name, 128)
      self.assertBetween(np.log2(coarse / fine), order - 0.15, order + 0.15, msg=name)
    self.assertLess(fine, 3e-4)

  @parameterized.product(
      name=("euler", "unipc"), schedule_name=("flow_matching", "variance_preserving"), num_steps=(1, 2, 3, 50)
  )
  def test_from_pure_noise(self, name, schedule_name, num_steps):
    schedule = schedules.get_schedule(schedule_name)
    times = schedule.timesteps_of_sigma(steps.inference_timesteps(num_steps) / 1000)
    states = solve_gaussian(name, schedule, START, times)
    self.assertTrue(np.all(np.isfinite(states)))
    if num_steps == 1:
      # Pure noise says nothing about x_0, so one step lands on the mean.
      np.testing.assert_allclose(states[-1], np.full(5, MEAN), atol=2e-6)
    if num_steps == 50:
      exact = gaussian_state(schedule, START, times)[-1]
      np.testing.assert_allclose(states[-1], exact, atol={"euler": 0.06, "unipc": 2e-3}[name])

  @parameterized.parameters("euler", "unipc")
  def test_trajectory_follows_the_ode(self, name):
    schedule = schedules.FlowMatching()
    times = steps.inference_timesteps(100, 3.0)
    states = solve_gaussian(name, schedule, START, times)
    np.testing.assert_array_equal(states[0], START)
    np.testing.assert_allclose(states, gaussian_state(schedule, START, times), atol=0.03)
    denoiser = functools.partial(gaussian_denoiser, schedule)
    final = jax.jit(lambda x: solvers.solve(name, denoiser, x, times, schedule))(START)
    np.testing.assert_allclose(states[-1], final, atol=1e-5)

  def test_euler_is_euler_on_the_velocity(self):
    times = steps.inference_timesteps(5, 8.0)
    states = solve_nonlinear("euler", START, times)
    x = START.astype(np.float64)
    for i, t in enumerate(times[:-1]):
      velocity = (x - np.asarray(nonlinear_denoiser(x, t), np.float64)) / (t / 1000)
      x = x + (times[i + 1] - t) / 1000 * velocity
      np.testing.assert_allclose(states[i + 1], x, atol=1e-5)

  def test_solver_knows_no_shape(self):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 5)).astype(jnp.bfloat16)
    times = steps.inference_timesteps(4, 8.0)
    result = solve_nonlinear("unipc", x, times)[-1]
    flat = solve_nonlinear("unipc", x.reshape(-1), times)[-1]
    self.assertEqual((result.shape, result.dtype), (x.shape, jnp.float32))
    np.testing.assert_allclose(result.reshape(-1), flat, atol=1e-6)

  def test_unknown_solver(self):
    with self.assertRaisesRegex(errors.UserError, "unknown solver 'heun'.*unipc"):
      solvers.solve("heun", nonlinear_denoiser, START, steps.inference_timesteps(2), schedules.FlowMatching())


if __name__ == "__main__":
  absltest.main()
