"""Sampling: scan, loop and stream agree; the cache changes nothing; keys, lengths and endless streams."""

import dataclasses
import itertools
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import guidance
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import solvers
from causvid_jax.diffusion import steps
from causvid_jax.models import kv_cache
from causvid_jax.models import transformer
from causvid_jax.sampling import bidirectional
from causvid_jax.sampling import causal
import tiny

FRAME = (4, 4, 4)  # [H, W, C] of a latent frame
CHUNK, CHUNKS = 2, 3
BATCH = 2
MODULE = transformer.WanTransformer(transformer.PRESETS["test"])
DENOISER = denoiser_lib.Denoiser(MODULE, schedules.FlowMatching(), "flow")
STEPS = tuple(map(float, steps.student_timesteps(3, 3.0)))
# Sink and window hold the two chunks before the third, so nothing has left the cache.
CACHE = {"chunk_frames": CHUNK, "sink_frames": CHUNK, "window_frames": CHUNK}
SAMPLER = causal.CausalSampler(DENOISER, STEPS, **CACHE)
KEY = jax.random.key(7)
PROMPTS = ["a red seven moving left", "a blue two moving up"]

START = jax.jit(SAMPLER.start, static_argnames="frame_shape")
STEP = jax.jit(SAMPLER.step)
SCAN = jax.jit(SAMPLER.sample, static_argnames=("num_chunks", "frame_shape"))
EXTEND = jax.jit(lambda params, x_t, t, text_kv, cache: MODULE.apply(
    {"params": params}, x_t, jnp.full(x_t.shape[:2], t), text_kv, cache, method="extend"))
WRITE = jax.jit(kv_cache.write)
# The whole clip without a cache: past chunks clean at t = 0, the current one at t.
FULL_X0 = jax.jit(lambda params, x, t, text: DENOISER.x0(params, x, t, text, CHUNK))


def texts(seed, batch=BATCH):
  config = MODULE.config
  return jax.random.normal(jax.random.key(seed), (batch, config.text_tokens, config.text_dim))


def zeros(batch=BATCH):
  return jnp.zeros((batch, CHUNK, *FRAME))


def after(past, x_t, t):
  """The clip so far and the timesteps of its frames, for `FULL_X0`; padded to one compiled length.

  What pads it comes later than the chunk at hand, which cannot see it.
  """
  padding = jnp.full((x_t.shape[0], (CHUNKS - 1) * CHUNK - past.shape[1], *FRAME), 9.0)
  timesteps = np.repeat([0.0, t, 500.0], [past.shape[1], CHUNK, padding.shape[1]])
  return jnp.concatenate([past, x_t, padding], axis=1), jnp.tile(jnp.float32(timesteps), (x_t.shape[0], 1))


def recomputed_x0(params, past, x_t, t, text):
  first = past.shape[1]
  return FULL_X0(params, *after(past, x_t, t), text)[:, first:first + CHUNK]


def relative_error(x, reference):
  return float(jnp.linalg.norm(x - reference) / jnp.linalg.norm(reference))


class CausalSamplerTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    tiny.compile_fast(cls, pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())))
    cls.params, cls.text = tiny.randomized(MODULE, 0), texts(1)
    cls.cache, cls.text_kv = START(cls.params, cls.text, cls.text[:1], frame_shape=FRAME)
    cls.latents = SCAN(cls.params, cls.text, cls.text[:1], KEY, num_chunks=CHUNKS, frame_shape=FRAME)

  def test_scan_equals_a_loop_over_step(self):
    cache, chunks = self.cache, []
    for i in range(CHUNKS):
      cache, x0 = STEP(self.params, cache, self.text_kv, jax.random.fold_in(KEY, i), zeros())
      chunks.append(x0)
    self.assertEqual(self.latents.shape, (BATCH, CHUNKS * CHUNK, *FRAME))
    np.testing.assert_allclose(self.latents, jnp.concatenate(chunks, axis=1), atol=1e-5)
    self.assertEqual(int(cache.frames), CHUNKS * CHUNK)

  def test_equals_recomputing_every_clip_without_a_cache(self):
    past = zeros()[:, :0]
    for i in range(CHUNKS):
      x0 = zeros()
      for t, key in zip(STEPS, jax.random.split(jax.random.fold_in(KEY, i), len(STEPS))):
        x_t = (1 - t / 1000) * x0 + t / 1000 * jax.random.normal(key, x0.shape)
        x0 = recomputed_x0(self.params, past, x_t, t, self.text)
      past = jnp.concatenate([past, x0], axis=1)
    self.assertLess(relative_error(self.latents, past), 1e-5)
    # The reference is one: the last chunk does depend on the first, so a wrong cache would show.
    changed = recomputed_x0(self.params, past[:, :-CHUNK].at[:, 0].add(1.0), x_t, 500.0, self.text)
    unchanged = recomputed_x0(self.params, past[:, :-CHUNK], x_t, 500.0, self.text)
    self.assertGreater(relative_error(changed, unchanged), 1e-3)

  def test_the_clean_pass_keeps_the_estimate_and_writes_its_keys(self):
    cache, x0 = STEP(self.params, self.cache, self.text_kv, KEY, zeros())
    estimate = zeros()
    for t, key in zip(STEPS[:-1], jax.random.split(KEY, len(STEPS))):
      x_t = (1 - t / 1000) * estimate + t / 1000 * jax.random.normal(key, estimate.shape)
      output, noisy = EXTEND(self.params, x_t, t, self.text_kv, self.cache)
      estimate = x_t - t / 1000 * output
    np.testing.assert_allclose(x0, estimate, atol=1e-5)
    _, clean = EXTEND(self.params, x0, 0.0, self.text_kv, self.cache)
    chex.assert_trees_all_close(cache, WRITE(self.cache, clean), atol=1e-5)
    self.assertGreater(float(jnp.abs(WRITE(self.cache, noisy).k - cache.k).max()), 1e-2)

  def test_every_pass_has_fresh_noise(self):
    # A network that always answers "x_0 = 0" leaves nothing but noise in what it is given.
    seen = []
    denoiser = denoiser_lib.Denoiser(_Recorder(seen), schedules.FlowMatching(), "x0")
    sampler = causal.CausalSampler(denoiser, (1000.0, 700.0, 400.0, 0.0), CHUNK, 0, CHUNK)
    cache = kv_cache.create(MODULE.config, 1, 4, 0, CHUNK)
    jax.block_until_ready(jax.jit(sampler.step)({}, cache, None, KEY, jnp.zeros((1, CHUNK, *FRAME))))
    jax.effects_barrier()
    noises = [np.asarray(x_t).ravel() / (t / 1000) for x_t, t in seen if t > 0]
    self.assertLen(noises, 3)
    for a, b in itertools.combinations(noises, 2):
      self.assertLess(abs(np.corrcoef(a, b)[0, 1]), 0.35)  # 128 numbers: four standard deviations
    np.testing.assert_array_equal(seen[-1][0], 0)

  def test_videos_of_a_batch_do_not_meet(self):
    other = self.text.at[0].set(texts(2)[0])
    latents = SCAN(self.params, other, other[:1], KEY, num_chunks=CHUNKS, frame_shape=FRAME)
    np.testing.assert_allclose(latents[1], self.latents[1], atol=1e-6)
    self.assertGreater(float(jnp.abs(latents[0] - self.latents[0]).max()), 1e-2)

  def test_endless_in_constant_memory(self):
    step = jax.jit(SAMPLER.step, donate_argnums=1)
    cache = jax.tree.map(jnp.copy, self.cache)
    last = None
    for i in range(40):
      cache, latents = step(self.params, cache, self.text_kv, jax.random.fold_in(KEY, i), zeros())
      chex.assert_trees_all_equal_shapes_and_dtypes(cache, self.cache)
      chex.assert_tree_all_finite(latents)
      self.assertTrue(last is None or jnp.any(latents != last))
      last = latents
    self.assertEqual(int(cache.frames), 40 * CHUNK)
    self.assertEqual(step._cache_size(), 1)  # one program, however long

  @parameterized.parameters(1.0, 3.0)
  def test_causal_teacher_equals_the_ode_of_each_chunk(self, scale):
    timesteps = tuple(map(float, steps.inference_timesteps(4, 3.0)))
    sampler = causal.CausalTeacherSampler(DENOISER, timesteps, **CACHE, solver="unipc", guidance=scale)
    null_text = texts(5, 1)
    latents = jax.jit(sampler.sample, static_argnums=(4, 5))(self.params, self.text, null_text, KEY, CHUNKS, FRAME)

    @jax.jit
    def chunk_of(noise, clip, position):
      """The ODE of the chunk at `position` of a clip whose earlier chunks are clean."""
      def x0_fn(x, t):
        x = jax.lax.dynamic_update_slice_in_dim(clip, x, position, axis=1)
        t = jnp.broadcast_to(jnp.where(jnp.arange(x.shape[1]) < position, 0.0, t), x.shape[:2])
        cond = DENOISER.x0(self.params, x, t, self.text, CHUNK)
        if scale != 1.0:
          uncond = DENOISER.x0(self.params, x, t, jnp.broadcast_to(null_text, self.text.shape), CHUNK)
          cond = guidance.classifier_free(cond, uncond, scale)
        return jax.lax.dynamic_slice_in_dim(cond, position, CHUNK, axis=1)
      return solvers.solve("unipc", x0_fn, noise, np.float32(timesteps), DENOISER.schedule)

    clip = jnp.zeros_like(latents)
    for i in range(CHUNKS):
      chunk = chunk_of(jax.random.normal(jax.random.fold_in(KEY, i), zeros().shape), clip, i * CHUNK)
      clip = jax.lax.dynamic_update_slice_in_dim(clip, chunk, i * CHUNK, axis=1)
    self.assertLess(relative_error(latents, clip), 1e-5)

  def test_bidirectional_trajectory_runs_from_the_noise_to_the_sample(self):
    timesteps = tuple(map(float, steps.inference_timesteps(4, 3.0)))
    noise = jax.random.normal(KEY, self.latents.shape)
    for solver in ("euler", "unipc"):
      sampler = bidirectional.BidirectionalSampler(DENOISER, timesteps, solver, 2.0)
      run = jax.jit(sampler.sample, static_argnums=4)
      states = run(self.params, noise, self.text, self.text[:1], True)
      self.assertEqual(states.shape, (5, *noise.shape))
      np.testing.assert_array_equal(states[0], noise)
      np.testing.assert_allclose(states[-1], run(self.params, noise, self.text, self.text[:1], False), atol=1e-5)


