"""Tests of LoRA merging: every kind of key against the sum made by hand, laziness, and what is refused."""

import collections
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from causvid_jax import errors
from causvid_jax.models import transformer
from causvid_jax.weights import formats
from causvid_jax.weights import lora
from causvid_jax.weights import rules
from causvid_jax.weights import store
from causvid_jax.weights import tensors
from causvid_jax.weights import transformer_rules

CONFIG = transformer.PRESETS["test"]
RANK, SCALE = 3, 0.7


def make_theirs(name, dtype="float32"):
  """A random checkpoint's arrays."""
  rng = np.random.default_rng(0)
  ours = {path: tensors.of(rng.normal(size=shape).astype(dtype))
          for path, shape in store.shapes_of(transformer.WanTransformer(CONFIG)).items()}
  theirs = rules.to_theirs(transformer_rules.FORMATS[name].table(CONFIG), ours, "x")
  return {key: tensor.read(()) for key, tensor in theirs.items()}


def of(arrays):
  return {name: tensors.of(array) for name, array in arrays.items()}


def random(*shape, dtype="float32", seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


DIM, FFN = CONFIG.dim, CONFIG.ffn_dim
UP, DOWN = random(DIM, RANK), random(RANK, DIM, seed=2)
Q = {"wan": "blocks.1.self_attn.q", "diffusers": "blocks.1.attn1.to_q"}


class LoraTest(parameterized.TestCase):

  def check(self, keys, changed, checkpoint="wan", dtype="float32", scale=SCALE):
    """Merging `keys` adds scale * `changed` to those tensors and leaves all others as they were, bit for bit."""
    theirs = make_theirs(checkpoint, dtype)
    merged = lora.merge(of(theirs), of(keys), scale, "lora")
    self.assertEqual(list(merged), list(theirs))
    for name, array in theirs.items():
      value = merged[name].read(())
      self.assertEqual((merged[name].shape, value.shape, value.dtype), (array.shape, array.shape, array.dtype))
      if name in changed:
        expected = array.astype(np.float64) + scale * changed[name]
        np.testing.assert_allclose(value.astype(np.float64), expected, rtol=2.0 ** -8 if dtype != "float32" else 1e-5,
                                   atol=1e-5)
        self.assertGreater(np.abs(value.astype(np.float64) - array.astype(np.float64)).max(), 0.1)
      else:
        self.assertEqual(value.tobytes(), array.tobytes())

  @parameterized.product(
      ends=(("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
            ("lora_down.weight", "lora_up.weight")),
      names=("wan", "diffusers", "kohya"), checkpoint=("wan", "diffusers"))
  def test_every_spelling_in_every_checkpoint(self, ends, names, checkpoint):
    module = "lora_unet_blocks_1_self_attn_q" if names == "kohya" else Q[names]
    keys = {f"{module}.{ends[0]}": DOWN, f"{module}.{ends[1]}": UP}
    self.check(keys, {f"{Q[checkpoint]}.weight": UP @ DOWN}, checkpoint)

  @parameterized.parameters((6.0, ()), (1.5, (1,)))
  def test_alpha_over_rank_scales(self, alpha, shape):
    module = Q["wan"]
    self.check({f"{module}.lora_down.weight": DOWN, f"{module}.lora_up.weight": UP,
                f"{module}.alpha": np.full(shape, alpha, np.float32)},
               {f"{module}.weight": alpha / RANK * UP @ DOWN})

  @parameterized.parameters(((RANK, 4, 1, 2, 2), (DIM, RANK, 1, 1, 1)), ((RANK, 16), (DIM, RANK)))
  def test_the_patch_embedding(self, down_shape, up_shape):
    down, up = random(*down_shape), random(*up_shape, seed=2)
    change = np.einsum("or,ri->oi", up.reshape(DIM, RANK), down.reshape(RANK, 16)).reshape(DIM, 4, 1, 2, 2)
    self.check({"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up},
               {"patch_embedding.weight": change})

  @parameterized.parameters("wan", "diffusers")
  def test_differences_of_weights_biases_norms_and_modulations(self, checkpoint):
    weight, bias, norm = random(FFN, DIM), random(FFN), random(DIM)
    table, head = random(1, 6, DIM), random(1, 2, DIM)
    names = {
        "wan": ("blocks.0.ffn.0", "blocks.1.norm3.weight", "blocks.0.modulation", "head.modulation"),
        "diffusers": ("blocks.0.ffn.net.0.proj", "blocks.1.norm2.weight", "blocks.0.scale_shift_table",
                      "scale_shift_table")}[checkpoint]
    self.check(
        {"blocks.0.ffn.0.diff": weight, "blocks.0.ffn.0.diff_b": bias, "blocks.1.norm3.diff": norm,
         "blocks.0.diff_m": table, "head.diff_m": head[0]},
        {f"{names[0]}.weight": weight, f"{names[0]}.bias": bias, names[1]: norm, names[2]: table, names[3]: head},
        checkpoint)

  def test_product_and_difference_add_up(self):
    module, diff = Q["wan"], random(DIM, DIM)
    self.check({f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP, f"{module}.diff": diff},
               {f"{module}.weight": UP @ DOWN + diff}, scale=-2.0)

  def test_bfloat16_is_summed_in_float32_and_rounded_once(self):
    module = Q["wan"]
    down, up = DOWN.astype(jnp.bfloat16), UP.astype(jnp.bfloat16)
    change = up.astype(np.float64) @ down.astype(np.float64)
    self.check({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, {f"{module}.weight": change},
               dtype=jnp.bfloat16)

  def test_nothing_is_read_before_its_tensor(self):
    reads = collections.Counter()
    def tensor(name, array):
      def read(index):
        reads[name] += 1
        return array[index]
      return tensors.Tensor(array.shape, array.dtype, read)
    theirs = {name: tensor(name, array) for name, array in make_theirs("wan").items()}
    keys = {f"blocks.{i}.self_attn.q.lora_{part}.weight": value
            for i in range(2) for part, value in zip("AB", (DOWN, UP))}
    merged = lora.merge(theirs, {name: tensor(name, array) for name, array in keys.items()}, SCALE, "lora")
    self.assertEmpty(reads)
    merged[f"{Q['wan']}.weight"].read((slice(0, 2),))
    self.assertEqual(
        reads, {f"{Q['wan']}.{part}": 1 for part in ("weight", "lora_A.weight", "lora_B.weight")})

  def assert_refused(self, keys, *culprits):
    with self.assertRaises(errors.UserError) as caught:
      lora.merge(of(make_theirs("wan")), of(keys), 1.0, "lora.safetensors")
    self.assertEqual(str(caught.exception), f"lora.safetensors does not fit this transformer: {'; '.join(culprits)}")

  def test_keys_that_match_nothing_are_all_named(self):
    pair = lambda module: {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP}
    self.assert_refused(
        {**pair(Q["wan"]), **pair("blocks.2.self_attn.q"), "blocks.0.cross_attn.k_img.diff_b": random(DIM),
         f"{Q['wan']}.dora_scale": UP, "step": np.zeros(1), "blocks.0.norm1.diff": random(DIM)},
        *(f"{key} matches nothing" for key in (*pair("blocks.2.self_attn.q"), "blocks.0.cross_attn.k_img.diff_b",
                                               f"{Q['wan']}.dora_scale", "step", "blocks.0.norm1.diff")))

  def test_a_lora_for_another_width_is_refused(self):
    module = Q["wan"]
    self.assert_refused(
        {f"{module}.lora_A.weight": random(RANK, 40), f"{module}.lora_B.weight": random(40, RANK),
         f"{module}.diff_b": random(40), "blocks.0.ffn.0.diff": random(DIM, FFN),
         "blocks.0.ffn.2.lora_A.weight": random(RANK, FFN), "blocks.0.ffn.2.lora_B.weight": random(DIM, RANK + 1)},
        f"(40, 3) times (3, 40) for {module}.weight of (24, 24)",
        f"a difference of shape (40,) for {module}.bias of (24,)",
        "a difference of shape (24, 32) for blocks.0.ffn.0.weight of (32, 24)",
        "(24, 4) times (3, 32) for blocks.0.ffn.2.weight of (24, 32)")

  def test_a_half_and_a_double_are_refused(self):
    module = Q["wan"]
    self.assert_refused({f"{module}.lora_A.weight": DOWN}, f"{module}.weight lacks the LoRA's up")
    self.assert_refused({f"{module}.alpha": np.float32(1)}, f"{module}.weight lacks the LoRA's down and up")
    self.assert_refused(
        {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP, f"{module}.lora_down.weight": DOWN},
        f"{module}.lora_down.weight comes twice")
    self.assert_refused(
        {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP, f"{module}.alpha": UP},
        f"an alpha of shape (24, 3) for {module}.weight")

  @parameterized.parameters("diffusion_model", "transformer", "base_model.model")
  def test_a_file_with_a_prefix_into_our_parameters(self, prefix):
    module = transformer.WanTransformer(CONFIG)
    rng = np.random.default_rng(0)
    ours = {path: tensors.of(rng.normal(size=shape).astype(np.float32))
            for path, shape in store.shapes_of(module).items()}
    component = formats.Component(module, ours, formats.OURS, None, "here")
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "lora.safetensors"
      key = f"{prefix}.{Q['wan']}"
      safetensors_numpy.save_file({f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP}, path)
      merged = formats.merge_lora(component, path, SCALE).tensors
      changed = merged["blocks/self_attn/q/kernel"].read(()) - ours["blocks/self_attn/q/kernel"].read(())
      np.testing.assert_allclose(changed[1], SCALE * (UP @ DOWN).T, atol=1e-5)
      np.testing.assert_array_equal(changed[0], 0)
      for name in ours.keys() - {"blocks/self_attn/q/kernel"}:
        np.testing.assert_array_equal(merged[name].read(()), ours[name].read(()))


if __name__ == "__main__":
  absltest.main()
