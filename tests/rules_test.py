"""Tests of the rule engine on a toy table, and of the transformer's tables at every size, by shapes alone."""

import collections
import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.models import transformer
from causvid_jax.weights import rules
from causvid_jax.weights import store
from causvid_jax.weights import tensors
from causvid_jax.weights import transformer_rules

LAYERS = 5
TOY = rules.Table(
    rules=(
        rules.Rule("stem.weight", "stem/kernel", "o c 1 h w -> (h w c) o"),
        rules.Rule("stem.bias", "stem/bias"),
        rules.Rule("layers.{}.linear.weight", "layers/linear/kernel", "o i -> i o"),
        rules.Rule("layers.{}.table", "layers/table", "1 n c -> n c"),
    ),
    layers=LAYERS, sizes={"h": 2, "w": 3}, repeated=("copy.bias",))
THEIRS = {
    "stem.weight": (7, 4, 1, 2, 3), "stem.bias": (7,),
    **{f"layers.{i}.linear.weight": (3, 7) for i in range(LAYERS)},
    **{f"layers.{i}.table": (1, 2, 7) for i in range(LAYERS)},
}
OURS = {
    "stem/kernel": (24, 7), "stem/bias": (7,),
    "layers/linear/kernel": (LAYERS, 7, 3), "layers/table": (LAYERS, 2, 7),
}


def random(shapes, dtype, seed=0):
  """Random bits, not numbers, so that whatever touches a value (NaN payloads included) is seen."""
  rng = np.random.default_rng(seed)
  size = np.dtype(dtype).itemsize
  return {name: rng.integers(256, size=(*shape[:-1], shape[-1] * size), dtype=np.uint8).view(dtype)
          for name, shape in shapes.items()}


def lazy(arrays, reads=None):
  """Tensors that count their reads by name."""
  def tensor(name, array):
    def read(index):
      if reads is not None:
        reads[name] += 1
      return array[index]
    return tensors.Tensor(array.shape, array.dtype, read)
  return {name: tensor(name, array) for name, array in arrays.items()}


def abstract(shapes):
  """Tensors that must not be read."""
  return {name: tensors.Tensor(shape, np.dtype("float32"), None) for name, shape in shapes.items()}


def shapes_of(found):
  return {name: tensor.shape for name, tensor in found.items()}