@dataclasses.dataclass
class _Recorder:
  """Stands in for the network: keeps what it is given, and predicts zeros."""
  seen: list

  def apply(self, variables, x_t, timesteps, text_kv, cache, method):
    jax.debug.callback(lambda x, t: self.seen.append((np.array(x), float(t))), x_t, timesteps[0, 0], ordered=True)
    kv = jnp.zeros((cache.k.shape[0], *x_t.shape[:2], *cache.k.shape[3:]))
    return jnp.zeros_like(x_t), kv_cache.ChunkKV(kv, kv)


class PipelineTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.compile_fast(cls, folder)
    tiny.build(folder)
    cls.student = pipeline.Pipeline.from_checkpoint(folder / "student")
    cls.teacher = pipeline.Pipeline.from_checkpoint(folder / "teacher")
    cls.video = cls.student(PROMPTS[0], 81, seed=3)

  def test_stream_equals_scan(self):
    latents = self.student.latents(PROMPTS[:1], 3, seed=3)
    decoded = self.student._decoder.clip(latents, 3)[0]
    streamed = list(itertools.islice(self.student.stream(PROMPTS[0], seed=3), 3))
    self.assertEqual([len(chunk) for chunk in streamed], [9, 12, 12])
    difference = np.concatenate(streamed).astype(int) - decoded
    self.assertLessEqual(np.abs(difference).max(), 1)
    self.assertGreater(decoded.std(), 5)

  @parameterized.parameters(1, 2, 9, 10, 33, 34, 81)
  def test_cuts_exactly(self, frames):
    video = self.student(PROMPTS[0], frames, seed=3)
    self.assertEqual((video.shape, video.dtype), ((frames, 64, 64, 3), np.uint8))
    # A shorter video is the beginning of a longer one.
    np.testing.assert_array_equal(video, self.video[:frames])

  def test_defaults_to_a_training_clip(self):
    self.assertLen(self.student(PROMPTS[0]), 33)
    self.assertLen(self.teacher(PROMPTS[0]), 33)
    self.assertLess(self.student.seconds["first_frames"], self.student.seconds["total"])

  def test_seed_and_prompt_decide_the_video(self):
    for pipe in (self.student, self.teacher):
      video = pipe(PROMPTS[0], 33, seed=3)
      np.testing.assert_array_equal(pipe(PROMPTS[0], 33, seed=3), video)
      self.assertTrue(np.any(pipe(PROMPTS[0], 33, seed=4) != video))
      self.assertTrue(np.any(pipe(PROMPTS[1], 33, seed=3) != video))

  def test_a_batch_of_prompts(self):
    videos = self.student(PROMPTS, 33, seed=3)
    self.assertEqual(videos.shape, (2, 33, 64, 64, 3))
    # A video depends on its prompt, the seed and its place in the list: the first is the one made alone.
    self.assertLessEqual(np.abs(videos[0].astype(int) - self.video[:33]).max(), 1)
    swapped = self.student([PROMPTS[1], PROMPTS[1]], 33, seed=3)
    self.assertLessEqual(np.abs(videos[1].astype(int) - swapped[1]).max(), 1)
    self.assertTrue(np.any(swapped[0] != swapped[1]))

  def test_forty_chunks(self):
    stream = self.student.stream(PROMPTS[0], seed=3)
    chunks = list(itertools.islice(stream, 40))
    self.assertEqual({chunk.shape for chunk in chunks[1:]}, {(12, 64, 64, 3)})
    self.assertGreater(chunks[-1].std(), 5)

  def test_an_empty_prompt_is_a_prompt(self):
    self.assertEqual(self.student("", 9).shape, (9, 64, 64, 3))

  def test_refusals(self):
    with self.assertRaisesRegex(errors.UserError, "cannot stream"):
      self.teacher.stream(PROMPTS[0])
    with self.assertRaisesRegex(errors.UserError, "num_frames = 0"):
      self.student(PROMPTS[0], 0)


if __name__ == "__main__":
  absltest.main()
