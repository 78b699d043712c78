"""The command line: every bad input is one line on stderr and exit status 2, and leaves nothing behind."""

import contextlib
import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock
import warnings

from absl import flags
from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image

from causvid_jax.data import records
from causvid_jax.data import video
import tiny

PROMPT = "--prompt=a red seven"


def call(module, *args):
  """Runs `python -m causvid_jax.<module> <args>` in this process: (exit status, stdout, stderr)."""
  before, verbosity, code = set(flags.FLAGS), logging.get_verbosity(), 0
  out, err = io.StringIO(), io.StringIO()
  with mock.patch.object(sys, "argv", [module, *args]), contextlib.chdir(tiny.ROOT), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as outside unittest
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        runpy.run_module(f"causvid_jax.{module}", run_name="__main__")
      except SystemExit as stop:
        code = stop.code or 0
      finally:
        logging.set_verbosity(verbosity)
        for name in set(flags.FLAGS) - before:
          delattr(flags.FLAGS, name)
  return code, out.getvalue(), err.getvalue()


def spawn(module, *args):
  """The same in a process of its own."""
  done = subprocess.run([sys.executable, "-m", f"causvid_jax.{module}", *args], cwd=tiny.ROOT, capture_output=True,
                        text=True, check=False)
  return done.returncode, done.stdout, done.stderr


class WorldTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.environment = tiny.compile_fast(cls, pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())))
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.build(cls.folder)
    cls.file = cls.folder / "a_file"
    cls.file.touch()
    cls.workdir = cls.folder / "runs" / "run"
    cls.output = cls.folder / "out.mp4"

  def contents(self):
    return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()}

  def assert_refused(self, pattern, module, *args, run=call):
    """One line that begins with "error:", status 2, and no file made or changed."""
    before = self.contents()
    code, out, err = run(module, *map(str, args))
    self.assertEqual(code, 2, err)
    self.assertEqual(out, "")
    self.assertStartsWith(err, "error: ")
    self.assertEqual(err.count("\n"), 1, err)
    self.assertRegex(err, pattern)
    self.assertNotIn("Traceback", err)
    self.assertEqual(self.contents(), before)


