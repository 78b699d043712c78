"""The denoising objective: its timesteps, its prompt dropout, and its minimum at the exact posterior mean."""

import dataclasses
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import parameterization
from causvid_jax.diffusion import schedules
from causvid_jax.objectives import flow_matching

MEAN, STD = 0.7, 0.5
EXACT = (MEAN, STD, 0.0)


@dataclasses.dataclass
class Gaussian:
  """The posterior mean for data N(mean, std^2), as a `kind`, plus an offset; `calls` keeps the inputs."""
  schedule: Any
  kind: str
  calls: list[Any] = dataclasses.field(default_factory=list)

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    self.calls.append((x_t, timesteps, text, chunk_frames))
    mean, std, offset = variables["params"]
    alpha, sigma = self.schedule.alpha_sigma(schedules.expand(timesteps, x_t))
    x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    eps = parameterization.to_eps("x0", x0, x_t, alpha, sigma)
    return parameterization.target(self.kind, x0, eps, alpha, sigma) + offset


def gaussian(name, kind):
  schedule = schedules.get_schedule(name)
  return denoiser_lib.Denoiser(Gaussian(schedule, kind), schedule, kind)


def posterior_variance(kind, schedule, timesteps):
  """Var[target | x_t] for data of std STD: given x_t, every target is a constant plus a multiple of x_0."""
  alpha, sigma = (np.asarray(c, np.float64) for c in schedule.alpha_sigma(timesteps))
  variance = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
  slope = {"flow": (alpha + sigma) / sigma, "v": (alpha**2 + sigma**2) / sigma, "eps": alpha / sigma, "x0": 1}
  return slope[kind]**2 * variance


class TimestepsTest(parameterized.TestCase):

  def test_one_for_the_whole_clip(self):
    t = flow_matching.sample_timesteps(jax.random.key(0), 500, 6, shift=1.0)
    self.assertEqual((t.shape, t.dtype), ((500, 6), jnp.float32))
    np.testing.assert_array_equal(t, np.repeat(t[:, :1], 6, axis=1))
    self.assertLen(np.unique(t[:, 0]), 500)

  def test_an_independent_one_for_every_chunk(self):
    t = flow_matching.sample_timesteps(jax.random.key(0), 4000, 6, shift=1.0, chunk_frames=3)
    chunks = np.asarray(t).reshape(4000, 2, 3)
    np.testing.assert_array_equal(chunks, np.repeat(chunks[..., :1], 3, axis=2))
    self.assertLess(abs(np.corrcoef(chunks[:, 0, 0], chunks[:, 1, 0])[0, 1]), 0.05)

  @parameterized.parameters(1.0, 3.0, 8.0)
  def test_quantiles_of_the_shifted_distribution(self, shift):
    t = flow_matching.sample_timesteps(jax.random.key(1), 20000, 1, shift)
    q = np.linspace(0.05, 0.95, 10)
    expected = 1000 * shift * q / (1 + (shift - 1) * q)
    np.testing.assert_allclose(np.quantile(t, q), expected, rtol=0.03, atol=8)

  def test_clamped_after_the_shift(self):
    free = flow_matching.sample_timesteps(jax.random.key(2), 2000, 4, 8.0, 2)
    clamped = flow_matching.sample_timesteps(jax.random.key(2), 2000, 4, 8.0, 2, low=200.0, high=980.0)
    self.assertTrue(np.any(free < 200) and np.any(free > 980))
    np.testing.assert_array_equal(clamped, np.clip(free, 200.0, 980.0))


class DropTextTest(absltest.TestCase):

  def test_replaces_whole_prompts_at_the_rate(self):
    text = jax.random.normal(jax.random.key(0), (8000, 3, 2))
    null_text = jnp.array([[[7.0, 8], [9, 10], [11, 12]]])
    dropped = np.asarray(flow_matching.drop_text(jax.random.key(1), text, null_text, 0.1))
    replaced = np.any(dropped != text, axis=(1, 2))
    np.testing.assert_array_equal(dropped[replaced], np.repeat(null_text, replaced.sum(), axis=0))
    self.assertAlmostEqual(replaced.mean(), 0.1, delta=0.015)

  def test_rates_zero_and_one(self):
    text, null_text = jnp.ones((50, 3, 2)), jnp.zeros((1, 3, 2))
    np.testing.assert_array_equal(flow_matching.drop_text(jax.random.key(0), text, null_text, 0.0), 1.0)
    np.testing.assert_array_equal(flow_matching.drop_text(jax.random.key(0), text, null_text, 1.0), 0.0)


class LossTest(parameterized.TestCase):

  @parameterized.parameters("flow_matching", "variance_preserving")
  def test_least_at_the_posterior_mean(self, name):
    denoisers = [gaussian(name, kind) for kind in parameterization.KINDS]
    x0 = MEAN + STD * jax.random.normal(jax.random.key(0), (64, 4, 8, 8, 4))
    timesteps = jnp.tile(jnp.array([200.0, 450.0, 700.0, 900.0]), (64, 1))

    @jax.jit
    @jax.vmap
    def losses(params):
      text = jnp.zeros((64, 1, 1))
      return [flow_matching.denoising_loss(denoiser, params, x0, text, timesteps, jax.random.key(1))[0]
              for denoiser in denoisers]

    changes = np.array([[0, 0, 0], [0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0], [0, 0, 0.2]])
    for kind, values in zip(parameterization.KINDS, losses(tuple((EXACT + changes).T))):
      with self.subTest(kind):
        least, *others, with_offset = values
        variance = posterior_variance(kind, schedules.get_schedule(name), timesteps)
        np.testing.assert_allclose(least, variance.mean(), rtol=0.02)
        for loss in others:
          self.assertGreater(loss, 1.001 * least)
        # An offset of an unbiased output costs its square.
        self.assertAlmostEqual(with_offset, least + 0.04, delta=0.01)


class TeacherLossTest(parameterized.TestCase):

  @parameterized.parameters(None, 2)
  def test_hands_on_timesteps_prompts_and_chunks(self, chunk_frames):
    denoiser = gaussian("flow_matching", "flow")
    x0 = jax.random.normal(jax.random.key(0), (400, 4, 1, 2, 1))
    text, null_text = jnp.ones((400, 2, 3)), jnp.zeros((1, 2, 3))
    loss, _ = flow_matching.teacher_loss(
        denoiser, EXACT, x0, text, null_text, jax.random.key(1), shift=8.0, text_dropout=0.25,
        chunk_frames=chunk_frames)
    (x_t, t, seen_text, seen_chunk_frames), = denoiser.module.calls
    self.assertEqual(seen_chunk_frames, chunk_frames)
    self.assertAlmostEqual(1 - seen_text.mean(), 0.25, delta=0.07)
    self.assertAlmostEqual(np.median(t), 1000 * 4 / 4.5, delta=30)
    one_t = np.all(t == t[:, :1], axis=1)
    self.assertTrue(np.all(one_t) if chunk_frames is None else not np.any(one_t))
    sigma = t[:, :, None, None, None] / 1000
    noise = (x_t - (1 - sigma) * x0) / sigma
    flow = denoiser.module.apply({"params": EXACT}, x_t, t, text)
    np.testing.assert_allclose(loss, np.mean(np.square(flow - (noise - x0))), rtol=1e-3)


if __name__ == "__main__":
  absltest.main()
