"""The text encoder against transformers' UMT5EncoderModel, and its rules for both formats."""

import copy
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import UMT5Config
from transformers import UMT5EncoderModel

from causvid_jax import errors
from causvid_jax.models import text_encoder
from causvid_jax.weights import rules
from causvid_jax.weights import tensors
from causvid_jax.weights import text_encoder_rules
import parity
import tiny

WAN, DIFFUSERS = text_encoder_rules.FORMATS["wan"], text_encoder_rules.FORMATS["diffusers"]
TOLERANCE = 1e-5
LENGTH, LENGTHS = 301, (301, 150, 17, 1)  # beyond 128 all share a bucket
# Odd sizes; heads * d_kv is not d_model. The second has buckets, distance and eps of its own.
SIZES = {
    "umt5_buckets": dict(vocab_size=37, d_model=20, d_kv=6, d_ff=28, num_layers=5, num_heads=3),
    "own_buckets": dict(vocab_size=37, d_model=20, d_kv=10, d_ff=28, num_layers=2, num_heads=3,
                        relative_attention_num_buckets=20, relative_attention_max_distance=100,
                        layer_norm_epsilon=1e-3),
}


@functools.cache
def make_theirs(size):
  module = parity.randomize(UMT5EncoderModel(UMT5Config(**SIZES[size], dropout_rate=0.0)), 0)
  with torch.no_grad():  # as in every T5, a small q stands in for the missing 1/sqrt(D)
    for block in module.encoder.block:
      block.layer[0].SelfAttention.q.weight.mul_(module.config.d_kv ** -0.5)
  return module


@functools.cache
def make_ours(size):
  theirs = make_theirs(size)
  return parity.to_ours(DIFFUSERS, text_encoder.UMT5Encoder, theirs.state_dict(), theirs.config.to_dict())


@functools.cache
def make_inputs():
  ids = np.random.default_rng(1).integers(0, 37, (len(LENGTHS), LENGTH))
  mask = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
  return ids, mask


def run_theirs(module):
  ids, mask = (torch.from_numpy(x) for x in make_inputs())
  with torch.no_grad():
    return module(ids, mask.long()).last_hidden_state.double().numpy()


def run_ours(module, params, dtype="float32"):
  module = text_encoder.UMT5Encoder(text_encoder.TextEncoderConfig(**{**vars(module.config), "dtype": dtype}))
  ids, mask = make_inputs()
  return jax.jit(module.apply)({"params": params}, ids.astype(np.int32), mask.astype(np.int32))


class ParityTest(parameterized.TestCase):

  @parameterized.parameters(*SIZES)
  def test_float32(self, size):
    _, mask = make_inputs()
    # Their own rounding in float32 is larger than ours: float64 tells the two apart.
    ours, theirs = run_ours(*make_ours(size)), run_theirs(copy.deepcopy(make_theirs(size)).double())
    error = parity.error(ours[mask], theirs[mask])
    their_error = parity.error(run_theirs(make_theirs(size))[mask], theirs[mask])
    print(f"text encoder {size}, float32: relative error {error:.1e}; transformers' own {their_error:.1e}")
    self.assertLess(error, TOLERANCE)
    np.testing.assert_array_equal(ours[~mask], 0.0)  # as Wan's pipeline sets them

  def test_bfloat16(self):
    _, mask = make_inputs()
    reference = make_theirs("umt5_buckets")
    theirs = run_theirs(reference)
    ours = run_ours(*make_ours("umt5_buckets"), dtype="bfloat16")
    self.assertEqual(ours.dtype, jnp.bfloat16)
    error = parity.error(ours[mask], theirs[mask])
    their_error = parity.error(run_theirs(copy.deepcopy(reference).to(torch.bfloat16))[mask], theirs[mask])
    print(f"text encoder, bfloat16: relative error {error:.1e}; transformers' own {their_error:.1e}")
    self.assertLess(error, 0.15)  # bfloat16 is coarse, this network random and deep for its width
    self.assertLess(error, 1.5 * their_error)

  def test_config(self):
    for size, theirs in SIZES.items():
      c = make_ours(size)[0].config
      ours = dict(vocab_size=c.vocab_size, d_model=c.dim, d_kv=c.head_dim, d_ff=c.ffn_dim, num_layers=c.num_layers,
                  num_heads=c.num_heads, relative_attention_num_buckets=c.num_buckets,
                  relative_attention_max_distance=c.max_distance, layer_norm_epsilon=c.eps)
      self.assertEqual(ours, {k: getattr(make_theirs(size).config, k) for k in ours})
      self.assertLessEqual(theirs.items(), ours.items())