class CommandLineTest(WorldTest):

  def train(self, stage, *args, folder=None):
    """Arguments that train a stage in the tiny world."""
    config = tiny.config(stage)
    world = {name: tiny.shrink(tiny.config(stage), self.folder)[name]
             for name in ("model", "vae", "text_encoder", "teacher", "init_from", "data_dir", "trajectories", "batch_size")
             if name in config}
    return ["train", f"--config=configs/{stage}.py", f"--workdir={folder or self.workdir}",
            *(f"--config.{name}={value}" for name, value in world.items()), *args]

  # Flags and configs.

  def test_unknown_config_keys(self):
    self.assert_refused("error: unknown config key 'nonsense': expected one", *self.train("dmd", "--config.nonsense=1"))
    self.assert_refused("error: unknown config key 'lr': expected one", *self.train("dmd", "--config.optimizer.lr=1"))

  def test_unknown_config_key_in_a_process_of_its_own(self):
    self.assert_refused("error: unknown config key 'nonsense'", *self.train("dmd", "--config.nonsense=1"), run=spawn)

  @parameterized.parameters("dmd", "ode", "teacher", "vae", "text_encoder")
  def test_unknown_variants(self, stage):
    self.assert_refused(rf"configs/{stage}.py:huge.* no variant 'huge' of|{stage}.py has no variant 'huge'",
                        "train", f"--config=configs/{stage}.py:huge", f"--workdir={self.workdir}")

  def test_values_that_do_not_parse(self):
    self.assert_refused("config.num_steps=many", *self.train("dmd", "--config.num_steps=many"))
    self.assert_refused("num_frames=many", "sample", PROMPT, "--num_frames=many", f"--output={self.output}")

  @parameterized.parameters(
      ("train", "--config"), ("generate_ode", "--config"), ("sample", "prompt, prompts_file, schedule"))
  def test_missing_flags(self, module, name):
    self.assert_refused(f"{name}.* must have a value", module)

  def test_missing_config_file(self):
    for module in ("train", "generate_ode"):
      self.assert_refused("No such file or directory: 'configs/none.py'", module, "--config=configs/none.py")

  def test_unknown_flags_and_stray_arguments(self):
    self.assert_refused("Unknown command line flag 'speed'", "sample", PROMPT, "--speed=2")
    self.assert_refused("unexpected arguments 'seven': expected only --flags", "sample", "--prompt=a red", "seven")

  @parameterized.parameters(
      ("sample", ["prompt", "prompts_file", "schedule", "output", "checkpoint", "base", "num_frames", "endless", "seed",
                  "image", "video", "policy", "blend_chunks", "strength", "one_step", "refresh", "sink_frames",
                  "window_frames"]),
      ("train", ["config", "workdir", "restart"]))
  def test_help_lists_the_flags(self, module, names):
    _, out, err = spawn(module, "--help")  # pytest, as the main module, would show its own
    self.assertNotIn("Traceback", err)
    for name in names:
      self.assertRegex(out, rf"--(\[no\])?{name}:", name)

  # Configs that do not fit.

  @parameterized.parameters("dmd", "ode", "teacher")
  def test_chunks_that_do_not_divide_the_clip(self, stage):
    pattern = "chunk_frames = 4 does not divide the clip's 9 latent frames"
    self.assert_refused(pattern, *self.train(stage, "--config.chunk_frames=4"))
    self.assertFalse(self.workdir.exists())

  def test_generate_ode_refuses_chunks_too(self):
    _, *args = self.train("ode", "--config.chunk_frames=4", f"--config.generate.teacher={self.folder}/teacher")
    self.assert_refused("chunk_frames = 4 does not divide", "generate_ode", *args)
    self.assertFalse(self.workdir.exists())

  def test_unknown_names_and_sizes(self):
    for change, pattern in (
        ("model=wan_2b", "unknown model 'wan_2b': expected one of test, "),
        ("mesh.fsdp=3", "mesh.fsdp = 3 does not divide the [0-9]+ devices"),
        ("batch_size=7", "batch_size = 7: expected a multiple of"),
        ("stage=pretrain", "unknown stage 'pretrain': expected one of vae, text_encoder, teacher, ode, dmd")):
      self.assert_refused(pattern, *self.train("teacher", f"--config.{change}", "--config.init_from="))
    self.assertFalse(self.workdir.exists())

  def test_trajectories_of_another_step_list(self):
    folder = self.folder / "other_steps"
    with records.RecordWriter(folder / "trajectories", "trajectory", {}) as writer:
      writer.write(np.zeros((3, 9, 8, 8, 4), np.float32), np.array([1.0, 0.5, 0.0]), np.zeros((5, 8), np.float32), "a")
    code, _, err = call(*self.train(
        "ode", f"--config.trajectories={folder / 'trajectories'}", folder=folder / "run"))
    self.assertEqual((code, err.count("\n")), (2, 1), err)
    self.assertStartsWith(err, "error: the trajectories stand at sigmas [1.0, 0.5, 0.0], the config's student steps at ")
    self.assertIn("[1.0, 0.9, 0.75, 0.5, 0.0]", err)
    self.assertFalse((folder / "run" / "export").exists())

  def test_unfinished_trajectories(self):
    missing = self.folder / "none"
    code, _, err = call(*self.train("ode", f"--config.trajectories={missing}", folder=self.folder / "unfinished"))
    self.assertEqual((code, err.count("\n")), (2, 1), err)
    self.assertStartsWith(err, f"error: no finished trajectory records in {missing}")

  def test_a_workdir_of_another_run(self):
    workdir = self.folder / "taken"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"stage": "vae"}))
    self.assert_refused(f"{workdir} holds a run with another config: .*fresh --workdir, or --restart",
                        *self.train("dmd", folder=workdir))

  # Checkpoints.

  @parameterized.parameters("sample", "evaluate", "benchmark")
  def test_missing_checkpoints(self, module):
    nowhere = self.folder / "nowhere"
    args = {"sample": [PROMPT, f"--checkpoint={nowhere}", f"--output={self.output}"],
            "evaluate": [f"--checkpoint={nowhere}", f"--output={self.folder / 'report'}"],
            "benchmark": [f"--student={nowhere}", f"--teacher={nowhere}"]}[module]
    self.assert_refused(f"no weights at '{nowhere}': expected a folder, or a name of what ships", module, *args)
    self.assertFalse((self.folder / "report").exists())

  def test_missing_checkpoint_in_a_process_of_its_own(self):
    self.assert_refused("no weights at 'nowhere'", "sample", PROMPT, "--checkpoint=nowhere", f"--output={self.output}",
                        run=spawn)

  @parameterized.parameters("init_from", "teacher", "vae", "text_encoder")
  def test_training_from_missing_checkpoints(self, name):
    self.assert_refused("no weights at '[^']*nowhere", *self.train("dmd", f"--config.{name}={self.folder}/nowhere"))

  def test_generating_with_a_missing_teacher(self):
    _, *args = self.train("ode", f"--config.generate.teacher={self.folder}/nowhere")
    self.assert_refused("no weights at '[^']*nowhere/transformer'", "generate_ode", *args)

  @parameterized.parameters("transformer/weights.safetensors", "transformer/config.json", "pipeline.json")
  def test_half_written_checkpoints(self, name):
    broken = self.folder / f"broken_{name.replace('/', '_')}"
    shutil.copytree(self.folder / "student", broken)
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[:len(content) // 2])
    pattern = f"{name} is missing or damaged"
    self.assert_refused(pattern, "sample", PROMPT, f"--checkpoint={broken}", f"--output={self.output}")
    if name != "pipeline.json":  # training reads the transformer only
      self.assert_refused(pattern, *self.train("dmd", f"--config.teacher={broken}"))

  # Outputs.

  @parameterized.parameters("sample", "evaluate", "train", "generate_ode")
  def test_unwritable_outputs(self, module):
    below = self.file / "below"
    student = f"--checkpoint={self.folder / 'student'}"
    args = {"sample": ["sample", PROMPT, student, f"--output={below}.mp4"],
            "evaluate": ["evaluate", student, f"--output={below}"],
            "train": self.train("dmd", folder=below),
            "generate_ode": ["generate_ode", *self.train(
                "ode", f"--config.generate.teacher={self.folder}/teacher", folder=below)[1:]]}[module]
    self.assert_refused(f"{self.file}.*Not a directory|File exists", *args)

  def test_an_output_that_is_a_folder(self):
    self.assert_refused("expected the name of a video file, found a folder", "sample", PROMPT,
                        f"--checkpoint={self.folder / 'student'}", f"--output={self.folder}")

  # Prompts and lengths.

  @parameterized.parameters(0, -3)
  def test_too_few_frames(self, frames):
    self.assert_refused(f"--num_frames={frames}: .* not a positive integer", "sample", PROMPT,
                        f"--checkpoint={self.folder / 'student'}", f"--num_frames={frames}", f"--output={self.output}")

  def test_names_in_evaluate(self):
    student = f"--checkpoint={self.folder / 'student'}"
    self.assert_refused("two checkpoints are named 'student'", "evaluate", student, student)
    self.assert_refused("--long=teacher: expected the name of one of the checkpoints", "evaluate", student,
                        "--long=teacher")

  def test_an_empty_prompt_is_a_prompt(self):
    output = self.folder / "empty.mp4"
    code, out, err = call("sample", "--prompt=", f"--checkpoint={self.folder / 'student'}", f"--output={output}",
                          "--num_frames=10")
    self.assertEqual(code, 0, err)
    self.assertIn(f"{output}: 10 frames at 8 a second", out)
    self.assertNotIn("too long", err)
    frames, fps = video.read_video(output)
    self.assertEqual((frames.shape, fps), ((10, 64, 64, 3), 8))

  def test_a_long_prompt_is_cut_with_a_warning(self):
    output = self.folder / "long.mp4"
    code, _, err = spawn("sample", "--prompt=a red seven moving left and a blue two moving up",
                         f"--checkpoint={self.folder / 'student'}", f"--output={output}", "--num_frames=1")
    self.assertEqual(code, 0, err)
    self.assertRegex(err, "The prompt is too long for 5 tokens: cut its last 7 of 11 and kept 'a red seven moving'")
    self.assertLen(video.read_video(output)[0], 1)


class SampleTest(WorldTest):
  """What `sample` makes of text, images and videos."""

  def sample(self, *args, output="made.mp4", checkpoint="student"):
    """Runs `sample` and returns stdout and stderr."""
    code, out, err = call("sample", *map(str, args), f"--checkpoint={self.folder / checkpoint}",
                          f"--output={self.folder / output}")
    self.assertEqual(code, 0, err)
    return out, err

  def made(self, name="made.mp4"):
    return video.read_video(self.folder / name)[0]

  def source(self, count=15):
    """An image and a video file."""
    y, x = np.mgrid[:72, :96]
    frames = np.stack([np.stack([x + 4 * i, 2 * y + 5 * i, x + y], axis=-1) % 256 for i in range(count)]).astype(np.uint8)
    Image.fromarray(frames[0]).save(self.folder / "source.png")
    video.write_video(self.folder / "source.mp4", frames, 8)
    return self.folder / "source.png", self.folder / "source.mp4"

  def test_progress_and_speed(self):
    out, err = self.sample(PROMPT, "--num_frames=21")
    self.assertRegex(out, r"made\.mp4: 21 frames at 8 a second, made at [0-9.]+ a second, the first after [0-9.]+ s\n$")
    self.assertRegex(err, r"made\.mp4: 100%.*21/21 \[[0-9:]+<[0-9:]+, +[0-9.]+(frame/s|s/frame)")

  def test_a_schedule_changes_the_video_from_its_frame_on(self):
    self.sample("--prompt=a red seven", "--num_frames=33")
    plain = self.made()
    for options in ([], ["--policy=flush"], ["--policy=keep", "--blend_chunks=1"]):
      self.sample("--schedule=0: a red seven; 21: a blue two", "--num_frames=33", *options)
      np.testing.assert_array_equal(self.made()[:16], plain[:16])
      self.assertTrue(np.any(self.made()[21:] != plain[21:]), options)

  def test_many_prompts(self):
    (self.folder / "prompts.txt").write_text("a red seven\n\na blue two\n")
    out, _ = self.sample(f"--prompts_file={self.folder / 'prompts.txt'}", "--num_frames=9", output="many.mp4")
    self.assertRegex(out, "(?s)many_000.mp4: 9 frames.*\n.*many_001.mp4: 9 frames")
    self.sample("--prompt=a blue two", "--num_frames=9")
    np.testing.assert_array_equal(self.made("many_001.mp4"), self.made())
    self.assertTrue(np.any(self.made("many_000.mp4") != self.made()))

  def test_images_and_videos(self):
    image, clip = self.source()
    self.sample(PROMPT, "--num_frames=15")
    plain = self.made()
    for options, count in (([f"--image={image}", "--num_frames=15"], 15), ([f"--video={clip}"], 15),
                           ([f"--video={clip}", "--num_frames=10", "--strength=0.7", "--one_step"], 10)):
      self.sample(PROMPT, *options)
      self.assertLen(self.made(), count)
      self.assertTrue(np.any(self.made() != plain[:count]), options)
    self.sample(PROMPT, f"--video={clip}", "--strength=1")
    np.testing.assert_array_equal(self.made(), plain)

  def test_outputs_by_extension(self):
    for name, first in (("made.gif", "made.gif"), ("made.webp", "made.webp"), ("made.png", "made_000000.png"),
                        ("%03d-made.png", "000-made.png")):
      self.sample(PROMPT, "--num_frames=9", output=name)
      with Image.open(self.folder / first) as image:
        self.assertEqual((image.size, getattr(image, "n_frames", 1)), ((64, 64), 1 if name.endswith("png") else 9))
    self.assertLen(list(self.folder.glob("made_*.png")), 9)

  def test_sizes_of_the_cache(self):
    self.sample(PROMPT, "--num_frames=45")
    plain = self.made()
    self.sample(PROMPT, "--num_frames=45", "--sink_frames=0", "--window_frames=3")
    np.testing.assert_array_equal(self.made()[:16], plain[:16])
    self.assertTrue(np.any(self.made()[33:] != plain[33:]))

  def test_a_lone_transformer_and_its_base(self):
    self.sample(PROMPT, "--num_frames=9")
    plain = self.made()
    self.sample(PROMPT, "--num_frames=9", f"--base={self.folder / 'student'}", checkpoint="student/transformer")
    np.testing.assert_array_equal(self.made(), plain)
    self.assert_refused("holds a lone transformer: expected a whole pipeline, or a base", "sample", PROMPT,
                        f"--checkpoint={self.folder / 'student' / 'transformer'}", f"--output={self.output}")

  @parameterized.parameters(
      ([PROMPT, "--schedule=0: a"], "Exactly one of .prompt, prompts_file, schedule. must have a value"),
      ([PROMPT, "--prompts_file=x"], "Exactly one of .prompt, prompts_file, schedule. must have a value"),
      ([PROMPT, "--image=x", "--video=y"], "At most one of .image, video. must have a value"),
      ([PROMPT, "--endless", "--num_frames=9"], "At most one of .endless, num_frames. must have a value"),
      ([PROMPT, "--endless", "--video=x"], "At most one of .endless, video. must have a value"),
      (["--prompts_file=x", "--endless"], "At most one of .endless, prompts_file. must have a value"),
      ([PROMPT, "--policy=keep"], "--policy has no use without --schedule"),
      ([PROMPT, "--blend_chunks=0"], "--blend_chunks has no use without --schedule"),
      ([PROMPT, "--strength=0.5"], "--strength has no use without --video"),
      ([PROMPT, "--one_step"], "--one_step has no use without --video"),
      (["--schedule=0: a", "--policy=forget"], "--policy=forget: .*keep.recompute.flush"),
      (["--schedule=0: a", "--blend_chunks=-1"], "--blend_chunks=-1: -1 is not a non-negative integer"),
      (["--schedule=a red seven"], "schedule: 'a red seven': expected FRAME: PROMPT"),
      (["--prompts_file=nowhere.txt"], "nowhere.txt: expected a text file of prompts"),
      ([PROMPT, "--image=nowhere.png"], "nowhere.png: expected a readable image, got: No such file"),
      ([PROMPT, "--video=nowhere.mp4"], "nowhere.mp4: expected a readable video, got: No such file"),
      ([PROMPT, "--video={video}", "--strength=0"], "strength 0.0: expected more than 0"),
      ([PROMPT, "--video={video}", "--strength=2"], "--strength=2: 2.0 is not a number in the range"),
      ([PROMPT, "--window_frames=2"], "the window of 2 frames must hold a chunk of 3 frames"),
      ([PROMPT, "--endless", "--output=endless.gif"], "--endless writes .mp4 or .png, not --output=endless.gif"),
      ([PROMPT, "--output=out.avi"], "out.avi: expected a name that ends in .mp4, .gif, .webp, .png"))
  def test_combinations_without_sense(self, args, pattern):
    _, clip = self.source()
    self.assert_refused(pattern, "sample", f"--checkpoint={self.folder / 'student'}", f"--output={self.output}",
                        *(arg.format(video=clip) for arg in args))

  def test_a_teacher_takes_text_only(self):
    image, clip = self.source()
    for args in (["--schedule=0: a red seven"], [PROMPT, f"--image={image}"], [PROMPT, f"--video={clip}"],
                 [PROMPT, "--endless"], [PROMPT, "--refresh"], [PROMPT, "--sink_frames=0"]):
      self.assert_refused("teacher is bidirectional and makes clips from text only", "sample", *args,
                          f"--checkpoint={self.folder / 'teacher'}", f"--output={self.output}")
    self.sample(PROMPT, checkpoint="teacher")
    self.assertLen(self.made(), 33)

  @parameterized.parameters((signal.SIGINT, "--endless", 0), (signal.SIGTERM, "--endless", 0),
                            (signal.SIGTERM, "--num_frames=1000000", 143), (signal.SIGKILL, "--endless", -9))
  def test_interruptions(self, number, length, status):
    output = self.folder / f"interrupted_{int(number)}_{length[2:5]}.mp4"
    child = subprocess.Popen(
        [sys.executable, "-m", "causvid_jax.sample", PROMPT, f"--checkpoint={self.folder / 'student'}",
         f"--output={output}", length], cwd=tiny.ROOT, env=os.environ | self.environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not output.exists() and child.poll() is None and time.monotonic() < deadline:
      time.sleep(0.02)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    self.assertEqual(child.returncode, status, err)
    frames = sum(map(len, video.read_frames(output)))
    self.assertGreaterEqual(frames, 8)
    if number == signal.SIGKILL:
      return
    self.assertIn(f"{output}: {frames} frames at 8 a second", out)
    self.assertNotIn("Traceback", err)
    self.assertFalse(list(self.folder.glob("*.part")))


if __name__ == "__main__":
  absltest.main()
