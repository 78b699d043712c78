"""Noise schedules, parameterisations, step lists and guidance against hand-computed values and identities."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.diffusion import guidance
from causvid_jax.diffusion import parameterization
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import steps

SCHEDULES = ("flow_matching", "variance_preserving")


class SchedulesTest(parameterized.TestCase):

  def test_flow_matching_values(self):
    alpha, sigma = schedules.FlowMatching().alpha_sigma(jnp.array([[0.0, 250.0], [727.0, 1000.0]]))
    np.testing.assert_allclose(alpha, [[1.0, 0.75], [0.273, 0.0]], atol=1e-7)
    np.testing.assert_allclose(sigma, [[0.0, 0.25], [0.727, 1.0]], atol=1e-7)

  def test_variance_preserving_matches_a_plain_product(self):
    schedule = schedules.VariancePreserving(zero_terminal_snr=False)
    alpha_bar, expected = 1.0, {}
    for i in range(1000):
      root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
      alpha_bar *= 1 - root**2
      expected[i] = alpha_bar
    index = jnp.array([1, 247, 502, 748, 999])
    alpha, sigma = schedule.alpha_sigma(index.astype(jnp.float32))
    np.testing.assert_allclose(alpha**2, [expected[int(i)] for i in index], rtol=2e-6)
    np.testing.assert_allclose(sigma**2, [1 - expected[int(i)] for i in index], rtol=2e-6)

  def test_zero_terminal_snr_rescales_linearly(self):
    times = jnp.array([1.0, 247.0, 748.0])
    plain = schedules.VariancePreserving(zero_terminal_snr=False).alpha_sigma(times)[0]
    rescaled = schedules.VariancePreserving().alpha_sigma(times)[0]
    first, last = np.sqrt(1 - 0.00085), 0.06826492
    np.testing.assert_allclose(rescaled, (plain - last) * first / (first - last), atol=1e-6)

  @parameterized.parameters(*SCHEDULES)
  def test_ends_are_exact(self, name):
    alpha, sigma = jax.jit(schedules.get_schedule(name).alpha_sigma)(jnp.array([0.0, 1000.0]))
    np.testing.assert_array_equal(alpha, [1.0, 0.0])
    np.testing.assert_array_equal(sigma, [0.0, 1.0])

  def test_variance_preserving_ends_in_pure_noise_from_step_999(self):
    alpha, sigma = jax.jit(schedules.VariancePreserving().alpha_sigma)(jnp.array([998.0, 999.0, 999.5]))
    self.assertGreater(alpha[0], 0)
    np.testing.assert_array_equal(alpha[1:], [0.0, 0.0])
    np.testing.assert_array_equal(sigma[1:], [1.0, 1.0])

  def test_variance_is_preserved_between_steps_and_noise_grows(self):
    alpha, sigma = schedules.VariancePreserving().alpha_sigma(jnp.linspace(0, 999, 4321))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=5e-7)
    self.assertTrue(np.all(np.diff(alpha) < 0))

  @parameterized.parameters(*SCHEDULES)
  def test_timesteps_of_sigma_inverts(self, name):
    schedule = schedules.get_schedule(name)
    times = jnp.linspace(0, 900, 777).reshape(7, 111)
    np.testing.assert_allclose(schedule.timesteps_of_sigma(schedule.alpha_sigma(times)[1]), times, atol=0.02)

  @parameterized.parameters(*SCHEDULES)
  def test_add_noise_gives_each_frame_its_own_level(self, name):
    schedule = schedules.get_schedule(name)
    x0, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 4, 3))
    times = jnp.array([[0.0, 1000.0, 300.0], [500.0, 0.0, 1000.0]])
    noisy = jax.jit(schedules.add_noise, static_argnums=0)(schedule, x0, noise, times)
    np.testing.assert_array_equal(noisy[0, 0], x0[0, 0])
    np.testing.assert_array_equal(noisy[0, 1], noise[0, 1])
    np.testing.assert_array_equal(noisy[1, 2], noise[1, 2])
    alpha, sigma = schedule.alpha_sigma(jnp.float32(500.0))
    np.testing.assert_allclose(noisy[1, 0], alpha * x0[1, 0] + sigma * noise[1, 0], atol=1e-6)

  def test_unknown_schedule(self):
    with self.assertRaisesRegex(errors.UserError, "unknown noise schedule 'cosine'.*flow_matching"):
      schedules.get_schedule("cosine")


class ParameterizationTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # The last axes repeat (B, F) = (2, 3): coefficients matched to the wrong axes show as wrong values.
    self.x0, self.eps = jax.random.normal(jax.random.key(1), (2, 2, 3, 4, 2, 3))

  @parameterized.product(kind=parameterization.KINDS, name=SCHEDULES)
  def test_round_trip(self, kind, name):
    schedule = schedules.get_schedule(name)
    times = jnp.array([[20.0, 300.0, 500.0], [727.0, 900.0, 980.0]])
    alpha, sigma = schedule.alpha_sigma(times)
    x_t = schedules.add_noise(schedule, self.x0, self.eps, times)
    prediction = parameterization.target(kind, self.x0, self.eps, alpha, sigma)
    chex.assert_trees_all_close(
        (
            parameterization.to_x0(kind, prediction, x_t, alpha, sigma),
            parameterization.to_eps(kind, prediction, x_t, alpha, sigma),
            parameterization.score(self.x0, x_t, alpha, sigma) * schedules.expand(sigma, x_t),
        ),
        (self.x0, self.eps, -self.eps),
        atol=1e-4,
    )

  def test_targets_are_the_velocities(self):
    alpha, sigma = 0.6, 0.8
    flow = parameterization.target("flow", self.x0, self.eps, alpha, sigma)
    v = parameterization.target("v", self.x0, self.eps, alpha, sigma)
    np.testing.assert_allclose(flow, self.eps - self.x0, rtol=1e-6)
    np.testing.assert_allclose(v, 0.6 * self.eps - 0.8 * self.x0, rtol=1e-5, atol=1e-6)

  @parameterized.parameters("flow", "v", "eps")
  def test_clean_end(self, kind):
    x0 = parameterization.to_x0(kind, self.eps, self.x0, 1.0, 0.0)
    np.testing.assert_array_equal(x0, self.x0)

  @parameterized.parameters("flow", "v", "x0")
  def test_noise_end(self, kind):
    eps = parameterization.to_eps(kind, self.x0, self.eps, 0.0, 1.0)
    np.testing.assert_array_equal(eps, self.eps)

  def test_undetermined_quantities_are_zero_with_finite_gradients(self):
    cases = (
        lambda p: parameterization.to_x0("eps", p, self.x0, jnp.zeros((2, 3)), jnp.ones((2, 3))),
        lambda p: parameterization.to_eps("x0", p, self.x0, jnp.ones((2, 3)), jnp.zeros((2, 3))),
        lambda p: parameterization.score(p, self.x0, jnp.ones((2, 3)), jnp.zeros((2, 3))),
    )
    for fn in cases:
      value, grad = jax.value_and_grad(lambda p, fn=fn: fn(p).sum())(self.eps)
      self.assertEqual(value, 0.0)
      chex.assert_tree_all_finite(grad)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(errors.UserError, "unknown prediction kind 'velocity'"):
      parameterization.target("velocity", self.x0, self.eps, 1.0, 0.0)


class StepsTest(parameterized.TestCase):

  def test_shift(self):
    np.testing.assert_allclose(steps.shift_sigma(np.array([0.0, 0.25, 0.5, 1.0]), 8.0), [0, 8 / 11, 8 / 9, 1])
    np.testing.assert_allclose(steps.shift_timesteps(jnp.array([500.0]), 5.0), [5000 / 6], rtol=1e-6)

  @parameterized.parameters(
      (4, 8.0, [1000, 960, 8000 / 9, 8000 / 11, 0]),
      (1, 8.0, [1000, 0]),
      (2, 1.0, [1000, 500, 0]),
      ([999, 748, 502, 247], 1.0, [999, 748, 502, 247, 0]),
      ([1000, 757, 522], 8.0, [1000, 757, 522, 0]),
      ((1000, 757, 522, 0), 8.0, [1000, 757, 522, 0]),
  )
  def test_student_timesteps(self, spec, shift, expected):
    result = steps.student_timesteps(spec, shift)
    self.assertEqual(result.dtype, np.float32)
    np.testing.assert_array_equal(result, np.array(expected, np.float32))

  @parameterized.parameters(([],), ([0],), ([500, 750],), ([1001, 500],), ([500, -1],), ([500, 500],))
  def test_bad_student_lists(self, spec):
    with self.assertRaisesRegex(errors.UserError, "strictly decreasing"):
      steps.student_timesteps(spec)

  def test_inference_timesteps(self):
    np.testing.assert_array_equal(steps.inference_timesteps(4), [1000, 750, 500, 250, 0])
    result = steps.inference_timesteps(50, 8.0)
    self.assertEqual((result.shape, result[0], result[-1]), ((51,), 1000, 0))
    # Step 49: sigma = 0.02, so 8 * 0.02 / (1 + 7 * 0.02) = 0.16 / 1.14.
    np.testing.assert_allclose(result[49], 160 / 1.14, rtol=1e-6)

  @parameterized.parameters((0, 8.0), (4, 0.0))
  def test_bad_inference_steps(self, num_steps, shift):
    with self.assertRaisesRegex(errors.UserError, "num_steps >= 1 and shift > 0"):
      steps.inference_timesteps(num_steps, shift)


class GuidanceTest(absltest.TestCase):

  def test_usual_form(self):
    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_allclose(guidance.classifier_free(cond, uncond, 6.0), [3.5, -3.0])
    np.testing.assert_array_equal(guidance.classifier_free(cond, uncond, 1.0), cond)
    np.testing.assert_array_equal(guidance.classifier_free(cond, uncond, 0.0), uncond)

  def test_the_authors_form(self):
    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    self.assertEqual(guidance.scale_from_authors(3.5), 4.5)
    ours = guidance.classifier_free(cond, uncond, guidance.scale_from_authors(3.5))
    np.testing.assert_allclose(ours, cond + 3.5 * (cond - uncond), rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
