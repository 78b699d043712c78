"""Weights on disk: identity, refusals that name the culprit, whole or absent, and what ships."""

import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import tokenizer
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.weights import store
import tiny

MODULES = {
    "vae": vae.WanVAE(vae.VAEConfig(dim=2, z_dim=2, multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,),
                                    latent_mean=(0.25, -1.0), latent_std=(2.0, 0.5))),
    "text_encoder": text_encoder.UMT5Encoder(text_encoder.TextEncoderConfig(
        vocab_size=11, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=1)),
    "transformer": transformer.WanTransformer(transformer.PRESETS["test"]),
}


class StoreTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = {kind: tiny.randomized(module, 0) for kind, module in MODULES.items()}

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "new" / "weights"

  def save(self, kind="text_encoder", **options):
    weights.save(self.folder, MODULES[kind], self.params[kind], **options)

  def assert_refused(self, pattern, call=weights.load):
    with self.assertRaisesRegex(errors.UserError, pattern) as caught:
      call(self.folder)
    self.assertIn(str(self.folder), str(caught.exception))

  @parameterized.parameters(*MODULES)
  def test_load_inverts_save_bit_for_bit(self, kind):
    self.save(kind)
    module, params = weights.load(self.folder)
    self.assertEqual(module, MODULES[kind])
    self.assertEqual(weights.load_config(self.folder), MODULES[kind])
    chex.assert_trees_all_equal(params, self.params[kind], strict=True)

  def test_half_precision_is_a_cast_and_half_the_file(self):
    self.save("transformer")
    full = (self.folder / "weights.safetensors").stat().st_size
    self.save("transformer", dtype="float16")
    _, params = weights.load(self.folder)
    expected = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), self.params["transformer"])
    chex.assert_trees_all_equal(params, expected, strict=True)
    header = 100 * len(jax.tree.leaves(params))
    self.assertLess((self.folder / "weights.safetensors").stat().st_size, full / 2 + header)

  def test_saving_again_replaces(self):
    self.save()
    (self.folder / "stale").touch()
    weights.save(self.folder, MODULES["vae"], self.params["vae"])
    self.assertEqual(weights.load_config(self.folder), MODULES["vae"])
    self.assertCountEqual(os.listdir(self.folder), ["config.json", "weights.safetensors"])
    self.assertEqual(os.listdir(self.folder.parent), ["weights"])

  def test_a_pipeline_and_its_neighbours(self):
    description = {"vae": "../vae", "fps": 8, "sampler": {"kind": "student", "steps": [999, 748.5]}}
    weights.save_pipeline(self.folder, MODULES["transformer"], self.params["transformer"], description)
    weights.save(self.folder.with_name("vae"), MODULES["vae"], self.params["vae"])
    folder, found = weights.load_pipeline(self.folder)
    self.assertEqual(found, description | {"transformer": "transformer"})
    module, params = weights.load(found["transformer"], folder)
    self.assertEqual(module, MODULES["transformer"])
    chex.assert_trees_all_equal(params, self.params["transformer"])
    self.assertEqual(weights.load(found["vae"], folder)[0], MODULES["vae"])

  def test_missing_folders(self):
    self.assert_refused("no weights at .*: expected a folder, or a name of what ships, such as 'digit_world'")
    self.assert_refused("no weights at", weights.load_pipeline)
    self.save()
    self.assert_refused(r"pipeline.json is missing or damaged", weights.load_pipeline)

  @parameterized.parameters("config.json", "weights.safetensors")
  def test_missing_and_half_written_files(self, name):
    self.save()
    path = self.folder / name
    content = path.read_bytes()
    for kept in (len(content) // 2, 5, 0):
      path.write_bytes(content[:kept])
      self.assert_refused(f"{name} is missing or damaged")
    path.unlink()
    self.assert_refused(f"{name} is missing or damaged")

  @parameterized.parameters(
      ({"kind": "sampler"}, "sampler"), ({"kind": None}, "config.json"),
      ({"config": {"num_heads": 2, "heads_of_state": 1}}, "heads_of_state"), ({"config": {"dim": 8}}, "vocab_size"))
  def test_descriptions_of_no_component(self, change, culprit):
    self.save()
    path = self.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    self.assert_refused(f"config.json is not a component of this version.*{culprit}|{culprit} is not a component")

  def test_weights_that_do_not_fit(self):
    self.save()
    path = self.folder / "weights.safetensors"
    flat = safetensors_numpy.load_file(path)
    name = sorted(flat)[1]
    for changed, culprit in (
        ({k: v for k, v in flat.items() if k != name}, name),
        ({**flat, "layers/extra/kernel": flat[name]}, "layers/extra/kernel"),
        ({**flat, name: np.zeros((*flat[name].shape, 1), np.float32)}, name)):
      safetensors_numpy.save_file(changed, path)
      self.assert_refused(f"does not fit its config.json: {culprit}$")
    safetensors_numpy.save_file({f"x{i}": flat[name] for i in range(9)}, path)
    self.assert_refused(rf"does not fit its config.json: .* and {len(flat) + 9 - 5} more")

  @parameterized.parameters(False, True)
  def test_an_interrupted_save_leaves_what_was_there(self, there):
    if there:
      self.save()
    before = weights.load(self.folder)[1] if there else None
    other = jax.tree.map(lambda x: x + 1, self.params["text_encoder"])
    for target in ("save_file", "_write_json"):
      owner = store.safetensors_numpy if target == "save_file" else store
      with mock.patch.object(owner, target, side_effect=KeyboardInterrupt):
        with self.assertRaises(KeyboardInterrupt):
          weights.save(self.folder, MODULES["text_encoder"], other)
      self.assertEqual(os.listdir(self.folder.parent), ["weights"] if there else [])
    if there:
      chex.assert_trees_all_equal(weights.load(self.folder)[1], before)

  def test_an_interrupted_pipeline_leaves_nothing(self):
    write = store._write_json
    def interrupted(path, content):
      if path.name == "pipeline.json":
        raise KeyboardInterrupt
      write(path, content)
    with mock.patch.object(store, "_write_json", interrupted), self.assertRaises(KeyboardInterrupt):
      weights.save_pipeline(self.folder, MODULES["transformer"], self.params["transformer"], {})
    self.assertEqual(os.listdir(self.folder.parent), [])

  def test_what_a_killed_save_left_is_no_obstacle(self):
    partial = self.folder.with_name("weights.partial")
    partial.mkdir(parents=True)
    (partial / "junk").touch()
    self.save()
    self.assertEqual(os.listdir(self.folder.parent), ["weights"])
    self.assertNotIn("junk", os.listdir(self.folder))

  def test_a_path_goes_before_a_name_and_a_neighbour_before_what_ships(self):
    base = self.folder.parent
    self.assertEqual(store.resolve("digit_world/vae", base), (store.ASSETS / "digit_world/vae").resolve())
    shutil.copytree(store.ASSETS / "tokenizer", base / "tokenizer")
    self.assertEqual(store.resolve("tokenizer", base), (base / "tokenizer").resolve())
    self.assertEqual(store.resolve(base / "tokenizer"), (base / "tokenizer").resolve())
    self.assertEqual(store.resolve("tokenizer"), (store.ASSETS / "tokenizer").resolve())


class ShippedTest(absltest.TestCase):

  def test_components_load_and_tell_where_they_come_from(self):
    folders = [path.parent for path in store.ASSETS.rglob("weights.safetensors")]
    names = [str(folder.relative_to(store.ASSETS)) for folder in folders]
    self.assertContainsSubset(["digit_world/vae", "digit_world/text_encoder", "digit_world/judge"], names)
    for name, folder in zip(names, folders):
      if (folder / "config.json").exists():
        _, params = weights.load(name)
        self.assertTrue(all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params)), name)
      beside = folder.parent if folder.name == "transformer" else folder
      provenance = json.loads((beside / "provenance.json").read_text())
      self.assertTrue({"command", "script"} & provenance.keys(), name)
      for run in provenance.get("runs", {"judge": provenance}).values():
        self.assertContainsSubset(["seed", "commit", "hardware", "versions"], run, name)
        self.assertContainsSubset(["metrics"] if run is provenance else ["config", "steps", "hours", "last_metrics"], run)

  def test_pipelines_name_components_that_resolve(self):
    for path in store.ASSETS.rglob("pipeline.json"):
      folder, description = weights.load_pipeline(path.parent.relative_to(store.ASSETS))
      network, autoencoder, encoder = (
          weights.load_config(description[name], folder) for name in ("transformer", "vae", "text_encoder"))
      self.assertEqual(network.config.in_channels, autoencoder.config.z_dim)
      self.assertEqual(network.config.text_dim, encoder.config.dim)
      backend = tokenizer.Tokenizer.from_file(store.resolve(description["tokenizer"], folder) / "tokenizer.json")
      self.assertLessEqual(backend.vocab_size, encoder.config.vocab_size)

  def test_all_together_are_small(self):
    size = sum(path.stat().st_size for path in store.ASSETS.rglob("*") if path.is_file())
    self.assertBetween(size, 1e6, 32 * 2**20)


if __name__ == "__main__":
  absltest.main()
