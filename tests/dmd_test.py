"""The DMD objectives against closed forms for Gaussians, and the two-network loop on a Gaussian world."""

import dataclasses
import functools
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import parameterization
from causvid_jax.diffusion import schedules
from causvid_jax.objectives import dmd
from causvid_jax.training import state as state_lib

SCHEDULES = (("flow_matching", "flow", 8.0), ("variance_preserving", "v", 1.0))
REAL = {"mean": np.float32(0.7), "std": np.float32(0.5)}
FAKE = {"mean": np.float32(-0.4), "std": np.float32(1.3)}
STEPS = (1000.0, 750.0, 0.0)
# One shape for all tests, so that operations compile once; large enough for the statistics.
BATCH = 2000
OPTIONS = dmd.Options(timesteps=STEPS, chunk_frames=2, guidance=1.0)


@dataclasses.dataclass
class Gaussian:
  """The posterior mean for data N(mean + text, std^2), as a `kind`; `calls` keeps the inputs."""
  schedule: Any
  kind: str
  calls: list[Any] = dataclasses.field(default_factory=list)

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    self.calls.append((x_t, timesteps, text, chunk_frames))
    mean, std = variables["params"]["mean"], variables["params"]["std"]
    mean = mean + text[:, :1, :1, None, None]
    alpha, sigma = self.schedule.alpha_sigma(schedules.expand(timesteps, x_t))
    x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    eps = parameterization.to_eps("x0", x0, x_t, alpha, sigma)
    return parameterization.target(self.kind, x0, eps, alpha, sigma)


@dataclasses.dataclass
class Constant:
  """Returns its parameter whatever it is asked."""
  calls: list[Any] = dataclasses.field(default_factory=list)

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    self.calls.append((x_t, timesteps, text, chunk_frames))
    return jnp.broadcast_to(variables["params"], x_t.shape)


@dataclasses.dataclass
class Affine:
  """A student whose x_0 at pure noise is scale * noise + offset, as a prediction of `kind`."""
  kind: str

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    x0 = variables["params"]["scale"] * x_t + variables["params"]["offset"]
    return {"flow": x_t - x0, "v": -x0}[self.kind]


@dataclasses.dataclass
class LearntGaussian(Gaussian):
  """`Gaussian` with the logarithm of its std as the parameter."""

  def apply(self, variables, x_t, timesteps, text, chunk_frames=None):
    params = variables["params"]
    params = {"mean": params["mean"], "std": jnp.exp(params["log_std"])}
    return super().apply({"params": params}, x_t, timesteps, text, chunk_frames)


def gaussian(schedule, kind, stub=Gaussian):
  return denoiser_lib.Denoiser(stub(schedule, kind), schedule, kind)


def constant(prediction):
  return denoiser_lib.Denoiser(Constant(), schedules.FlowMatching(), prediction)


def clips(seed):
  return jax.random.normal(jax.random.key(seed), (BATCH, 4, 2, 2, 1))


def no_text(batch=BATCH):
  return jnp.zeros((batch, 2, 2)), jnp.zeros((1, 2, 2))


def coefficients(schedule, timesteps):
  """float64 (alpha, sigma), [B, F, 1, 1, 1]."""
  return (np.asarray(c, np.float64)[..., None, None, None] for c in schedule.alpha_sigma(timesteps))


def gaussian_score(params, x_t, alpha, sigma):
  return -(x_t - alpha * params["mean"]) / (alpha**2 * params["std"]**2 + sigma**2)


