"""The ODE regression: each chunk's step and state, clean chunks outside the loss, zero at perfection."""

import dataclasses
from typing import Any

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import schedules
from causvid_jax.objectives import ode

TIMESTEPS = np.array([1000.0, 960.0, 727.0, 0.0], np.float32)
SCHEDULE = schedules.FlowMatching()
CHUNK, FRAMES = 3, 6
MEAN, STD = 0.7, 0.5


@dataclasses.dataclass
class Stub:
  """A network that is the function `output` of (params, x_t, timesteps [B, F, 1, 1, 1]); keeps its inputs."""
  output: Any
  calls: list[Any] = dataclasses.field(default_factory=list)

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    self.calls.append((x_t, timesteps, text, chunk_frames))
    return self.output(variables["params"], x_t, schedules.expand(timesteps, x_t))


def student_of(output, prediction="x0"):
  return denoiser_lib.Denoiser(Stub(output), SCHEDULE, prediction)


def loss_of(student, states, params=0.0, timesteps=TIMESTEPS):
  text = jnp.zeros((states.shape[0], 2, 2))
  loss, _ = ode.ode_loss(
      student, params, states, text, jax.random.key(0), timesteps=timesteps, chunk_frames=CHUNK)
  return loss


def random_states(batch=5):
  return jax.random.normal(jax.random.key(1), (batch, len(TIMESTEPS), FRAMES, 2, 3, 2))


def gaussian_states(batch=5):
  """ODE states for data N(MEAN, STD^2): the ODE keeps (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)."""
  start = jax.random.normal(jax.random.key(2), (batch, 1, FRAMES, 2, 3, 2))
  sigma = (TIMESTEPS / 1000)[None, :, None, None, None, None]
  return (1 - sigma) * MEAN + np.sqrt((1 - sigma)**2 * STD**2 + sigma**2) * start


class OdeTest(absltest.TestCase):

  def test_each_chunk_takes_its_own_step_and_that_state(self):
    batch = 4000
    index = jnp.arange(len(TIMESTEPS), dtype=jnp.float32)[None, :, None, None, None, None]
    frame = jnp.arange(FRAMES, dtype=jnp.float32)[None, None, :, None, None, None]
    clip = jnp.arange(batch, dtype=jnp.float32)[:, None, None, None, None, None]
    student = student_of(lambda params, x_t, t: x_t)
    loss_of(student, clip * 100 + frame * 10 + index)
    (x_t, t, _, chunk_frames), = student.module.calls
    self.assertEqual(chunk_frames, CHUNK)
    code = np.asarray(x_t)[:, :, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(code // 10, np.arange(batch)[:, None] * 10 + np.arange(FRAMES))
    np.testing.assert_array_equal(TIMESTEPS[code % 10], t)
    steps = (code % 10).reshape(batch, FRAMES // CHUNK, CHUNK)
    self.assertTrue(np.all(steps == steps[..., :1]))
    joint = np.histogram2d(steps[:, 0, 0], steps[:, 1, 0], bins=4)[0] / batch
    np.testing.assert_allclose(joint, 1 / 16, atol=0.015)

  def test_value_counts_only_noised_chunks(self):
    states, student = random_states(), student_of(lambda params, x_t, t: 0.3 * x_t + t / 1000)
    value = loss_of(student, states)
    (x_t, t, _, _), = student.module.calls
    predictions = 0.3 * np.asarray(x_t, np.float64) + np.asarray(t)[:, :, None, None, None] / 1000
    errors = np.square(predictions - states[:, -1]).mean(axis=(2, 3, 4))
    self.assertTrue(0 < np.sum(t == 0) < t.size)
    self.assertAlmostEqual(value, errors[np.asarray(t) > 0].mean(), places=5)

  def test_outputs_at_clean_chunks_do_not_matter(self):
    states = random_states()
    good = loss_of(student_of(lambda params, x_t, t: x_t), states)
    spoilt = student_of(lambda params, x_t, t: jnp.where(t == 0, 1e3, x_t))
    self.assertEqual(loss_of(spoilt, states), good)

  def test_a_batch_of_clean_chunks_has_zero_loss_and_gradient(self):
    states = random_states()[:, -1:]
    student = student_of(lambda params, x_t, t: x_t + params)
    value, grad = jax.value_and_grad(
        lambda params: loss_of(student, states, params, timesteps=TIMESTEPS[-1:]))(1.0)
    self.assertEqual((value, grad), (0.0, 0.0))

  def test_converts_the_prediction(self):
    def flow(params, x_t, t):
      return (x_t - params) / jnp.maximum(t / 1000, 1e-6)
    states = random_states()
    as_x0 = loss_of(student_of(lambda params, x_t, t: jnp.full_like(x_t, params)), states, 0.4)
    self.assertAlmostEqual(loss_of(student_of(flow, "flow"), states, 0.4), as_x0, places=5)

  def test_a_perfect_student_has_zero_loss(self):
    def ode_end(stretch, x_t, t):
      sigma = t / 1000
      normal = (x_t - (1 - sigma) * MEAN) / jnp.sqrt((1 - sigma)**2 * STD**2 + sigma**2)
      return MEAN + stretch * STD * normal
    states, student = gaussian_states(), student_of(ode_end)
    self.assertLess(loss_of(student, states, 1.0), 1e-10)
    self.assertLess(abs(jax.grad(lambda stretch: loss_of(student, states, stretch))(1.0)), 1e-5)
    # The ends are N(MEAN, STD^2), so a student off by a factor of 1.2 is off by 0.2 STD.
    self.assertAlmostEqual(loss_of(student, gaussian_states(400), 1.2), 0.04 * STD**2, delta=0.001)


if __name__ == "__main__":
  absltest.main()
