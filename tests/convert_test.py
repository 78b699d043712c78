"""Conversion through the command line: what comes in goes out, bit for bit, and bad input leaves nothing behind."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
from diffusers import AutoencoderKLWan
from diffusers import WanPipeline
from diffusers import WanTransformer3DModel
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from transformers import UMT5EncoderModel

from causvid_jax import pipeline
from causvid_jax import weights
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.parallel import mesh as mesh_lib
from causvid_jax.weights import files
from causvid_jax.weights import formats
from causvid_jax.weights import layouts
from causvid_jax.weights import store
from causvid_jax.weights import tensors
import cli_test
import files_test
import tiny

WAN, T5 = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
MODULES = {
    "transformer": transformer.WanTransformer(transformer.TransformerConfig(
        dim=36, ffn_dim=44, num_heads=3, num_layers=5, in_channels=3, out_channels=3, freq_dim=14, text_dim=20)),
    "vae": vae.WanVAE(vae.VAEConfig(dim=4, z_dim=3, latent_mean=(0.0,), latent_std=(1.0,))),
    "text_encoder": text_encoder.UMT5Encoder(text_encoder.TextEncoderConfig(
        vocab_size=64, dim=20, num_heads=3, head_dim=6, ffn_dim=28, num_layers=2)),
}
# Heads of 128, as files without a config.json have them.
LONE = transformer.WanTransformer(
    dataclasses.replace(MODULES["transformer"].config, dim=256, num_heads=2, num_layers=2))
SETTINGS = {"negative_prompt": "", "fps": 8, "clip_frames": 9, "frame_size": [16, 32], "independent_chunks": False,
            "chunk_frames": 3, "sampler": {**tiny.STUDENT, "steps": [1000, 500]}}
THEIRS = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
PLACES = {
    "causvid_jax": {kind: kind for kind in MODULES}, "diffusers": {kind: kind for kind in MODULES},
    "wan": {"transformer": "diffusion_pytorch_model.safetensors", "vae": WAN, "text_encoder": T5}}


def save(folder, module, params):
  """A component with matrices in bfloat16 and the rest in float32, as in Wan's files."""
  folder.mkdir(parents=True)
  flat = {name: tensors.of(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
  store.write_component(folder, module, {
      name: tensor.astype("bfloat16") if name.endswith("kernel") else tensor for name, tensor in flat.items()})


def as_torch(component):
  """A transformer's state under Wan's names."""
  names, _ = formats.export(formats.open_component(component), "wan")
  return {name: torch.from_numpy(np.array(tensor.read(()), np.float32, order="C")) for name, tensor in names.items()}


class ConvertTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.world = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.compile_fast(cls, cls.world)
    cls.ours = cls.world / "ours"
    for seed, (kind, module) in enumerate(MODULES.items()):
      save(cls.ours / kind, module, tiny.randomized(module, seed))
    shutil.copytree(store.ASSETS / "tokenizer", cls.ours / "tokenizer")
    places = {part: part for part in (*MODULES, "tokenizer")}
    (cls.ours / "pipeline.json").write_text(json.dumps({**places, **SETTINGS}))
    save(cls.world / "lone", LONE, tiny.randomized(LONE, 3))
    cls.state = as_torch(cls.world / "lone")

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.output = self.folder / "output"

  def convert(self, source, *flags, output=None):
    code, out, err = cli_test.call("convert", f"--source={source}", f"--output={output or self.output}", *flags)
    self.assertEqual(code, 0, err)
    self.assertStartsWith(out, f"{output or self.output}: ")
    return output or self.output

  def assert_refused(self, pattern, source, *flags, lines=1):
    before = sorted(self.folder.rglob("*"))
    code, out, err = cli_test.call("convert", f"--source={source}", f"--output={self.output}", *flags)
    self.assertEqual((code, out), (2, ""), err)
    self.assertRegex(err.splitlines()[-1], f"^error: .*{pattern}")
    self.assertNotIn("Traceback", err)
    if lines:
      self.assertEqual(err.count("\n"), lines, err)
    self.assertEqual(sorted(self.folder.rglob("*")), before)

  def assert_same(self, found, expected):
    """Two components with the same module and bits."""
    (module, params), (expected_module, expected_params) = (
        weights.load(path, dtype=None) for path in (found, expected))
    self.assertEqual(module, expected_module)
    chex.assert_trees_all_equal(params, expected_params, strict=True)

  @parameterized.product(layout=list(PLACES), lone=[False, True])
  def test_out_and_in_again_bit_for_bit(self, layout, lone):
    for source in [self.ours / kind for kind in MODULES] if lone else [self.ours]:
      there = self.convert(source, f"--to={layout}", output=self.folder / f"there_{source.name}")
      back = self.convert(there, output=self.folder / f"back_{source.name}")
      for kind in [source.name] if lone else MODULES:
        place = (there if lone else there / PLACES[layout][kind])
        expected = self.ours / kind
        if (layout, kind) == ("diffusers", "vae"):  # which writes the moments of every channel
          self.assertEqual(weights.load_config(place).config.latent_mean, (0.0, 0.0, 0.0))
          chex.assert_trees_all_equal(weights.load(place, dtype=None)[1], weights.load(expected, dtype=None)[1])
          expected = place
        self.assert_same(place, expected)
        self.assert_same(back if lone else back / kind, expected)
      if not lone:
        self.assertEqual((back / "tokenizer" / "tokenizer.json").read_bytes(),
                         (store.ASSETS / "tokenizer" / "tokenizer.json").read_bytes())

  def test_files_of_each_layout(self):
    for layout, expected in {
        "causvid_jax": ["pipeline.json", "tokenizer/tokenizer.json",
                        *(f"{kind}/{name}" for kind in MODULES for name in ("config.json", "weights.safetensors"))],
        "wan": ["config.json", "diffusion_pytorch_model.safetensors", WAN, T5, "google/umt5-xxl/tokenizer.json"],
        "diffusers": ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
                      "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
                      "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
                      "text_encoder/model.safetensors"],
        "causvid": ["model.pt"]}.items():
      folder = self.convert(self.ours, f"--to={layout}", output=self.folder / layout)
      self.assertCountEqual([str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()], expected)

  def test_other_tools_load_what_we_write(self):
    self.convert(self.ours, "--to=diffusers", "--dtype=float32")
    for kind, cls in THEIRS.items():
      model, info = cls.from_pretrained(self.output / kind, output_loading_info=True)
      self.assertFalse(any(info.values()), info)
      path = next((self.output / kind).glob("*.safetensors"))
      written, state = safetensors.torch.load_file(path), model.state_dict()
      self.assertContainsSubset(written, state)
      for name, value in written.items():
        np.testing.assert_array_equal(state[name], value, name)

  def test_diffusers_pipeline(self):
    self.convert(self.ours, "--to=diffusers", "--dtype=float32")
    theirs = WanPipeline.from_pretrained(self.output, tokenizer=None)  # a word list is no T5 tokenizer
    self.assertEqual({part: type(getattr(theirs, part)) for part in THEIRS}, THEIRS)
    config = theirs.scheduler.config
    found = config.flow_shift, config.prediction_type, config.use_flow_sigmas
    self.assertEqual(found, (3.0, "flow_prediction", True))

  def test_we_load_what_other_tools_write_in_shards(self):
    self.convert(self.ours, "--to=diffusers", "--dtype=float32")
    for kind in ("transformer", "text_encoder"):
      theirs = THEIRS[kind].from_pretrained(self.output / kind)
      theirs.save_pretrained(self.folder / kind, max_shard_size="10KB")
      self.assertGreater(len(list((self.folder / kind).glob("*.safetensors"))), 2)
      module, params = weights.load(self.folder / kind)
      expected_module, expected = weights.load(self.ours / kind)
      self.assertEqual(module, expected_module)
      chex.assert_trees_all_equal(params, expected)

  def save_training_checkpoint(self, **networks):
    torch.save({**networks, "critic": {"model.head.bias": torch.ones(3)}, "step": 7}, self.folder / "model.pt")
    return self.folder / "model.pt"

  @parameterized.parameters("", "model.", "model._fsdp_wrapped_module.", "module.model._orig_mod.")
  def test_prefixes_and_wrappers(self, prefix):
    state = {prefix + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value
             for name, value in self.state.items()}
    _, expected = weights.load(self.world / "lone")
    chex.assert_trees_all_equal(weights.load(self.save_training_checkpoint(generator=state))[1], expected)
    torch.save({"state_dict": state}, self.folder / "x.pth")
    safetensors.torch.save_file({f"diffusion_model.{name}": value for name, value in self.state.items()},
                                self.folder / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
      chex.assert_trees_all_equal(weights.load(self.folder / name)[1], expected)

  def test_the_average_is_preferred_and_the_other_selectable(self):
    average = {f"model.{name}": value + 1 for name, value in self.state.items()}
    path = self.save_training_checkpoint(generator={f"model.{n}": v for n, v in self.state.items()},
                                         generator_ema=average)
    _, expected = weights.load(self.world / "lone")
    for i, (flags, change, sampler) in enumerate((
        ([], 1, {"steps": 4, "shift": 5.0}), (["--select=generator_ema"], 1, {"steps": 4, "shift": 5.0}),
        (["--select=generator"], 0, {"steps": [1000, 757, 522], "shift": 8.0}))):
      folder = self.convert(path, f"--base={self.ours}", *flags, output=self.folder / str(i))
      found = weights.load(folder / "transformer")[1]
      chex.assert_trees_all_close(found, jax.tree.map(lambda x: x + change, expected), atol=1e-6)
      description = json.loads((folder / "pipeline.json").read_text())
      self.assertEqual({name: description["sampler"][name] for name in sampler}, sampler)
      self.assertEqual({**description["sampler"], **sampler},
                       {"kind": "student", "schedule": "flow_matching", "prediction": "flow", "chunk_frames": 3,
                        "sink_frames": 3, "window_frames": 15, **sampler})
      self.assertEqual(description["frame_size"], [16, 32])
    self.assert_refused("holds no 'generator': expected a training checkpoint", self.ours, "--select=generator")
    self.assert_refused("holds no 'generator_ema'", self.save_training_checkpoint(generator=self.state),
                        "--select=generator_ema")

  def test_out_to_causvid_and_back(self):
    self.convert(self.world / "lone", "--to=causvid")
    content = torch.load(self.output / "model.pt", weights_only=True)
    self.assertEqual(list(content), ["generator"])
    self.assertCountEqual(content["generator"], [f"model.{name}" for name in self.state])
    self.assert_same(self.convert(self.output, output=self.folder / "back"), self.world / "lone")
    self.assertEqual(self.convert(self.ours, "--to=causvid", output=self.folder / "part"), self.folder / "part")

  def test_teachers_sample_as_wan_does(self):
    self.convert(self.ours, "--to=wan")
    description = json.loads((self.convert(self.output, output=self.folder / "back") / "pipeline.json").read_text())
    self.assertEqual(description["sampler"], {
        "kind": "teacher", "schedule": "flow_matching", "prediction": "flow", "shift": 8.0, "num_steps": 50,
        "solver": "unipc", "guidance": 6.0})
    self.assertEqual((description["frame_size"], description["clip_frames"], description["fps"]), ([480, 832], 81, 16))

  def test_a_converted_student_makes_the_same_video(self):
    shutil.copytree(self.ours, self.folder / "student")
    description = json.loads((self.ours / "pipeline.json").read_text())
    description["sampler"] = layouts._SAMPLERS["generator"]
    (self.folder / "student" / "pipeline.json").write_text(json.dumps(description))
    shutil.copytree(self.world / "lone", self.folder / "student" / "transformer", dirs_exist_ok=True)
    self.convert(self.folder / "student", "--to=causvid")
    back = self.convert(self.output, f"--base={self.ours}", output=self.folder / "back")
    videos = [pipeline.Pipeline.from_checkpoint(folder)("a red seven", 9, 1)
              for folder in (self.folder / "student", back)]
    self.assertGreater(videos[0].std(), 0)
    np.testing.assert_array_equal(*videos)

  def test_files_behind_links(self):
    self.convert(self.world / "lone", "--to=wan")
    os.rename(self.output / "diffusion_pytorch_model.safetensors", self.folder / "blob")  # as the hub's cache does
    link = self.output / "diffusion_pytorch_model.safetensors"
    link.symlink_to(self.folder / "blob")
    for path in (link, self.output):
      self.assert_same(path, self.world / "lone")
      self.assertEqual(weights.load_config(path), LONE)

  def test_types(self):
    for dtype in ("float32", "bfloat16", "float16"):
      folder = self.convert(self.world / "lone", f"--dtype={dtype}", output=self.folder / dtype)
      component = formats.open_component(folder)
      self.assertEqual({str(tensor.dtype) for tensor in component.tensors.values()}, {dtype})
    _, params = weights.load(self.world / "lone", dtype=None)
    expected = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
    chex.assert_trees_all_equal(weights.load(self.folder / "float16")[1], expected)

  def test_shardings_as_a_tree_a_function_or_one_for_all(self):
    module, expected = weights.load(self.world / "lone")
    mesh = mesh_lib.create_mesh()
    shard = lambda boxed: nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, mesh_lib.RULES)
    tree = shard(jax.eval_shape(lambda: store.init(module, jax.random.key(0))))
    for shardings, wanted in ((tree, tree), (shard, tree), (mesh_lib.replicated(mesh),) * 2):
      _, params = weights.load(self.world / "lone", shardings=shardings)
      chex.assert_trees_all_equal(params, expected, strict=True)
      shardings = jax.tree.broadcast(wanted, params)
      jax.tree.map(lambda x, sharding: self.assertEqual(x.sharding, sharding), params, shardings)

  def test_each_device_reads_its_part_only(self):
    code = (
        "import sys, jax, numpy as np\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P\n"
        "from causvid_jax import weights\n"
        "from causvid_jax.weights import formats, tensors\n"
        "reads = []\n"
        "read = lambda index: reads.append(index) or np.arange(64.).reshape(8, 8)[index]\n"
        "mesh = Mesh(jax.devices(), 'x')\n"
        "tensor = tensors.Tensor((8, 8), np.dtype('float64'), read)\n"
        "found = formats.read({'a/b': tensor}, 'float32', NamedSharding(mesh, P('x')))['a']['b']\n"
        "assert sorted(index[0].start or 0 for index in reads) == list(range(0, 8, 2)), reads\n"
        "assert all(index[0].stop - (index[0].start or 0) == 2 for index in reads), reads\n"
        "assert [s.data.shape for s in found.addressable_shards] == [(2, 8)] * 4\n"
        "np.testing.assert_array_equal(found, np.arange(64.).reshape(8, 8))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"})
    self.assertEqual(done.returncode, 0, done.stderr)

  def save_lora(self, name, prefix="diffusion_model."):
    rng = np.random.default_rng(len(name))
    a, b = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((2, 256), (256, 2)))
    key = f"{prefix}blocks.1.self_attn.q"
    safetensors.torch.save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, self.folder / name)
    return self.folder / name, (b @ a).numpy()

  def test_loras_are_added_with_their_scales(self):
    (one, change), (two, more) = self.save_lora("a.safetensors"), self.save_lora("ab.safetensors")
    self.convert(self.world / "lone", f"--lora={one}", f"--lora={two}", "--lora_scale=0.5", "--lora_scale=-2",
                 "--to=wan", "--dtype=float32")
    found = files.open_tensors(self.output / "diffusion_pytorch_model.safetensors")
    self.assertCountEqual(found, self.state)
    for name, before in self.state.items():
      after = found[name].read(())
      if name == "blocks.1.self_attn.q.weight":
        expected = before.numpy() + 0.5 * change - 2 * more
        self.assertLess(np.abs(after - expected).max(), 0.02 * np.abs(expected).max())  # bfloat16
      else:
        np.testing.assert_array_equal(after, before, name)

  def test_loras_that_do_not_fit(self):
    lora, _ = self.save_lora("a.safetensors")
    self.assert_refused(r"a.safetensors.*blocks.1.self_attn.q", self.ours / "transformer", f"--lora={lora}")
    self.assert_refused("expected a transformer to add it to, got a vae", self.ours / "vae", f"--lora={lora}")
    self.assert_refused("2 of --lora_scale for 1 of --lora", self.world / "lone", f"--lora={lora}",
                        "--lora_scale=1", "--lora_scale=1")
    self.assert_refused("look like a LoRA's: give it with a transformer", lora)

  def test_weights_that_are_not_finite_are_named_once(self):
    self.state["blocks.1.ffn.0.weight"][3, 5] = np.nan
    self.addCleanup(self.state["blocks.1.ffn.0.weight"].__setitem__, (3, 5), 0.25)
    path = self.save_training_checkpoint(generator=self.state)
    with self.assertLogs(level="WARNING") as logs:
      self.convert(path)
    self.assertLen(logs.records, 1)
    name = next(rule.ours for rule in formats.FORMATS["transformer"]["wan"].table(LONE.config).rules
                if rule.theirs == "blocks.{}.ffn.0.weight")
    self.assertEqual(logs.records[0].getMessage(), f"NaN or infinite weights: {name}")

  # Bad input.

  def test_outputs(self):
    self.output.mkdir()
    self.assert_refused(f"--output={self.output} exists: expected the name of a new folder", self.ours)
    self.output.rmdir()
    (self.folder / "file").touch()
    self.output = self.folder / "file" / "below"
    self.assert_refused(f"cannot write {self.output}: (Not a directory|File exists)", self.ours / "vae", lines=0)

  def test_full_disk(self):
    for layout in layouts.LAYOUTS:
      with files_test.full_disk(20_000):
        self.assert_refused(f"cannot write {self.folder}/.*", self.ours, f"--to={layout}", lines=0)

  def test_sources(self):
    self.assert_refused("no weights at '[^']*nowhere'", self.folder / "nowhere")
    (self.folder / "empty").mkdir()
    self.assert_refused("no weights in .*empty: expected a .safetensors", self.folder / "empty")
    files.write_safetensors(self.folder / "x.safetensors", {"weird": tensors.of(np.ones(2))})
    self.assert_refused("x.safetensors is nothing that we know: it holds weird; expected Wan 2.1's transformer or VAE",
                        self.folder / "x.safetensors")

  def test_damaged_files(self):
    self.convert(self.ours, "--to=wan", output=self.folder / "wan")
    for name in (WAN, T5, "diffusion_pytorch_model.safetensors", "config.json"):
      content = (self.folder / "wan" / name).read_bytes()
      (self.folder / "wan" / name).write_bytes(content[:len(content) // 2])
      self.assert_refused(f"{name} is missing or damaged", self.folder / "wan")
      (self.folder / "wan" / name).write_bytes(content)

  def test_pickles_that_would_run_code(self):
    class Evil:
      def __reduce__(self, path=self.folder / "trace"):
        return os.system, (f"touch {path}",)
    torch.save({"generator": Evil()}, self.folder / "x.pt")
    self.assert_refused("x.pt is refused: it holds posix.system", self.folder / "x.pt")

  def test_tensors_that_are_wrong(self):
    state = dict(self.state)
    bias = state.pop("blocks.1.ffn.0.bias")
    self.assert_refused("model.pt: blocks.1.ffn.0.bias missing", self.save_training_checkpoint(generator=state))
    state["blocks.1.ffn.0.bias"] = bias.to(torch.int32)
    self.assert_refused(r"holds blocks.1.ffn.0.bias \(int32\): expected weights of floating point",
                        self.save_training_checkpoint(generator=state))
    state["blocks.1.ffn.0.bias"] = bias[1:]
    self.assert_refused("blocks.1.ffn.0.bias", self.save_training_checkpoint(generator=state))
    state["blocks.1.ffn.0.bias"] = bias
    state["extra"] = bias
    self.assert_refused("extra not expected", self.save_training_checkpoint(generator=state))
    del state["extra"]
    state["model.blocks.1.ffn.0.bias"] = bias
    self.assert_refused("holds blocks.1.ffn.0.bias twice", self.save_training_checkpoint(generator=state))

  def test_incomplete_pipelines(self):
    self.convert(self.ours, "--to=diffusers", output=self.folder / "part")
    for part in ("vae", "tokenizer"):
      shutil.rmtree(self.folder / "part" / part)
    self.assert_refused("part has no vae, tokenizer: expected a whole pipeline", self.folder / "part")
    self.assert_refused("is no pipeline: expected a folder with the components", self.folder / "part",
                        f"--base={self.world / 'lone'}")
    self.convert(self.folder / "part", f"--base={self.ours}")
    self.assert_same(self.output / "vae", self.ours / "vae")
    (self.folder / "part" / "tokenizer").mkdir()
    self.output = self.folder / "other"
    self.assert_refused("tokenizer has no tokenizer.json", self.folder / "part", f"--base={self.ours}")

  def test_what_a_layout_cannot_hold(self):
    self.assert_refused("CausVid's files hold a transformer: expected one, got a vae", self.ours / "vae",
                        "--to=causvid")
    self.assert_refused("no place for this VAE's own latent mean and std", "digit_world", "--to=wan")


if __name__ == "__main__":
  absltest.main()