class GradientTest(parameterized.TestCase):

  @parameterized.parameters(*SCHEDULES)
  def test_closed_form(self, name, kind, shift):
    schedule = schedules.get_schedule(name)
    teacher, fake = gaussian(schedule, kind), gaussian(schedule, kind)
    # Clips of different sizes, so that each needs its own normalisation.
    samples = clips(0) * jnp.linspace(0.3, 5.0, BATCH)[:, None, None, None, None]
    options = dataclasses.replace(OPTIONS, shift=shift)
    grad = dmd.dmd_gradient(teacher, REAL, fake, FAKE, samples, *no_text(), jax.random.key(1), options)

    (x_t, t, _, _), = teacher.module.calls
    chex.assert_trees_all_equal(fake.module.calls[0][:2], (x_t, t))
    x_t, (alpha, sigma) = np.asarray(x_t, np.float64), coefficients(schedule, t)
    score_real, score_fake = (gaussian_score(p, x_t, alpha, sigma) for p in (REAL, FAKE))
    real = (x_t + sigma**2 * score_real) / alpha
    scale = np.abs(samples - real).mean(axis=(1, 2, 3, 4), keepdims=True)
    expected = sigma**2 / alpha * (score_fake - score_real) / scale
    np.testing.assert_allclose(grad, expected, rtol=2e-3, atol=2e-4)
    self.assertGreater(np.abs(expected).mean(), 0.05)

  @parameterized.parameters(*SCHEDULES)
  def test_noises_the_samples_with_standard_normal_noise(self, name, kind, shift):
    schedule = schedules.get_schedule(name)
    teacher, samples = gaussian(schedule, kind), 0.3 * clips(0)
    options = dataclasses.replace(OPTIONS, shift=shift)
    dmd.dmd_gradient(
        teacher, REAL, gaussian(schedule, kind), FAKE, samples, *no_text(), jax.random.key(1), options)
    (x_t, t, _, _), = teacher.module.calls
    alpha, sigma = coefficients(schedule, t)
    noise = (x_t - alpha * samples) / sigma
    self.assertAlmostEqual(noise.mean(), 0.0, delta=0.04)
    self.assertAlmostEqual(noise.std(), 1.0, delta=0.04)
    self.assertAlmostEqual((noise * samples).mean(), 0.0, delta=0.02)

  def test_equal_scores_give_no_gradient(self):
    schedule = schedules.FlowMatching()
    grad = dmd.dmd_gradient(gaussian(schedule, "flow"), REAL, gaussian(schedule, "flow"), REAL, clips(0),
                            *no_text(), jax.random.key(1), OPTIONS)
    np.testing.assert_array_equal(grad, 0.0)

  def test_one_timestep_a_clip_shifted_and_clamped(self):
    schedule = schedules.FlowMatching()
    teacher, fake = gaussian(schedule, "flow"), gaussian(schedule, "flow")
    dmd.dmd_gradient(teacher, REAL, fake, FAKE, clips(0), *no_text(), jax.random.key(2), OPTIONS)
    (_, t, _, chunk_frames), = teacher.module.calls
    self.assertIsNone(chunk_frames)
    np.testing.assert_array_equal(t, np.repeat(t[:, :1], 4, axis=1))
    self.assertEqual((t.min(), t.max()), (20.0, 980.0))
    # A uniform sigma exceeds q with probability 1 - q, and q comes out of the shift as 8 q / (1 + 7 q).
    for level in (300.0, 727.27, 900.0, 979.9):
      q = level / 1000 / (8 - 7 * level / 1000)
      self.assertAlmostEqual(np.mean(t[:, 0] > level), 1 - q, delta=0.04)

  def test_causal_scores_see_chunks(self):
    teacher, fake = (gaussian(schedules.FlowMatching(), "flow") for _ in range(2))
    options = dataclasses.replace(OPTIONS, teacher_chunk_frames=2)
    dmd.dmd_gradient(teacher, REAL, fake, FAKE, clips(0), *no_text(), jax.random.key(0), options)
    self.assertEqual([teacher.module.calls[0][3], fake.module.calls[0][3]], [2, 2])


class GuidanceTest(parameterized.TestCase):

  def test_scale_one_is_one_call_without_the_null_prompt(self):
    teacher = gaussian(schedules.FlowMatching(), "flow")
    x_t, t, text = clips(0), jnp.full((BATCH, 4), 600.0), jnp.full((BATCH, 2, 2), 0.9)
    guided = teacher.guided_x0(REAL, x_t, t, text, jnp.full((1, 2, 2), jnp.nan), 1.0)
    self.assertLen(teacher.module.calls, 1)
    self.assertEqual(teacher.module.calls[0][0].shape, x_t.shape)
    np.testing.assert_array_equal(guided, teacher.x0(REAL, x_t, t, text))

  @parameterized.parameters(0.0, 4.5)
  def test_usual_form(self, scale):
    teacher = gaussian(schedules.FlowMatching(), "flow")
    x_t, t = clips(0), jnp.full((BATCH, 4), 600.0)
    text, null_text = jax.random.normal(jax.random.key(1), (BATCH, 2, 2)), jnp.full((1, 2, 2), -0.5)
    guided = teacher.guided_x0(REAL, x_t, t, text, null_text, scale)
    self.assertLen(teacher.module.calls, 1)
    cond = teacher.x0(REAL, x_t, t, text)
    uncond = teacher.x0(REAL, x_t, t, jnp.broadcast_to(null_text, text.shape))
    np.testing.assert_allclose(guided, uncond + scale * (cond - uncond), atol=1e-6)

  def test_gradient_guides_the_teacher_alone(self):
    schedule = schedules.FlowMatching()
    teacher, fake = gaussian(schedule, "flow"), gaussian(schedule, "flow")
    samples, text, null_text = clips(0), jnp.full((BATCH, 2, 2), 0.9), jnp.full((1, 2, 2), -0.5)
    options = dataclasses.replace(OPTIONS, guidance=4.5)
    grad = dmd.dmd_gradient(teacher, REAL, fake, FAKE, samples, text, null_text, jax.random.key(1), options)
    self.assertEqual((len(teacher.module.calls), len(fake.module.calls)), (1, 1))
    x_t, t, _, _ = fake.module.calls[0]
    cond = np.asarray(teacher.x0(REAL, x_t, t, text))
    uncond = np.asarray(teacher.x0(REAL, x_t, t, jnp.broadcast_to(null_text, text.shape)))
    real = uncond + 4.5 * (cond - uncond)
    scale = np.abs(samples - real).mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(grad, (fake.x0(FAKE, x_t, t, text) - real) / scale, rtol=1e-4, atol=1e-5)


