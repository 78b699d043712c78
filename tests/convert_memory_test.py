"""Peak memory of converting a full-size transformer of 2.8 GB; CAUSVID_SLOW_TESTS=1 runs it, on 9 GB of disk."""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from causvid_jax.models import transformer
from causvid_jax.weights import files
from causvid_jax.weights import formats
from causvid_jax.weights import store
from causvid_jax.weights import tensors
import tiny

MODULE = transformer.WanTransformer(transformer.PRESETS["wan_1_3b"])
GB = 10**9


def draw(seed, shape):
  """A tensor of random bfloat16 in [1, 2) that takes no memory: a random block, over and over."""
  block = np.random.default_rng(seed).integers(0x3F80, 0x4000, 2**16 + seed, np.uint16)
  return tensors.Tensor(shape, np.dtype("bfloat16"), lambda index: np.resize(block, shape).view("bfloat16")[index])


def convert(source, output, *flags):
  """Runs the command; its peak memory in bytes."""
  command = [sys.executable, "-m", "causvid_jax.convert", f"--source={source}", f"--output={output}", *flags]
  process = subprocess.Popen(command, cwd=tiny.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise AssertionError(f"{command} exits with status {process.returncode}")
  return usage.ru_maxrss * 1024


@absltest.skipUnless(os.environ.get("CAUSVID_SLOW_TESTS") == "1", "CAUSVID_SLOW_TESTS=1 runs it")
class ConvertMemoryTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    table = formats.FORMATS["transformer"]["wan"].table(MODULE.config)
    shapes = store.shapes_of(MODULE)
    ours = {name: draw(seed, shape) for seed, (name, shape) in enumerate(shapes.items())}
    layers = {rule.ours for rule in table.rules if "{}" in rule.theirs}
    ours = {name: tensors.stack([draw(seed, shapes[name][1:]) for seed in range(shapes[name][0])]) if name in layers
            else tensor for name, tensor in ours.items()}
    cls.source = cls.folder / "diffusion_pytorch_model.safetensors"
    component = formats.Component(MODULE, ours, formats.OURS, None, "random")
    files.write_safetensors(cls.source, formats.export(component, "wan")[0])
    cls.size = cls.source.stat().st_size

  @parameterized.parameters("causvid_jax", "diffusers", "causvid")
  def test_peak(self, layout):
    self.assertBetween(self.size, 2.8 * GB, 2.9 * GB)
    output = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "output"
    peak = convert(self.source, output, f"--to={layout}")
    print(f"{self.size / GB:.2f} GB to {layout}: peak {peak / GB:.2f} GB")
    self.assertLess(peak, 1.3 * self.size + GB)
    before, after = (formats.open_component(path).tensors["blocks/ffn/up/kernel"] for path in (self.source, output))
    self.assertEqual(after.dtype, "bfloat16")
    np.testing.assert_array_equal(after[17].read(()), before[17].read(()))


if __name__ == "__main__":
  absltest.main()
