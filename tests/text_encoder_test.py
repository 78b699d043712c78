"""The UMT5 encoder against an independent numpy encoder, its padding, size and training loss."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import text_encoder
from causvid_jax.objectives import text

CONFIG = text_encoder.PRESETS["test"]
LENGTHS = (9, 4, 0)
# UMT5's buckets (32, up to distance 128): {distance backwards: bucket}; the edges lie at 8 * 2 ** (j / 2).
UMT5_BUCKETS = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12,
                46: 13, 63: 13, 64: 14, 90: 14, 91: 15, 127: 15, 128: 15, 500: 15}


def make_inputs():
  ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (len(LENGTHS), 9)).astype(np.int32)
  return ids, (np.arange(9) < np.array(LENGTHS)[:, None]).astype(np.int32)


@functools.cache
def make_params():
  """Every leaf random, norms included, so that a forgotten parameter shows."""
  boxed = jax.jit(text_encoder.UMT5Encoder(CONFIG).init)(jax.random.key(0), *make_inputs())["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), nn.unbox(boxed))


@functools.partial(jax.jit, static_argnames="dtype")
def encode(params, ids, mask, dtype="float32"):
  config = text_encoder.TextEncoderConfig(**{**vars(CONFIG), "dtype": dtype})
  return text_encoder.UMT5Encoder(config).apply({"params": params}, ids, mask)


context_loss = jax.jit(text.context_loss, static_argnums=3)


def reference_bucket(offset, num_buckets, max_distance):
  """Bucket of a key `offset` after the query, from powers of whole numbers: nothing is rounded."""
  half, distance = num_buckets // 2, abs(offset)
  exact = half // 2
  wide = half - exact
  bucket = distance
  if distance >= exact:  # edge j: exact * (max_distance / exact) ** (j / wide), to the power `wide`
    crossed = [j for j in range(wide) if distance ** wide * exact ** j >= exact ** wide * max_distance ** j]
    bucket = exact + max(crossed)
  return bucket + (half if offset > 0 else 0)


def reference_encoder(params, ids, length):
  """The encoder for the tokens of one prompt, one head and one query at a time, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  sizes = CONFIG.num_buckets, CONFIG.max_distance

  def norm(x, scale):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + CONFIG.eps) * scale

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

  x = params["token_embed"]["embedding"][ids[:length]]
  for layer in range(CONFIG.num_layers):
    p = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # pylint: disable=cell-var-from-loop
    y = norm(x, p["norm1"]["scale"])
    q, k, v = (y @ p["attn"][name]["kernel"] for name in "qkv")
    mixed = np.zeros_like(q)
    for head in range(CONFIG.num_heads):
      columns = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
      for t in range(length):
        bias = [p["attn"]["relative_bias"][reference_bucket(s - t, *sizes), head] for s in range(length)]
        weights = np.exp(k[:, columns] @ q[t, columns] + bias)
        mixed[t, columns] = weights / weights.sum() @ v[:, columns]
    x = x + mixed @ p["attn"]["o"]["kernel"]
    y = norm(x, p["norm2"]["scale"])
    x = x + gelu(y @ p["ffn"]["wi_0"]["kernel"]) * (y @ p["ffn"]["wi_1"]["kernel"]) @ p["ffn"]["wo"]["kernel"]
  return norm(x, params["norm"]["scale"])


