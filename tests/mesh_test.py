"""Training over a mesh of 8 simulated devices equals training on one; run in a process of its own."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

if __name__ == "__main__":  # before JAX starts
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  os.environ["JAX_PLATFORMS"] = "cpu"

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import numpy as np
import optax

from causvid_jax import errors
from causvid_jax.parallel import mesh as mesh_lib
from causvid_jax.training import rng
from causvid_jax.training import stages
from causvid_jax.training import state as state_lib
import tiny

BATCH = 16


def make_batch():
  keys = jax.random.split(jax.random.key(0))
  return {"latents": np.asarray(jax.random.normal(keys[0], (BATCH, 6, 4, 4, 4))),
          "text": np.asarray(jax.random.normal(keys[1], (BATCH, 5, 8)))}


def one_device():
  return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), mesh_lib.AXES)


def sgd(config, num_updates):
  """Linear in the gradient, unlike Adam, whose first steps are signs that rounding may flip."""
  del config, num_updates
  return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), 3)


def start(stage, mesh):
  """The state of a stage on a mesh, and its shardings, as the training loop makes them."""
  key = rng.stream_key(0, "init")
  shardings = mesh_lib.state_shardings(mesh, stage.init, key)
  return jax.jit(lambda key: nn.unbox(stage.init(key)), out_shardings=shardings)(key), shardings


def train(stage, mesh, phases):
  """The state and metrics after a step of each phase."""
  state, shardings = start(stage, mesh)
  frozen = jax.device_put(stage.frozen, mesh_lib.replicated(mesh))
  step = jax.jit(stage.step, static_argnames="phase", donate_argnums=0,
                 out_shardings=(shardings, mesh_lib.replicated(mesh)))
  for i, phase in enumerate(phases):
    batch = jax.device_put(make_batch(), mesh_lib.batch_sharding(mesh))
    state, metrics = step(state, frozen, batch, rng.stream_key(0, "step", i), phase=phase)
  return state, metrics


class OwnProcessTest(absltest.TestCase):

  def test_on_eight_devices(self):
    if __name__ == "__main__":
      self.skipTest("this is that process")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    self.assertIn("OK (skipped=1)", done.stderr)


@absltest.skipUnless(__name__ == "__main__", "needs 8 devices: OwnProcessTest runs it")
class MeshTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.build(folder)
    cls.teacher_config = tiny.shrink(tiny.config("teacher"), folder)
    cls.teacher_config.init_from = str(folder / "teacher")
    cls.dmd_config = tiny.shrink(tiny.config("dmd"), folder)
    cls.teacher_config.microbatches, cls.dmd_config.microbatches = 2, 1
    with mock.patch.object(state_lib, "create_optimizer", sgd):
      cls.teacher, cls.dmd = (stages.create(config) for config in (cls.teacher_config, cls.dmd_config))
      _ = cls.teacher.optimizer
    cls.alone = {}

  def expected(self, name, phases):
    if name not in self.alone:
      self.alone[name] = jax.device_get(train(getattr(self, name), one_device(), phases))
    return self.alone[name]

  def assert_same(self, name, fsdp, phases):
    stage, mesh = getattr(self, name), mesh_lib.create_mesh(fsdp)
    before = jax.device_get(start(stage, mesh)[0])
    after, metrics = train(stage, mesh, phases)
    expected, expected_metrics = self.expected(name, phases)
    chex.assert_trees_all_close(jax.device_get(after), expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(metrics), expected_metrics, rtol=1e-3, atol=1e-6)
    return mesh, before, after

  @parameterized.parameters(2, 4)
  def test_teacher(self, fsdp):
    mesh, before, after = self.assert_same("teacher", fsdp, ["train", "train"])
    kernel = ("blocks", "ffn", "up", "kernel")
    self.assertGreater(np.abs(_get(after.params, kernel) - _get(before.params, kernel)).max(), 1e-4)
    momentum = after.opt_state.inner_state[1][0].trace
    for tree in (after.params, after.ema, momentum):
      self.assert_sharded(_get(tree, kernel), mesh, fsdp)

  def test_dmd_in_both_phases(self):
    mesh, before, after = self.assert_same("dmd", 4, ["both", "fake"])
    kernel = ("blocks", "self_attn", "q", "kernel")
    for part in ("generator", "fake"):
      params = getattr(after, part).params
      moved = np.abs(_get(params, kernel) - _get(getattr(before, part).params, kernel)).max()
      self.assertGreater(moved, 1e-5, part)
      self.assert_sharded(_get(params, kernel), mesh, 4)

  def assert_sharded(self, array, mesh, fsdp):
    """A kernel lies in `fsdp` parts along its "embed" axis, each on as many devices as the data axis has."""
    self.assertEqual(array.sharding.mesh, mesh)
    self.assertIn("fsdp", array.sharding.spec)
    axis = list(array.sharding.spec).index("fsdp")
    part = list(array.shape)
    part[axis] //= fsdp
    self.assertLen(array.addressable_shards, 8)
    self.assertEqual({shard.data.shape for shard in array.addressable_shards}, {tuple(part)})
    self.assertLen({str(shard.index) for shard in array.addressable_shards}, fsdp)

  def test_every_large_parameter_and_its_moments_are_sharded(self):
    with mock.patch.object(self.teacher, "optimizer", state_lib.create_optimizer(self.teacher_config.optimizer, 4)):
      state, shardings = start(self.teacher, mesh_lib.create_mesh(4))
    adam = shardings.opt_state.inner_state[1][0]
    specs = jax.tree.map(lambda s: s.spec, shardings.params)
    for tree in (adam.mu, adam.nu, shardings.ema):
      self.assertEqual(jax.tree.map(lambda s: s.spec, tree), specs)
    for path, leaf in jax.tree.leaves_with_path(state.params):
      if path[-1].key == "kernel" and leaf.ndim > 1 and self.teacher.module.config.dim in leaf.shape:
        self.assertIn("fsdp", leaf.sharding.spec, path)
    self.assertEqual(adam.count.spec, PartitionSpec())

  def test_examples_lie_on_all_devices(self):
    batch = jax.device_put(make_batch(), mesh_lib.batch_sharding(mesh_lib.create_mesh(2)))
    self.assertEqual({shard.data.shape for shard in batch["latents"].addressable_shards}, {(2, 6, 4, 4, 4)})
    self.assertLen({str(shard.index) for shard in batch["latents"].addressable_shards}, 8)

  def test_a_mesh_that_does_not_fit(self):
    with self.assertRaisesRegex(errors.UserError, "mesh.fsdp = 3 does not divide the 8 devices"):
      mesh_lib.create_mesh(3)


def _get(tree, path):
  for key in path:
    tree = tree[key]
  return tree


if __name__ == "__main__":
  absltest.main()