class EngineTest(parameterized.TestCase):

  def assert_same_bits(self, found, arrays):
    self.assertCountEqual(found, arrays)
    for name, array in arrays.items():
      value = found[name].read(())
      self.assertEqual((found[name].shape, found[name].dtype), (array.shape, array.dtype), msg=name)
      self.assertEqual((value.shape, value.dtype), (array.shape, array.dtype), msg=name)
      self.assertEqual(value.tobytes(), array.tobytes(), msg=name)

  @parameterized.parameters("float32", "float16", jnp.bfloat16, jnp.float8_e4m3fn)
  def test_there_and_back_is_the_identity_bit_for_bit(self, dtype):
    theirs, ours = random(THEIRS, dtype), random(OURS, dtype, seed=1)
    self.assert_same_bits(rules.to_theirs(TOY, rules.to_ours(TOY, lazy(theirs), OURS, "x"), "x"), theirs)
    self.assert_same_bits(rules.to_ours(TOY, rules.to_theirs(TOY, lazy(ours), "x"), OURS, "x"), ours)

  def test_values_go_where_the_patterns_say(self):
    rng = np.random.default_rng(0)
    theirs = {name: rng.normal(size=shape) for name, shape in THEIRS.items()}
    ours = {path: tensor.read(()) for path, tensor in rules.to_ours(TOY, lazy(theirs), OURS, "x").items()}
    np.testing.assert_array_equal(ours["layers/linear/kernel"][3], theirs["layers.3.linear.weight"].T)
    np.testing.assert_array_equal(ours["layers/table"][4], theirs["layers.4.table"][0])
    for c, h, w in ((0, 0, 0), (3, 1, 2), (2, 0, 1)):
      np.testing.assert_array_equal(ours["stem/kernel"][(h * 3 + w) * 4 + c], theirs["stem.weight"][:, c, 0, h, w])

  def test_reading_a_layer_reads_that_layer_alone(self):
    reads = collections.Counter()
    theirs = random(THEIRS, "float32")
    ours = rules.to_ours(TOY, lazy(theirs, reads), OURS, "x")
    self.assertEmpty(reads)
    kernel = ours["layers/linear/kernel"]
    np.testing.assert_array_equal(kernel.read((2, slice(None), slice(0, 2))), theirs["layers.2.linear.weight"].T[:, :2])
    self.assertEqual(reads, {"layers.2.linear.weight": 1})
    np.testing.assert_array_equal(
        kernel.read((slice(3, 5),)), np.stack([theirs[f"layers.{i}.linear.weight"].T for i in (3, 4)]))
    self.assertEqual(reads, {f"layers.{i}.linear.weight": 1 for i in (2, 3, 4)})

  def test_exporting_a_layer_reads_one_slice_of_the_stack(self):
    indices = []
    array = random(OURS, "float32")["layers/table"]
    def read(index):
      indices.append(index)
      return array[index]
    ours = {**abstract(OURS), "layers/table": tensors.Tensor(array.shape, array.dtype, read)}
    rules.to_theirs(TOY, ours, "x")["layers.3.table"].read(())
    self.assertEqual(indices, [(3,)])

  def test_a_repeated_tensor_may_be_there(self):
    theirs = abstract({**THEIRS, "copy.bias": (7,)})
    self.assertEqual(shapes_of(rules.to_ours(TOY, theirs, OURS, "x")), OURS)

  def assert_refused(self, culprits, theirs=None, ours=None):
    """All culprits are named, in one line, with the source; nothing else is."""
    theirs, ours = {**THEIRS, **(theirs or {})}, {**OURS, **(ours or {})}
    theirs, ours = ({k: v for k, v in x.items() if v is not None} for x in (theirs, ours))
    with self.assertRaises(errors.UserError) as caught:
      rules.to_ours(TOY, abstract(theirs), ours, "file.pt")
    self.assertEqual(str(caught.exception), f"file.pt: {'; '.join(culprits)}")

  def test_missing_and_unexpected_tensors_are_all_named(self):
    self.assert_refused(
        ["stem.bias missing", "layers.2.table missing", "extra not expected", "layers.5.table not expected"],
        {"stem.bias": None, "layers.2.table": None, "extra": (1,), "layers.5.table": (1, 2, 7)})

  def test_a_long_list_is_cut(self):
    with self.assertRaises(errors.UserError) as caught:
      rules.to_ours(TOY, {}, OURS, "f")
    missing = [f"{name} missing" for name in THEIRS][:8]
    self.assertEqual(str(caught.exception), f"f: {'; '.join(missing)} and {len(THEIRS) - 8} more")

  def test_wrong_shapes_are_all_named(self):
    self.assert_refused(
        ["stem.weight: (24, 8) for stem/kernel, expected (24, 7)", "stem.bias: (9,) for stem/bias, expected (7,)"],
        {"stem.weight": (8, 4, 1, 2, 3), "stem.bias": (9,)})

  def test_one_layer_of_another_shape_is_named(self):
    self.assert_refused(["layers.3.linear.weight: (3, 8), expected (3, 7)"], {"layers.3.linear.weight": (3, 8)})

  def test_a_tensor_of_another_form_is_named(self):
    self.assert_refused(["stem.weight: (7, 4, 2, 2, 3) is not of the form 'o c 1 h w'"],
                        {"stem.weight": (7, 4, 2, 2, 3)})
    self.assert_refused(["layers.0.table: (2, 7) is not of the form '1 n c'"],
                        {f"layers.{i}.table": (2, 7) for i in range(LAYERS)})

  def test_a_parameter_without_a_rule_is_named(self):
    self.assert_refused(["stem/scale without a rule"], ours={"stem/scale": (7,)})

  def test_an_export_names_what_is_missing_and_left_over(self):
    ours = abstract({**OURS, "more": (1,)})
    del ours["stem/bias"]
    with self.assertRaisesRegex(errors.UserError, "^here: stem/bias missing; more not expected$"):
      rules.to_theirs(TOY, ours, "here")


TOTALS = {"wan_1_3b": 1_418_996_800, "wan_14b": 14_288_491_584}
PRESETS = ("test", "wan_1_3b", "wan_14b")


@functools.cache
def exported(preset, name):
  """Shapes of ours and theirs."""
  config = transformer.PRESETS[preset]
  ours = store.shapes_of(transformer.WanTransformer(config))
  return ours, shapes_of(rules.to_theirs(transformer_rules.FORMATS[name].table(config), abstract(ours), "x"))