class StudentTest(absltest.TestCase):

  def test_every_chunk_takes_its_own_step(self):
    student = constant("flow")
    dmd.student_samples(student, jnp.float32(0), clips(0), no_text()[0], jax.random.key(0), OPTIONS)
    (_, t, _, chunk_frames), = student.module.calls
    self.assertEqual(chunk_frames, 2)
    np.testing.assert_array_equal(t[:, 0::2], t[:, 1::2])
    joint = np.array([[np.mean((t[:, 0] == a) & (t[:, 2] == b)) for a in STEPS] for b in STEPS])
    np.testing.assert_allclose(joint, 1 / 9, atol=0.03)

  def test_inputs_are_noised_and_clean_chunks_pass_through(self):
    student, x0 = constant("flow"), clips(3)
    samples = dmd.student_samples(student, jnp.float32(0.3), x0, no_text()[0], jax.random.key(0), OPTIONS)
    x_t, t = (np.asarray(x) for x in student.module.calls[0][:2])
    x0, samples = np.asarray(x0), np.asarray(samples)
    np.testing.assert_array_equal(samples[t == 0], x0[t == 0])
    np.testing.assert_allclose(samples[t == 750], x_t[t == 750] - 0.75 * 0.3, rtol=1e-6, atol=1e-6)
    for timestep, sigma in ((750, 0.75), (1000, 1.0)):
      noise = (x_t - (1 - sigma) * x0)[t == timestep] / sigma
      self.assertAlmostEqual(noise.mean(), 0.0, delta=0.03)
      self.assertAlmostEqual(noise.std(), 1.0, delta=0.03)
      self.assertAlmostEqual((noise * x0[t == timestep]).mean(), 0.0, delta=0.03)


class LossTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.teacher, self.fake = (gaussian(schedules.FlowMatching(), "flow") for _ in range(2))
    self.x0, self.output, self.key = clips(4), clips(5), jax.random.key(6)

  def generator_loss(self, student, output, real=REAL, fake=FAKE):
    return dmd.generator_loss(
        student, output, self.teacher, real, self.fake, fake, self.x0, *no_text(), self.key, OPTIONS)

  def test_generator_gradient_is_the_dmd_gradient(self):
    # The parameters are the samples.
    (loss, metrics), grad = jax.value_and_grad(
        lambda output: self.generator_loss(constant("x0"), output), has_aux=True)(self.output)
    expected = dmd.dmd_gradient(self.teacher, REAL, self.fake, FAKE, self.output, *no_text(),
                                jax.random.split(self.key)[1], OPTIONS)
    np.testing.assert_allclose(grad, expected / self.output.size, rtol=1e-4, atol=1e-8)
    self.assertAlmostEqual(loss, 0.5 * np.mean(np.square(expected)), places=4)
    self.assertAlmostEqual(metrics["dmd_gradient"], np.mean(np.abs(expected)), places=5)

  def test_clean_chunks_get_no_gradient(self):
    student = constant("flow")
    grad = jax.grad(lambda output: self.generator_loss(student, output)[0])(self.output)
    (_, t, _, _), = student.module.calls
    clean = np.asarray(t) == 0
    self.assertTrue(clean.any() and not clean.all())
    np.testing.assert_array_equal(grad[clean], 0.0)
    self.assertTrue(np.all(grad[~clean] != 0))

  def test_scores_get_no_gradient_from_the_generator(self):
    loss = lambda real, fake: self.generator_loss(constant("x0"), self.output, real, fake)[0]
    for grad in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(REAL, FAKE)):
      self.assertEqual(grad, 0.0)

  def test_fake_loss_denoises_the_students_samples(self):
    def loss(output, fake):
      return dmd.fake_loss(
          constant("x0"), output, self.fake, fake, self.x0, no_text()[0], self.key, OPTIONS)[0]
    student_grad, fake_grad = jax.grad(loss, argnums=(0, 1))(self.output, FAKE)
    np.testing.assert_array_equal(student_grad, 0.0)
    self.assertTrue(all(grad != 0 for grad in fake_grad.values()))

    self.fake.module.calls.clear()
    value = loss(self.output, FAKE)
    (x_t, t, text, _), = self.fake.module.calls
    np.testing.assert_array_equal(t, jnp.broadcast_to(t[:, :1], t.shape))
    alpha, sigma = coefficients(self.fake.schedule, t)
    noise = (x_t - alpha * self.output) / sigma
    self.assertAlmostEqual(noise.std(), 1.0, delta=0.04)
    flow = self.fake.module.apply({"params": FAKE}, x_t, t, text)
    self.assertAlmostEqual(value, np.mean(np.square(flow - (noise - self.output))), delta=1e-4)

  def test_each_loss_draws_its_own_noise(self):
    self.generator_loss(constant("x0"), self.output)
    x_t = self.fake.module.calls[0][0]
    dmd.fake_loss(constant("x0"), self.output, self.fake, FAKE, self.x0, no_text()[0], self.key, OPTIONS)
    self.assertGreater(jnp.min(jnp.abs(self.fake.module.calls[1][0] - x_t)), 0)


