"""Full size on a small machine: peak memory of converting Wan 1.3B, and of sampling with it.

CAUSVID_SLOW_TESTS=1 runs it, on 10 GB of disk. CAUSVID_TEXT_LAYERS=24 gives the text encoder all its layers, 11 GB more.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from causvid_jax.data import video
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.weights import files
from causvid_jax.weights import formats
from causvid_jax.weights import layouts
from causvid_jax.weights import store
from causvid_jax.weights import tensors
import tiny

GB = 10**9


def draw(seed, shape):
  """A tensor of random bfloat16 in +-[1/64, 1/32) that takes no memory: a random block, over and over."""
  block = np.random.default_rng(seed).choice([0x3C80, 0xBC80], 2**16 + seed).astype(np.uint16)
  block += np.random.default_rng(seed).integers(0, 0x80, block.size, np.uint16)
  return tensors.Tensor(shape, np.dtype("bfloat16"), lambda index: np.resize(block, shape).view("bfloat16")[index])


def random_component(module):
  """A component that would fill the memory, and does not."""
  shapes = store.shapes_of(module)
  return formats.Component(module, {
      name: tensors.stack([draw(i, shape[1:]) for i in range(shape[0])]) if name.startswith("blocks/") else draw(seed, shape)
      for seed, (name, shape) in enumerate(shapes.items())}, formats.OURS, None, "random")


def run(module, *flags):
  """Runs `python -m causvid_jax.<module>`; its peak memory in bytes."""
  command = [sys.executable, "-m", f"causvid_jax.{module}", *flags]
  process = subprocess.Popen(command, cwd=tiny.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise AssertionError(f"{command} exits with status {process.returncode}")
  return usage.ru_maxrss * 1024


@absltest.skipUnless(os.environ.get("CAUSVID_SLOW_TESTS") == "1", "CAUSVID_SLOW_TESTS=1 runs it")
class FullSizeTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.component = random_component(transformer.WanTransformer(transformer.PRESETS["wan_1_3b"]))
    cls.source = cls.folder / "diffusion_pytorch_model.safetensors"
    files.write_safetensors(cls.source, formats.export(cls.component, "wan")[0])
    cls.size = cls.source.stat().st_size

  @parameterized.parameters("causvid_jax", "diffusers", "causvid")
  def test_converting(self, layout):
    self.assertBetween(self.size, 2.8 * GB, 2.9 * GB)
    output = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "output"
    peak = run("convert", f"--source={self.source}", f"--output={output}", f"--to={layout}")
    print(f"{self.size / GB:.2f} GB to {layout}: peak {peak / GB:.2f} GB")
    self.assertLess(peak, 1.3 * self.size + GB)
    before, after = (formats.open_component(path).tensors["blocks/ffn/up/kernel"] for path in (self.source, output))
    self.assertEqual(after.dtype, "bfloat16")
    np.testing.assert_array_equal(after[17].read(()), before[17].read(()))

  def test_sampling_a_chunk_at_low_resolution(self):
    layers = int(os.environ.get("CAUSVID_TEXT_LAYERS", "1"))
    encoder = dataclasses.replace(text_encoder.PRESETS["umt5_xxl"], num_layers=layers)
    modules = {"vae": vae.WanVAE(vae.PRESETS["wan"]), "text_encoder": text_encoder.UMT5Encoder(encoder)}
    components = {"transformer": self.component, **{kind: random_component(module) for kind, module in modules.items()}}
    sampler = {**tiny.STUDENT, "steps": 4, "shift": 8.0, "window_frames": 15}
    model = layouts.Model(components, store.ASSETS / "tokenizer", {
        "negative_prompt": "", "fps": 16, "clip_frames": 9, "frame_size": [64, 96], "independent_chunks": False,
        "chunk_frames": 3, "sampler": sampler})
    folder, output = self.folder / "pipeline", self.folder / "out.mp4"
    layouts.write(folder, model, "causvid_jax")
    start = time.monotonic()
    peak = run("sample", f"--checkpoint={folder}", "--prompt=a red seven", f"--output={output}")
    sizes = {kind: round(component.nbytes / GB, 2) for kind, component in components.items()}
    print(f"sampling with {sizes} GB of weights: peak {peak / GB:.2f} GB, {time.monotonic() - start:.0f} s")
    self.assertEqual(video.read_video(output)[0].shape, (9, 64, 96, 3))
    # The text encoder is gone before the transformer comes; each is in memory in half precision.
    self.assertLess(peak, 1.3 * max(component.nbytes for component in components.values()) + 3 * GB)


if __name__ == "__main__":
  absltest.main()