@parameterized.product(preset=PRESETS, name=("wan", "diffusers"))
class TransformerTablesTest(parameterized.TestCase):

  def test_every_parameter_and_tensor_is_used_once(self, preset, name):
    ours, theirs = exported(preset, name)
    form = transformer_rules.FORMATS[name]
    table = form.table(transformer.PRESETS[preset])
    self.assertEqual(shapes_of(rules.to_ours(table, abstract(theirs), ours, "x")), ours)
    self.assertLen(theirs, len({path for path in ours if not path.startswith("blocks")})
                   + table.layers * len({path for path in ours if path.startswith("blocks")}))
    total = sum(map(math.prod, theirs.values()))
    self.assertEqual(total, TOTALS.get(preset, sum(map(math.prod, ours.values()))))
    self.assertIn(form.signature, theirs)

  def test_the_config_comes_back_from_shapes_and_description(self, preset, name):
    config, form = transformer.PRESETS[preset], transformer_rules.FORMATS[name]
    _, theirs = exported(preset, name)
    self.assertEqual(form.config(theirs, form.description(config)), config)
    if preset in TOTALS:
      self.assertEqual(form.config(theirs, {}), config)


class TransformerConfigTest(parameterized.TestCase):

  def test_descriptions_are_the_published_ones(self):
    config = transformer.PRESETS["wan_1_3b"]
    self.assertEqual(transformer_rules.FORMATS["wan"].description(config), {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
        "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
        "text_len": 512})
    self.assertEqual(transformer_rules.FORMATS["diffusers"].description(config), {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "added_kv_proj_dim": None,
        "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256,
        "image_dim": None, "in_channels": 16, "num_attention_heads": 12, "num_layers": 30, "out_channels": 16,
        "patch_size": (1, 2, 2), "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "text_dim": 4096})

  def assert_refused(self, message, name="wan", preset="wan_1_3b", change=None, **config_json):
    shapes = {k: v for k, v in {**exported(preset, name)[1], **(change or {})}.items() if v}
    with self.assertRaisesRegex(errors.UserError, message):
      form = transformer_rules.FORMATS[name]
      config = form.config(shapes, config_json)
      rules.to_ours(form.table(config), abstract(shapes), store.shapes_of(transformer.WanTransformer(config)), "x")

  def test_no_two_signatures_meet(self):
    for name, form in transformer_rules.FORMATS.items():
      for other in transformer_rules.FORMATS.keys() - {name}:
        self.assertNotIn(form.signature, exported("test", other)[1])

  def test_heads_that_cannot_be_inferred_are_asked_for(self):
    self.assert_refused("dim 24 does not split into heads of 128.*config.json", preset="test")

  @parameterized.parameters(
      ("wan", dict(dim=1024), "dim is 1024, the weights have 1536"),
      ("wan", dict(num_layers=40), "num_layers is 40, the weights have 30"),
      ("wan", dict(num_heads="many"), "invalid literal for int.*'many'"),
      ("wan", dict(num_heads=0), "config.json does not describe these weights: .*zero"),
      ("wan", dict(num_heads=11), "dim 1536 must split into 11 heads"),
      ("diffusers", dict(patch_size=[2, 2, 2]), r"patch_size is \(2, 2, 2\), the weights have \(1, 2, 2\)"),
      ("diffusers", dict(num_attention_heads=24, attention_head_dim=128),
       "attention_head_dim is 128, the weights have 64"),
  )
  def test_a_config_json_of_another_model_is_refused(self, name, config_json, message):
    self.assert_refused(message, name, **config_json)

  @parameterized.parameters(
      ({"blocks.0.cross_attn.k_img.weight": (1536, 1536)}, "blocks.0.cross_attn.k_img.weight not expected"),
      ({"img_emb.proj.0.weight": (1280,)}, "img_emb.proj.0.weight not expected"),
      ({"vace_blocks.0.before_proj.weight": (1536, 1536)}, "vace_blocks.0.before_proj.weight not expected"),
      ({f"blocks.{i}.norm3.bias": None for i in range(30)}, "blocks.0.norm3.bias missing"),
      ({f"blocks.{i}.self_attn.norm_q.weight": None for i in range(30)}, "blocks.0.self_attn.norm_q.weight missing"),
      ({f"blocks.{i}.self_attn.norm_q.weight": (128,) for i in range(30)},
       r"blocks.0.self_attn.norm_q.weight: \(30, 128\).*expected \(30, 1536\)"),
      ({"patch_embedding.weight": (1536, 16, 2, 2, 2)}, r"\(1536, 16, 2, 2, 2\) is not of the form 'o c 1 h w'"),
      ({"patch_embedding.weight": None}, "patch_embedding.weight is missing, expected a tensor of 5 axes"),
      ({"patch_embedding.weight": (1536, 64)}, r"patch_embedding.weight is \(1536, 64\), expected a tensor of 5 axes"),
  )
  def test_variations_that_the_model_lacks_are_refused(self, change, message):
    self.assert_refused(message, change=change)


if __name__ == "__main__":
  absltest.main()