class ConvergenceTest(parameterized.TestCase):

  def optimizer(self, learning_rate, num_updates):
    return state_lib.create_optimizer(ml_collections.ConfigDict(dict(
        learning_rate=learning_rate, warmup=10, final_lr_ratio=0.01, clip_norm=10.0, b1=0.5, b2=0.99,
        weight_decay=0.0, max_skipped=0)), num_updates)

  @parameterized.parameters(*SCHEDULES)
  def test_the_two_network_loop_finds_the_data(self, name, kind, shift):
    """From N(-2, 2^2) to N(0.7, 0.5^2), with five updates of the fake score to each of the student."""
    num_updates, batch, schedule = 600, 32, schedules.get_schedule(name)
    teacher, fake = gaussian(schedule, kind), gaussian(schedule, kind, LearntGaussian)
    student = denoiser_lib.Denoiser(Affine(kind), schedule, kind)
    options = dataclasses.replace(OPTIONS, timesteps=(1000.0, 0.0), shift=shift)
    text, null_text = no_text(batch)
    slow, fast = self.optimizer(0.02, num_updates), self.optimizer(0.04, 5 * num_updates)

    def data(key):
      return REAL["mean"] + REAL["std"] * jax.random.normal(key, (batch, 4, 2, 2, 1))

    def fake_update(generator, fake_state, key):
      data_key, loss_key = jax.random.split(key)
      loss = lambda params, x0, key: dmd.fake_loss(
          student, generator.params, fake, params, x0, text, key, options)
      grads, _ = state_lib.gradients(loss, fake_state.params, data(data_key), loss_key, microbatches=1)
      return state_lib.update(fake_state, grads, fast)[0], None

    def generator_update(states, key):
      generator, fake_state = states
      data_key, loss_key, *fake_keys = jax.random.split(key, 7)
      fake_state, _ = jax.lax.scan(
          functools.partial(fake_update, generator), fake_state, jnp.stack(fake_keys))
      loss = lambda params, x0, key: dmd.generator_loss(
          student, params, teacher, REAL, fake, fake_state.params, x0, text, null_text, key, options)
      grads, _ = state_lib.gradients(loss, generator.params, data(data_key), loss_key, microbatches=1)
      return (state_lib.update(generator, grads, slow)[0], fake_state), None

    generator = state_lib.create({"scale": jnp.float32(2.0), "offset": jnp.float32(-2.0)}, slow)
    fake_state = state_lib.create({"mean": jnp.float32(0.0), "log_std": jnp.float32(0.0)}, fast)
    keys = jax.random.split(jax.random.key(0), num_updates)
    generator, fake_state = jax.jit(
        lambda states: jax.lax.scan(generator_update, states, keys)[0])((generator, fake_state))

    noise = jax.random.normal(jax.random.key(1), (4096, 4, 2, 2, 1))
    samples = student.x0(generator.params, noise, jnp.full((4096, 4), 1000.0), no_text(4096)[0], 2)
    self.assertAlmostEqual(samples.mean(), REAL["mean"], delta=0.05 * REAL["mean"])
    self.assertAlmostEqual(samples.std(), REAL["std"], delta=0.05 * REAL["std"])
    # The fake score's own estimate of what the student makes.
    self.assertAlmostEqual(fake_state.params["mean"], REAL["mean"], delta=0.1 * REAL["mean"])
    self.assertAlmostEqual(jnp.exp(fake_state.params["log_std"]), REAL["std"], delta=0.1 * REAL["std"])


if __name__ == "__main__":
  absltest.main()
