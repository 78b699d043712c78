"""The training loop: killed and resumed bit for bit, deterministic, bound to one config, safe from non-finite updates."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
import chex
from flax import linen as nn
import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import pipelines
from causvid_jax.data import records
from causvid_jax.training import checkpoints as checkpoints_lib
from causvid_jax.training import loop
from causvid_jax.training import rng
from causvid_jax.training import stages
import tiny

STEPS, EVERY, LOG = 26, 3, 2  # checkpoints fall inside the five steps of a DMD round, and between two lines of the log


def exported(workdir):
  return safetensors_numpy.load_file(workdir / "export/transformer/weights.safetensors")


def log(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def initial(stage):
  return jax.jit(lambda *args: nn.unbox(stage.init(*args)))(rng.stream_key(0, "init"), stage.pretrained())


def flags_of(config, default, prefix="config"):
  """The command line that turns one config into another."""
  for name, value in config.items():
    if hasattr(value, "items"):
      yield from flags_of(value, default[name], f"{prefix}.{name}")
    elif value != default[name]:
      yield f"--{prefix}.{name}={value}"


class LoopTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.build(cls.folder)
    cls.environment = os.environ | tiny.compile_fast(cls, cls.folder)
    cls.dmd = cls.folder / "dmd"
    loop.train(cls.dmd_config(), cls.dmd)

  @classmethod
  def dmd_config(cls):
    config = tiny.shrink(tiny.config("dmd"), cls.folder)
    config.num_steps, config.checkpoint_every, config.log_every = STEPS, EVERY, LOG
    return config

  @classmethod
  def ode_config(cls, **changes):
    """A cheap stage, a clip at a time."""
    config = tiny.shrink(tiny.config("ode"), cls.folder)
    config.batch_size = config.microbatches = 1
    config.update(changes)
    return config

  def trajectories(self, name, values):
    """Four records of the config's sigmas, each of them filled with noise plus its value."""
    stage = stages.create(self.ode_config())
    sigmas = np.asarray(stage.denoiser().schedule.alpha_sigma(stage.timesteps)[1])
    random = np.random.default_rng(0)
    with records.RecordWriter(self.folder / name, "trajectory", {}) as writer:
      for value in values:
        states = random.normal(size=(len(sigmas), *stage.latent_shape)).astype(np.float32) + np.float32(value)
        writer.write(states, sigmas, random.normal(size=(5, 8)).astype(np.float32), "a clip")
    return str(self.folder / name)

  def start(self, workdir):
    command = [sys.executable, "-m", "causvid_jax.train", "--config=configs/dmd.py", f"--workdir={workdir}"]
    return subprocess.Popen(command + list(flags_of(self.dmd_config(), tiny.config("dmd"))), cwd=tiny.ROOT,
                            env=self.environment, stderr=subprocess.PIPE, text=True)

  def test_killed_and_started_again_ends_with_the_same_bits(self):
    workdir = self.folder / "killed"
    process = self.start(workdir)
    saved = lambda: {path.name for path in (workdir / "checkpoints").glob("*")}
    # In the middle of a save, when an older checkpoint is whole.
    while process.poll() is None and not ("6" in saved() and any("tmp" in name for name in saved())):
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    self.assertEqual(process.returncode, -signal.SIGKILL, error)
    self.assertFalse((workdir / "export").exists())

    process = self.start(workdir)
    _, error = process.communicate()
    self.assertEqual(process.returncode, 0, error)
    reference, resumed = exported(self.dmd), exported(workdir)
    self.assertSameElements(reference, resumed)
    for name in reference:
      np.testing.assert_array_equal(resumed[name], reference[name], err_msg=name)
    self.assertEqual([line["step"] for line in log(workdir)], list(range(LOG, STEPS + 1, LOG)))
    # Not only the average that is exported: both networks, both optimisers and the place in the data.
    found, expected = (self.last_checkpoint(self.dmd_config(), folder) for folder in (workdir, self.dmd))
    self.assertEqual(found[1], STEPS)
    chex.assert_trees_all_equal(found, expected)

  def last_checkpoint(self, config, workdir):
    """The newest checkpoint: the state, its step and the iterator's state."""
    stage = stages.create(config)
    iterator = pipelines.batches(stage.source, config.batch_size, config.seed, stage.transform)
    checkpoints = checkpoints_lib.Checkpoints(workdir, config.keep_checkpoints)
    state, step = checkpoints.restore(initial(stage), iterator)
    checkpoints.close()
    return state, step, iterator.get_state()

  def test_two_runs_with_one_seed_are_the_same_files(self):
    again = self.folder / "again"
    loop.train(self.dmd_config(), again)
    files = sorted(path.relative_to(self.dmd) for path in (self.dmd / "export").rglob("*") if path.is_file())
    self.assertLen(files, 3)
    for file in [*files, pathlib.Path("config.json")]:
      self.assertEqual((again / file).read_bytes(), (self.dmd / file).read_bytes(), file)
    timeless = lambda lines: [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]
    self.assertEqual(timeless(log(again)), timeless(log(self.dmd)))

  def test_a_finished_run_only_exports_again(self):
    before, lines = exported(self.dmd), log(self.dmd)
    loop.train(self.dmd_config(), self.dmd)
    chex.assert_trees_all_equal(exported(self.dmd), before)
    self.assertEqual(log(self.dmd), lines)

  def test_the_generator_moves_every_fifth_step(self):
    stage, step, batch = self.stepping()
    state, moved, fake_moved = initial(stage), [], []
    for i in range(12):
      new, metrics = step(state, stage.frozen, batch, jax.random.key(i), phase=stage.phase(i))
      moved.append(_differs(new.generator.params, state.generator.params))
      fake_moved.append(_differs(new.fake.params, state.fake.params))
      self.assertEqual("dmd_loss" in metrics, i % 5 == 0)
      state = new
    # The first update has a learning rate of 0 (warm-up).
    self.assertEqual(np.flatnonzero(moved).tolist(), [5, 10])
    self.assertEqual(np.flatnonzero(fake_moved).tolist(), list(range(1, 12)))
    self.assertEqual(self.counts(state.generator), [3])
    self.assertEqual(self.counts(state.fake), [12])

  def test_microbatches_leave_that_ratio(self):
    self.assertEqual(self.dmd_config().microbatches, 2)
    state, *_ = self.last_checkpoint(self.dmd_config(), self.dmd)
    self.assertEqual(self.counts(state.generator), [6])  # steps 0, 5, ..., 25
    self.assertEqual(self.counts(state.fake), [STEPS])
    self.assertEqual([line["step"] for line in log(self.dmd) if "dmd_loss" in line], [2, 6, 12, 16, 22, 26])

  @classmethod
  @functools.cache
  def stepping(cls):
    """DMD without the loop: a stage, its compiled step and a batch."""
    config = cls.dmd_config()
    config.microbatches = 1
    stage = stages.create(config)
    batch = next(pipelines.batches(stage.source, 4, 0, stage.transform))
    return stage, jax.jit(stage.step, static_argnames="phase"), batch

  def counts(self, state):
    """How many updates the optimiser has made."""
    found = {int(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
             if jax.tree_util.keystr(path).endswith(".count")}
    return sorted(found)

  def test_a_batch_with_nan_changes_nothing(self):
    stage, step, batch = self.stepping()
    state = initial(stage)
    for i in (0, 5, 1):  # past the warm-up's first update, so that a good batch does move the parameters
      state, _ = step(state, stage.frozen, batch, jax.random.key(i), phase=stage.phase(i))
    bad = batch | {"latents": batch["latents"].copy()}
    bad["latents"][2, 4, 0, 0, 0] = np.nan
    new, metrics = step(state, stage.frozen, bad, jax.random.key(9), phase="both")
    self.assertEqual(int(metrics["skipped"]), 2)
    for before, after in ((state.generator, new.generator), (state.fake, new.fake)):
      chex.assert_trees_all_equal(after.params, before.params)
      chex.assert_trees_all_equal(after.opt_state.inner_state, before.opt_state.inner_state)
    self.assertTrue(_differs(step(new, stage.frozen, batch, jax.random.key(9), phase="both")[0].generator.params,
                             new.generator.params))

  def test_stops_when_updates_stay_non_finite(self):
    # Three in four batches of one clip are NaN: skipped, but never many in a row. Then all are.
    mostly = self.ode_config(trajectories=self.trajectories("mostly", [0, np.nan, np.nan, np.nan]),
                             num_steps=12, checkpoint_every=12)
    loop.train(mostly, self.folder / "mostly_nan")
    self.assertTrue(all(np.isfinite(x).all() for x in exported(self.folder / "mostly_nan").values()))
    self.assertGreater(max(line["skipped"] for line in log(self.folder / "mostly_nan")), 0)

    always = self.ode_config(trajectories=self.trajectories("always", [np.nan] * 4), num_steps=100)
    always.optimizer.max_skipped = 5
    workdir = self.folder / "always_nan"
    with self.assertRaisesRegex(errors.UserError, "training diverged by step 6"):
      loop.train(always, workdir)
    self.assertFalse((workdir / "export").exists())
    # The checkpoint at step 4 holds the parameters it began with: nothing was let through.
    state, step, _ = self.last_checkpoint(always, workdir)
    self.assertEqual(step, 4)
    chex.assert_trees_all_equal(state.params, initial(stages.create(always)).params)

  def test_refuses_the_workdir_of_another_config(self):
    config = self.ode_config(trajectories=self.trajectories("good", [0] * 4))
    workdir = self.folder / "ode"
    loop.train(config, workdir)
    first, config.seed = exported(workdir), 1
    lines = (workdir / "metrics.jsonl").read_text()
    with self.assertRaisesRegex(errors.UserError, "holds a run with another config"):
      loop.train(config, workdir)
    self.assertEqual((workdir / "metrics.jsonl").read_text(), lines)

    config.num_steps = 2  # shorter than what is there, which restarting must forget
    loop.train(config, workdir, restart=True)
    loop.train(config, self.folder / "fresh")
    chex.assert_trees_all_equal(exported(workdir), exported(self.folder / "fresh"))
    self.assertEqual([line["step"] for line in log(workdir)], [2])
    self.assertTrue(any(np.any(first[name] != value) for name, value in exported(workdir).items()))
    self.assertEqual(json.loads((workdir / "config.json").read_text())["seed"], 1)

  def test_no_steps_export_what_it_starts_from(self):
    config = self.ode_config(trajectories=self.trajectories("good", [0] * 4), num_steps=0)
    loop.train(config, self.folder / "start")
    _, params = weights.load(self.folder / "start/export/transformer")
    chex.assert_trees_all_equal(params, weights.load(self.folder / "teacher/transformer")[1])
    _, description = weights.load_pipeline(self.folder / "start/export")
    self.assertEqual(description["sampler"]["kind"], "student")

  def test_a_damaged_checkpoint_is_an_error_of_one_line(self):
    config = self.ode_config(trajectories=self.trajectories("good", [0] * 4), num_steps=2)
    workdir = self.folder / "damaged"
    loop.train(config, workdir)
    files = [path for path in (workdir / "checkpoints/2").rglob("*") if path.is_file() and "state" in str(path)]
    for path in files:
      path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with self.assertRaisesRegex(errors.UserError, "checkpoint 2 in .* is damaged"):
      loop.train(config, workdir)

  def test_an_unwritable_workdir(self):
    (self.folder / "file").write_text("")
    with self.assertRaisesRegex(errors.UserError, "cannot write to workdir"):
      loop.train(self.ode_config(), self.folder / "file/run")


def _differs(a, b):
  return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


if __name__ == "__main__":
  absltest.main()
