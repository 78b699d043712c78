"""The rows of the paper's Table 4, and the paper's own setting, as runs of a few steps; the numbers of the full sizes."""

import functools
import itertools
import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from causvid_jax import pipeline
from causvid_jax import weights
from causvid_jax.data import digit_world
from causvid_jax.data import latents as latents_lib
from causvid_jax.data import records
from causvid_jax.diffusion import steps
from causvid_jax.models import vae
from causvid_jax.training import loop
from causvid_jax.training import stages
from causvid_jax.training import trajectories
import tiny

PROMPT = "a red seven moving left"
CLIP = 21  # pixel frames: two chunks of three latent frames


class World:
  """The tiny world and the runs made in it, each once."""

  def __init__(self, folder):
    self.folder = folder
    tiny.build(folder)
    self.run = functools.cache(self.run)

  def config(self, stage, variant="", **changes):
    config = tiny.shrink(tiny.config(stage, variant), self.folder)
    if not config.clip.independent_chunks:
      config.clip.frames = CLIP
    config.update(changes)
    # What moves is then seen after a few steps.
    config.ema_decay, config.optimizer.warmup = 0.0, 0
    if stage == "dmd":
      config.fake_updates = 1  # the generator in every step, which is one program less to compile
    return config

  def export(self, name):
    return str(self.run(name) / "export")

  def run(self, name):
    """Trains the row `name`, what it stands on first, and returns its workdir."""
    workdir = self.folder / "runs" / name
    loop.train(getattr(self, f"_{name}")(), workdir)
    return workdir

  def _bidirectional_teacher(self):
    return self.config("teacher", init_from=str(self.folder / "teacher"))

  def _causal_teacher(self):
    return self.config("teacher", "causal", init_from=self.export("bidirectional_teacher"))

  def _ode(self):
    teacher = self.export("bidirectional_teacher")
    config = self.config("ode", init_from=teacher)
    config.generate.teacher = teacher
    trajectories.generate(config, pathlib.Path(config.trajectories))
    return config

  def _dmd_without_ode(self):
    teacher = self.export("bidirectional_teacher")
    return self.config("dmd", init_from=teacher, teacher=teacher)

  def _dmd_of_the_causal_teacher(self):
    return self.config("dmd", init_from=self.export("ode"), teacher=self.export("causal_teacher"), causal_teacher=True)

  def _dmd_of_the_bidirectional_teacher(self):
    return self.config("dmd", init_from=self.export("ode"), teacher=self.export("bidirectional_teacher"))

  def _paper_teacher(self):
    return self.config("teacher", "paper", init_from=str(self.folder / "teacher"))

  def _paper_ode(self):
    teacher = self.export("paper_teacher")
    config = self.config("ode", "paper", init_from=teacher, trajectories=str(self.folder / "paper_trajectories"))
    config.generate.teacher = teacher
    trajectories.generate(config, pathlib.Path(config.trajectories))
    return config

  def _paper_dmd(self):
    return self.config("dmd", "paper", init_from=self.export("paper_ode"), teacher=self.export("paper_teacher"))


class RunsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.world = World(folder)
    tiny.compile_fast(cls, folder)  # rows share programs

  def check_run(self, name, kind):
    """Losses are finite, every parameter has moved, and the export samples; returns its pipeline."""
    workdir = self.world.run(name)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    self.assertEqual(lines[-1]["step"], 4)
    for line in lines:
      self.assertTrue(np.isfinite(list(line.values())).all(), line)
      self.assertEqual(line["skipped"], 0)
    pipe = pipeline.Pipeline.from_checkpoint(workdir / "export")
    _, description = weights.load_pipeline(workdir / "export")
    self.assertEqual(description["sampler"]["kind"], kind)
    config = json.loads((workdir / "config.json").read_text())
    if config["init_from"]:
      _, start = weights.load(f"{config['init_from']}/transformer")
      same = [jax.tree_util.keystr(path) for (path, a), b in zip(
          jax.tree_util.tree_leaves_with_path(pipe.params), jax.tree.leaves(start)) if np.array_equal(a, b)]
      self.assertEmpty(same)
    video = pipe(PROMPT)
    self.assertEqual((video.shape, video.dtype), ((config["clip"]["frames"], 64, 64, 3), np.uint8))
    self.assertGreater(video.std(), 1)
    return pipe

  @parameterized.parameters(
      ("bidirectional_teacher", "teacher"),
      ("causal_teacher", "causal_teacher"),
      ("dmd_without_ode", "student"),
      ("ode", "student"),
      ("dmd_of_the_causal_teacher", "student"),
      ("dmd_of_the_bidirectional_teacher", "student"))
  def test_row(self, name, kind):
    pipe = self.check_run(name, kind)
    self.assertEqual(pipe.causal, kind != "teacher")

  def test_scores_are_those_of_the_configured_teacher(self):
    for name, chunk_frames in (("dmd_of_the_causal_teacher", 3), ("dmd_of_the_bidirectional_teacher", None)):
      stage = stages.create(getattr(self.world, f"_{name}")())
      self.assertEqual(stage.options.teacher_chunk_frames, chunk_frames)
      teacher = "causal_teacher" if chunk_frames else "bidirectional_teacher"
      _, expected = weights.load(f"{self.world.export(teacher)}/transformer")
      for a, b in zip(jax.tree.leaves(stage.frozen["teacher"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)

  def test_paper_setting(self):
    for name, kind in (("paper_teacher", "teacher"), ("paper_ode", "student"), ("paper_dmd", "student")):
      pipe = self.check_run(name, kind)
    self.assertEqual(pipe.sampler.timesteps, (999.0, 748.0, 502.0, 247.0, 0.0))
    self.assertEqual((pipe.sampler.denoiser.prediction, pipe.fps), ("v", 12))
    alpha, sigma = pipe.sampler.denoiser.schedule.alpha_sigma(np.float32(pipe.sampler.timesteps))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    # Every chunk of five latent frames begins a clip of its own: 1 + 4 * 4 pixel frames each.
    chunks = list(itertools.islice(pipe.stream(PROMPT), 3))
    self.assertEqual([len(chunk) for chunk in chunks], [17, 17, 17])
    source = records.RecordSource(self.world.folder / "paper_trajectories", "trajectory")
    self.assertEqual(source[0]["latents"].shape, (5, 10, 8, 8, 4))
    np.testing.assert_allclose(source[0]["sigmas"], sigma, atol=1e-6)

  def test_paper_latents_are_coded_chunk_by_chunk(self):
    config = self.world.config("teacher", "paper")
    self.assertEqual(config.clip.frames, 34)
    stored = stages.create(config).source[0]["latents"]
    clip = digit_world.clip(0, "train", 34)["video"]
    module, params = weights.load(config.vae)
    encode = jax.jit(functools.partial(module.apply, method="encode"))
    for i in range(2):
      part = latents_lib.to_unit(clip[17 * i:17 * (i + 1)])[None]
      np.testing.assert_allclose(stored[5 * i:5 * (i + 1)], encode({"params": params}, part)[0], atol=2e-2)


class FullSizeTest(parameterized.TestCase):
  """Section 5 of the paper."""

  def test_paper(self):
    teacher, ode, dmd = (tiny.config(stage, "paper") for stage in ("teacher", "ode", "dmd"))
    for config in (teacher, ode, dmd):
      clip = config.clip
      self.assertEqual((clip.height, clip.width, clip.fps, clip.independent_chunks), (352, 640, 12, True))
      self.assertEqual((config.chunk_frames, config.schedule, config.prediction), (5, "variance_preserving", "v"))
      coding = latents_lib.ClipCoding(clip.frames, clip.height, clip.width, config.chunk_frames, True)
      self.assertEqual(coding.latent_shape(vae.PRESETS["wan"]), (35, 44, 80, 16))
    for config in (ode, dmd):
      self.assertEqual(tuple(config.student_steps), (999, 748, 502, 247))
    self.assertEqual((ode.optimizer.learning_rate, ode.num_steps, ode.generate.num_trajectories), (5e-6, 3000, 1000))
    self.assertEqual(ode.generate.guidance, 3.5)
    self.assertEqual((dmd.optimizer.learning_rate, dmd.fake_optimizer.learning_rate), (2e-6, 2e-6))
    self.assertEqual(dmd.num_steps // dmd.fake_updates, 6000)
    self.assertEqual(dmd.guidance, 4.5)  # uncond + 4.5 (cond - uncond), the authors' cond + 3.5 (cond - uncond)

  @parameterized.product(stage=("teacher", "ode", "dmd"), variant=("wan_1_3b", "wan_14b"))
  def test_wan(self, stage, variant):
    config = tiny.config(stage, variant)
    self.assertEqual((config.model, config.chunk_frames, config.schedule), (variant, 3, "flow_matching"))
    coding = latents_lib.ClipCoding(config.clip.frames, config.clip.height, config.clip.width, config.chunk_frames)
    self.assertEqual(coding.latent_shape(vae.PRESETS["wan"]), (21, 60, 104, 16))
    self.assertEqual((config.clip.fps, config.shift), (16, 8.0))
    self.assertEqual(config.optimizer.learning_rate, 2e-6 if stage == "dmd" else 5e-6)
    if stage == "dmd":
      self.assertEqual((config.fake_updates, config.guidance, config.num_steps // 5), (5, 4.5, 6000))
    if stage != "teacher":
      np.testing.assert_allclose(steps.student_timesteps(config.student_steps, config.shift),
                                 [1000, 960, 888.889, 727.273, 0], rtol=1e-6)

  @parameterized.parameters("teacher", "ode", "dmd")
  def test_unknown_variant(self, stage):
    with self.assertRaisesRegex(ValueError, "no variant 'wan_2b'"):
      tiny.config(stage, "wan_2b")


if __name__ == "__main__":
  absltest.main()