class ExportTest(parameterized.TestCase):

  def test_what_transformers_loads_gives_our_output(self):
    module = text_encoder.UMT5Encoder(text_encoder.TextEncoderConfig(
        vocab_size=37, dim=12, num_heads=5, head_dim=4, ffn_dim=22, num_layers=3, num_buckets=12, max_distance=50))
    params = tiny.randomized(module, 3)
    state = parity.to_theirs(DIFFUSERS, module, params)
    theirs = UMT5EncoderModel(UMT5Config(**DIFFUSERS.description(module.config))).eval()
    missing, unexpected = theirs.load_state_dict(parity.to_torch(state), strict=False)
    self.assertEqual((missing, unexpected), (["encoder.embed_tokens.weight"], []))  # tied to shared.weight
    _, mask = make_inputs()
    self.assertLess(parity.error(run_ours(module, params)[mask], run_theirs(theirs)[mask]), TOLERANCE)

  @parameterized.product(name=("wan", "diffusers"), size=tuple(SIZES))
  def test_there_and_back_is_the_identity(self, name, size):
    module, params = make_ours(size)
    state = parity.to_theirs(text_encoder_rules.FORMATS[name], module, params)
    again, params_again = parity.to_ours(
        text_encoder_rules.FORMATS[name], text_encoder.UMT5Encoder, state, DIFFUSERS.description(module.config))
    self.assertEqual(again.config, module.config)
    jax.tree.map(np.testing.assert_array_equal, params_again, params)

  def test_wan_and_transformers_names_of_the_same_tensors(self):
    module, params = make_ours("umt5_buckets")
    wan, theirs = (parity.to_theirs(form, module, params) for form in (WAN, DIFFUSERS))
    self.assertLen(wan, 5 * 10 + 2)
    pairs = {
        "token_embedding": "shared", "norm": "encoder.final_layer_norm",
        **{f"blocks.4.attn.{x}": f"encoder.block.4.layer.0.SelfAttention.{x}" for x in "qkvo"},
        "blocks.4.pos_embedding.embedding": "encoder.block.4.layer.0.SelfAttention.relative_attention_bias",
        "blocks.4.norm1": "encoder.block.4.layer.0.layer_norm", "blocks.4.norm2": "encoder.block.4.layer.1.layer_norm",
        "blocks.4.ffn.gate.0": "encoder.block.4.layer.1.DenseReluDense.wi_0",  # the one through GELU
        "blocks.4.ffn.fc1": "encoder.block.4.layer.1.DenseReluDense.wi_1",
        "blocks.4.ffn.fc2": "encoder.block.4.layer.1.DenseReluDense.wo",
    }
    original = make_theirs("umt5_buckets").state_dict()
    for name, other in pairs.items():
      np.testing.assert_array_equal(wan[f"{name}.weight"], theirs[f"{other}.weight"], name)
      np.testing.assert_array_equal(original[f"{other}.weight"], theirs[f"{other}.weight"], name)


class FullSizeTest(parameterized.TestCase):

  def test_umt5_xxl_as_published(self):
    config = text_encoder.PRESETS["umt5_xxl"]
    expected = parity.shapes(text_encoder.UMT5Encoder(config))
    ours = {path: tensors.Tensor(shape, np.dtype(np.float32), read=None) for path, shape in expected.items()}
    wan = rules.to_theirs(WAN.table(config), ours, "test")
    published = {  # in models_t5_umt5-xxl-enc-bf16.pth, from the network that Wan's own code builds to read it
        "token_embedding.weight": (256_384, 4096), "blocks.23.attn.q.weight": (4096, 4096),
        "blocks.0.pos_embedding.embedding.weight": (32, 64), "blocks.23.norm2.weight": (4096,),
        "blocks.23.ffn.gate.0.weight": (10_240, 4096), "blocks.23.ffn.fc1.weight": (10_240, 4096),
        "blocks.23.ffn.fc2.weight": (4096, 10_240), "norm.weight": (4096,)}
    self.assertEqual({name: wan[name].shape for name in published}, published)
    self.assertLen(wan, 24 * 10 + 2)
    for form in text_encoder_rules.FORMATS.values():
      theirs = rules.to_theirs(form.table(config), ours, "test")
      self.assertIn(form.signature, theirs)
      self.assertEqual(form.config({name: tensor.shape for name, tensor in theirs.items()}, {}), config)
      self.assertEqual({p: t.shape for p, t in rules.to_ours(form.table(config), theirs, expected, "test").items()},
                       expected)


class ErrorsTest(absltest.TestCase):

  def test_incomplete_encoders_are_refused_by_name(self):
    state = parity.to_theirs(WAN, *make_ours("umt5_buckets"))
    for gone, message in (("token_embedding.weight", "token_embedding.weight missing"),
                          ("blocks.3.attn.q.weight", "blocks.3.attn.q.weight missing"),
                          ("blocks.4.ffn.fc2.weight", "blocks.4.ffn.fc2.weight missing")):
      with self.assertRaisesRegex(errors.UserError, message):
        parity.to_ours(WAN, text_encoder.UMT5Encoder, {k: v for k, v in state.items() if k != gone}, {})

  def test_wan_has_no_place_for_other_constants(self):
    self.assertEqual(WAN.description(make_ours("umt5_buckets")[0].config), {})
    with self.assertRaisesRegex(errors.UserError, "no place for max_distance = 100, eps = 0.001"):
      WAN.description(make_ours("own_buckets")[0].config)


if __name__ == "__main__":
  absltest.main()