class UMT5EncoderTest(parameterized.TestCase):

  @parameterized.named_parameters(("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 5e-2))
  def test_agrees_with_numpy(self, dtype, tolerance):
    ids, mask = make_inputs()
    out = encode(make_params(), ids, mask, dtype=dtype)
    chex.assert_shape(out, (3, 9, CONFIG.dim))
    self.assertEqual(out.dtype, jnp.dtype(dtype))
    for row, length in enumerate(LENGTHS[:2]):
      expected = reference_encoder(make_params(), ids[row], length)
      error = np.linalg.norm(out[row, :length] - expected) / np.linalg.norm(expected)
      self.assertLess(error, tolerance)

  def test_padding_changes_nothing_and_comes_out_as_zeros(self):
    ids, mask = make_inputs()
    out = encode(make_params(), ids, mask)
    other = encode(make_params(), np.where(mask, ids, (ids + 3) % CONFIG.vocab_size), mask)
    np.testing.assert_array_equal(out, other)
    np.testing.assert_array_equal(out[mask == 0], 0.0)
    self.assertGreater(np.abs(out[mask == 1]).max(axis=-1).min(), 0.1)

  def test_every_token_inside_reaches_every_position(self):
    ids, mask = make_inputs()
    out = encode(make_params(), ids, mask)
    changed = ids.copy()
    changed[0, 8] = (ids[0, 8] + 1) % CONFIG.vocab_size
    moved = np.abs(encode(make_params(), changed, mask) - out).max(axis=-1)
    self.assertGreater(moved[0].min(), 1e-4)
    np.testing.assert_array_equal(moved[1:], 0.0)

  def test_umt5_buckets_by_hand(self):
    buckets = text_encoder.relative_buckets(501, 32, 128)
    for distance, bucket in UMT5_BUCKETS.items():
      self.assertEqual(buckets[500, 500 - distance], bucket)
      self.assertEqual(buckets[0, distance], bucket + 16 if distance else 0)

  @parameterized.parameters((32, 128), (8, 6), (32, 512), (20, 100))
  def test_buckets_agree_with_whole_number_arithmetic(self, num_buckets, max_distance):
    buckets = text_encoder.relative_buckets(300, num_buckets, max_distance)
    expected = {o: reference_bucket(o, num_buckets, max_distance) for o in range(-299, 300)}
    self.assertEqual([expected[o] for o in range(300)], buckets[0].tolist())
    self.assertEqual([expected[-o] for o in range(300)], buckets[:, 0].tolist())
    np.testing.assert_array_equal(np.diagonal(buckets, 7), expected[7])

  def test_sizes_and_logical_axes_of_umt5_xxl(self):
    module = text_encoder.UMT5Encoder(text_encoder.PRESETS["umt5_xxl"])
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]
    self.assertEqual(sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(boxed))), 5_680_910_336)
    specs = nn.get_partition_spec(boxed)
    self.assertEqual(tuple(specs["token_embed"]["embedding"]), ("vocab", "embed"))
    self.assertEqual(tuple(specs["blocks"]["attn"]["q"]["kernel"]), ("layers", "embed", "heads"))
    self.assertEqual(tuple(specs["blocks"]["attn"]["relative_bias"]), ("layers", None, "heads"))
    self.assertEqual(tuple(specs["blocks"]["ffn"]["wo"]["kernel"]), ("layers", "mlp", "embed"))

  def test_init_as_in_t5(self):
    config = text_encoder.TextEncoderConfig(vocab_size=64, dim=128, num_heads=4, head_dim=64, ffn_dim=96,
                                            num_layers=2)
    tokens = jnp.ones((1, 2), jnp.int32)
    init = jax.jit(text_encoder.UMT5Encoder(config).init)
    params = nn.unbox(init(jax.random.key(0), tokens, tokens)["params"])
    attn, ffn = params["blocks"]["attn"], params["blocks"]["ffn"]
    expected = {
        "embedding": (params["token_embed"]["embedding"], 1.0),
        "q": (attn["q"]["kernel"], (128 * 64) ** -0.5), "k": (attn["k"]["kernel"], 128 ** -0.5),
        "v": (attn["v"]["kernel"], 128 ** -0.5), "o": (attn["o"]["kernel"], 256 ** -0.5),
        "wi_0": (ffn["wi_0"]["kernel"], 128 ** -0.5), "wo": (ffn["wo"]["kernel"], 96 ** -0.5),
        "relative_bias": (attn["relative_bias"], 128 ** -0.5)}
    for name, (value, std) in expected.items():
      self.assertAlmostEqual(np.std(value) / std, 1.0, delta=0.15, msg=name)
    self.assertFalse(np.array_equal(attn["q"]["kernel"][0], attn["q"]["kernel"][1]))


class ContextLossTest(absltest.TestCase):

  def test_closed_form(self):
    ids = np.array([[2, 0, 1, 1]], np.int32)
    mask = np.array([[1, 1, 1, 0]], np.int32)
    offsets = (-1, 0, 2)
    # Logit 3 for token 2 and 0 for tokens 0 and 1, everywhere. Counted pairs (t, target): offset -1: (1, 2),
    # (2, 0); offset 0: (0, 2), (1, 0), (2, 1); offset 2: (0, 1). So token 2 is the target twice out of six.
    logits = np.zeros((1, 4, 3, 3), np.float32)
    logits[..., 2] = 3.0
    loss, metrics = context_loss(logits, ids, mask, offsets)
    self.assertAlmostEqual(float(loss), math.log(math.exp(3) + 2) - 3 * 2 / 6, places=5)
    self.assertAlmostEqual(float(metrics["accuracy"]), 2 / 6, places=6)
    self.assertEqual(metrics["loss"], loss)

  def test_each_offset_looks_in_its_direction(self):
    ids = np.array([[0, 1, 2, 3]], np.int32)
    offsets = (-1, 2)
    right = np.stack([np.roll(ids[0], 1), np.roll(ids[0], -2)], axis=-1)  # wrapped targets are not counted
    logits = 50.0 * np.eye(4, dtype=np.float32)[right][None]
    loss, metrics = context_loss(logits, ids, np.ones_like(ids), offsets)
    self.assertLess(float(loss), 1e-6)
    self.assertEqual(float(metrics["accuracy"]), 1.0)
    loss, metrics = context_loss(logits[:, :, ::-1], ids, np.ones_like(ids), offsets)
    self.assertAlmostEqual(float(loss), 50.0, places=4)
    self.assertEqual(float(metrics["accuracy"]), 0.0)

  def test_what_lies_past_the_mask_does_not_count(self):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (2, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[4], [6]])
    logits = rng.normal(size=(2, 6, 9, 5)).astype(np.float32)
    loss, _ = context_loss(logits, ids, mask)
    pad_logits = np.where(mask[:, :, None, None], logits, 7.0 * logits + 1)
    pad_ids = np.where(mask, ids, 0)
    self.assertEqual(float(loss), float(context_loss(pad_logits, pad_ids, mask)[0]))
    grad = jax.jit(jax.grad(lambda x: text.context_loss(x, ids, mask)[0]))(logits)
    np.testing.assert_array_equal(grad[0, 4:], 0.0)
    np.testing.assert_array_equal(grad[0, 0, text.OFFSETS.index(-1)], 0.0)
    self.assertGreater(np.abs(grad[0, 0, text.OFFSETS.index(1)]).min(), 0.0)

  def test_head_shares_out_its_logits_by_offset(self):
    head = text_encoder.ContextHead(vocab_size=5, offsets=(-1, 0, 1))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    variables = nn.unbox(jax.jit(head.init)(jax.random.key(0), x))
    kernel, = (leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 2)
    logits = jax.jit(head.apply)(variables, x)
    np.testing.assert_allclose(logits[:, :, 2], x @ kernel[:, 10:], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
