"""The VAE's objective against closed forms, with an identity VAE whose latents have a given variance."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.objectives import vae as objective


@dataclasses.dataclass
class Identity:
  """Encodes a video to itself with the log variance of its parameters, and decodes latents to themselves."""

  def apply(self, variables, x, method):
    if method == "moments":
      return x, jnp.full_like(x, variables["params"])
    assert method == "decode"
    return x


class KlTest(absltest.TestCase):

  def test_matches_the_integral(self):
    mean, log_var = np.array([0.0, 0.5, -1.5]), np.array([0.0, -1.0, 0.7])
    z = np.linspace(-15, 15, 200001)[:, None]
    log_q = -0.5 * ((z - mean)**2 / np.exp(log_var) + log_var + np.log(2 * np.pi))
    log_p = -0.5 * (z**2 + np.log(2 * np.pi))
    integral = np.trapezoid(np.exp(log_q) * (log_q - log_p), z, axis=0)
    np.testing.assert_allclose(objective.gaussian_kl(mean, log_var), integral.mean(), rtol=1e-5)

  def test_zero_only_at_the_standard_normal(self):
    self.assertEqual(objective.gaussian_kl(jnp.zeros(3), jnp.zeros(3)), 0.0)
    self.assertGreater(objective.gaussian_kl(jnp.zeros(3), jnp.full(3, 0.1)), 0.0)


class LossTest(parameterized.TestCase):

  @parameterized.parameters((-4.0, 0.0), (-2.0, 0.5))
  def test_closed_form_of_noise(self, log_var, kl_weight):
    video = jax.random.uniform(jax.random.key(0), (2, 5, 40, 40, 3), minval=-1.0)
    loss, metrics = objective.vae_loss(Identity(), log_var, video, jax.random.key(1), kl_weight)
    std = np.exp(log_var / 2)
    kl = 0.5 * (np.square(video).mean() + std**2 - 1 - log_var)
    np.testing.assert_allclose(loss, std * np.sqrt(2 / np.pi) + std**2 + kl_weight * kl, rtol=0.01)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    # Pixels in [0, 1] are half as far apart as in [-1, 1].
    np.testing.assert_allclose(metrics["psnr"], 20 * np.log10(2 / std), atol=0.1)
    np.testing.assert_array_equal(metrics["loss"], loss)

  def test_draws_from_its_key(self):
    video = jnp.zeros((1, 1, 4, 4, 3))
    values = [objective.vae_loss(Identity(), 0.0, video, jax.random.key(i), 0.0)[0] for i in (0, 0, 1)]
    self.assertEqual(values[0], values[1])
    self.assertNotEqual(values[0], values[2])

  def test_extreme_log_variances_stay_finite(self):
    video = jnp.zeros((1, 1, 4, 4, 3))
    for log_var in (-1e4, 1e4):
      loss, grad = jax.value_and_grad(
          lambda params: objective.vae_loss(Identity(), params, video, jax.random.key(0), 1e-6)[0])(log_var)
      self.assertTrue(np.isfinite(loss) and np.isfinite(grad))


if __name__ == "__main__":
  absltest.main()
