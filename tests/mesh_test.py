"""Training over a mesh of 8 simulated devices equals training on one; run in a process of its own."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

if __name__ == "__main__":  # before JAX starts; programs this small take longer to optimise than to run
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  os.environ["JAX_PLATFORMS"] = "cpu"

from absl.testing import absltest
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
  return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9)), 3)


def shardings_of(stage, mesh):
  return mesh_lib.state_shardings(mesh, stage.init, rng.stream_key(0, "init"), stage.pretrained())


def train(stage, mesh, phases):
  """The state before, the state after a step of each phase, and the last metrics; built as the training loop does."""
  shardings = shardings_of(stage, mesh)
  state = jax.jit(lambda *args: nn.unbox(stage.init(*args)), out_shardings=shardings)(
      rng.stream_key(0, "init"), stage.pretrained())
  before = jax.device_get(state)
  frozen = jax.device_put(stage.frozen, mesh_lib.replicated(mesh))
  step = jax.jit(stage.step, static_argnames="phase", donate_argnums=0,
                 out_shardings=(shardings, mesh_lib.replicated(mesh)))
  for i, phase in enumerate(phases):
    batch = jax.device_put(make_batch(), mesh_lib.batch_sharding(mesh))
    state, metrics = step(state, frozen, batch, rng.stream_key(0, "step", i), phase=phase)
  return before, state, metrics


def largest(before, after):
  """The largest change of any parameter."""
  return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(after))))


class OwnProcessTest(absltest.TestCase):

  def test_on_eight_devices(self):
    if __name__ == "__main__":
      self.skipTest("this is that process")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    self.assertRegex(done.stderr, r"Ran 6 tests(.|\n)*OK \(skipped=1\)")


@absltest.skipUnless(__name__ == "__main__", "needs 8 devices: OwnProcessTest runs it")
class MeshTest(absltest.TestCase):

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

  def train_on_both(self, stage, fsdp, phases):
    """Trains on a mesh and on one device, and compares; the states before and after, and the mesh."""
    mesh = mesh_lib.create_mesh(fsdp)
    before, after, metrics = train(stage, mesh, phases)
    expected = train(stage, one_device(), phases)
    chex.assert_trees_all_equal(before, jax.device_get(expected[0]))
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected[2]), rtol=1e-3, atol=1e-6)
    return before, after, expected[1], mesh

  def assert_same_update(self, before, after, expected):
    """Two states of one network differ by rounding, small against what the updates did."""
    moved = largest(before.params, expected.params)
    self.assertGreater(moved, 1e-4)
    chex.assert_trees_all_close(jax.device_get(after), jax.device_get(expected), rtol=1e-5, atol=moved / 300)

  def test_teacher(self):
    before, after, expected, mesh = self.train_on_both(self.teacher, 2, ["train", "train"])
    self.assert_same_update(before, after, expected)
    for tree in (after.params, after.ema, after.opt_state.inner_state[1][0].trace):
      self.assert_sharded(tree["blocks"]["ffn"]["up"]["kernel"], mesh, 2)

  def test_dmd_in_both_phases(self):
    before, after, expected, mesh = self.train_on_both(self.dmd, 4, ["both", "fake"])
    for part in ("generator", "fake"):
      self.assert_same_update(getattr(before, part), getattr(after, part), getattr(expected, part))
      self.assert_sharded(getattr(after, part).params["blocks"]["self_attn"]["q"]["kernel"], mesh, 4)

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

  def test_the_kernels_of_all_blocks_and_their_moments_are_sharded(self):
    with mock.patch.object(self.teacher, "optimizer", state_lib.create_optimizer(self.teacher_config.optimizer, 4)):
      shardings = shardings_of(self.teacher, mesh_lib.create_mesh(4))
    specs, adam = jax.tree.map(lambda s: s.spec, shardings.params), shardings.opt_state.inner_state[1][0]
    for tree in (adam.mu, adam.nu, shardings.ema):
      self.assertEqual(jax.tree.map(lambda s: s.spec, tree), specs)
    kernels = [(path, s.spec) for path, s in jax.tree.leaves_with_path(shardings.params["blocks"])
               if path[-1].key == "kernel"]
    self.assertLen(kernels, 10)  # four of each attention and two of the feed-forward
    for path, spec in kernels:
      self.assertIn("fsdp", spec, path)
    self.assertEqual(adam.count.spec, PartitionSpec())

  def test_examples_lie_on_all_devices(self):
    batch = jax.device_put(make_batch(), mesh_lib.batch_sharding(mesh_lib.create_mesh(2)))
    self.assertEqual({shard.data.shape for shard in batch["latents"].addressable_shards}, {(2, 6, 4, 4, 4)})
    self.assertLen({str(shard.index) for shard in batch["latents"].addressable_shards}, 8)

  def test_a_mesh_that_does_not_fit(self):
    with self.assertRaisesRegex(errors.UserError, "mesh.fsdp = 3 does not divide the 8 devices"):
      mesh_lib.create_mesh(3)


if __name__ == "__main__":
  absltest.main()
