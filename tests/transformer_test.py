"""Tests of the transformer on whole clips: causality, timesteps, text, sizes, remat and sharding names."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.models import transformer

CONFIG = transformer.PRESETS["test"]
BATCH, FRAMES, CHUNK, SIDE = 2, 6, 2, 4
MODEL = transformer.WanTransformer(CONFIG)
FORWARD = jax.jit(MODEL.apply, static_argnames="chunk_frames")


def _inputs():
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(BATCH, FRAMES, SIDE, SIDE, CONFIG.in_channels))
  timesteps = rng.uniform(high=1000.0, size=(BATCH, FRAMES))
  text = rng.normal(size=(BATCH, CONFIG.text_tokens, CONFIG.text_dim))
  return tuple(jnp.asarray(x, jnp.float32) for x in (latents, timesteps, text))


@functools.cache
def _boxed():
  return jax.jit(MODEL.init)(jax.random.key(1), *_inputs())["params"]


@functools.cache
def _params():
  """Random values everywhere: the head is zero, and the embeddings almost are, at initialisation."""
  rng = np.random.default_rng(0)
  random = lambda x: jnp.asarray(rng.normal(scale=0.25, size=x.shape), jnp.float32)
  return jax.tree.map(random, nn.unbox(_boxed()))


class TransformerTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = {"params": _params()}

  def test_is_zero_at_initialisation(self):
    flow = FORWARD({"params": nn.unbox(_boxed())}, *_inputs())
    np.testing.assert_array_equal(flow, jnp.zeros((BATCH, FRAMES, SIDE, SIDE, CONFIG.out_channels)))

  def test_layers_start_different(self):
    kernel = nn.unbox(_boxed())["blocks"]["cross_attn"]["k"]["kernel"]
    self.assertGreater(float(jnp.abs(kernel[0] - kernel[1]).max()), 0.1)

  def test_bidirectional_is_one_chunk_and_differs_from_causal(self):
    inputs = _inputs()
    both, causal = FORWARD(self.params, *inputs), FORWARD(self.params, *inputs, chunk_frames=CHUNK)
    self.assertGreater(float(jnp.abs(both - causal).max()), 1e-2)
    np.testing.assert_allclose(both, FORWARD(self.params, *inputs, chunk_frames=FRAMES), atol=1e-6)

  @parameterized.parameters(1, 2)
  def test_no_frame_sees_a_later_chunk(self, chunk):
    latents, timesteps, text = _inputs()
    before = FORWARD(self.params, latents, timesteps, text, chunk_frames=chunk)
    for frame in range(FRAMES):
      after = FORWARD(self.params, latents.at[:, frame].add(1.0), timesteps.at[:, frame].add(100.0), text,
                      chunk_frames=chunk)
      start = frame // chunk * chunk
      np.testing.assert_array_equal(after[:, :start], before[:, :start])
      changed = jnp.abs(after - before).max(axis=(0, 2, 3, 4))
      self.assertGreater(float(changed[start:].min()), 1e-5, msg=f"of frame {frame}: {changed}")

  def test_bidirectional_sees_every_frame(self):
    latents, timesteps, text = _inputs()
    change = jnp.abs(FORWARD(self.params, latents.at[:, -1].add(1.0), timesteps, text)
                     - FORWARD(self.params, latents, timesteps, text))
    self.assertGreater(float(change.max(axis=(0, 2, 3, 4)).min()), 1e-5)

  def test_timesteps_modulate_each_frame(self):
    latents, timesteps, text = _inputs()
    change = jnp.abs(FORWARD(self.params, latents, timesteps.at[:, 3].set(10.0), text, chunk_frames=1)
                     - FORWARD(self.params, latents, timesteps, text, chunk_frames=1)).max(axis=(0, 2, 3, 4))
    np.testing.assert_array_equal(change[:3], 0.0)
    self.assertGreater(float(change[3]), 10 * float(change[4:].max()))

  def test_padding_of_the_text_is_attended(self):
    latents, timesteps, text = _inputs()
    text = text.at[:, -2:].set(0.0)
    padded = FORWARD(self.params, latents, timesteps, text)
    cut = FORWARD(self.params, latents, timesteps, text[:, :-2])
    self.assertGreater(float(jnp.abs(padded - cut).max()), 1e-4)

  def test_samples_of_a_batch_are_independent(self):
    inputs = _inputs()
    other = [x.at[0].set(0.0) for x in inputs]
    np.testing.assert_array_equal(FORWARD(self.params, *inputs, chunk_frames=CHUNK)[1],
                                  FORWARD(self.params, *other, chunk_frames=CHUNK)[1])

  def test_remat_changes_neither_value_nor_gradient(self):
    def loss(remat):
      model = transformer.WanTransformer(dataclasses.replace(CONFIG, remat=remat))
      objective = lambda params: jnp.mean(model.apply(params, *_inputs()) ** 2)
      return jax.jit(jax.value_and_grad(objective))(self.params)

    expected = loss("none")
    gradient = expected[1]["params"]["blocks"]["self_attn"]["q"]["kernel"]
    self.assertGreater(float(jnp.abs(gradient).max()), 1e-5)
    for remat in ("full", "dots"):
      chex.assert_trees_all_close(loss(remat), expected, rtol=1e-4, atol=1e-6)

  def test_bfloat16_computes_near_float32_and_keeps_float32_params(self):
    model = transformer.WanTransformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    flow = jax.jit(functools.partial(model.apply, chunk_frames=CHUNK))(self.params, *_inputs())
    expected = FORWARD(self.params, *_inputs(), chunk_frames=CHUNK)
    self.assertEqual(flow.dtype, jnp.float32)
    self.assertLess(float(jnp.abs(flow - expected).mean() / jnp.abs(expected).mean()), 0.05)
    params = jax.eval_shape(model.init, jax.random.key(0), *_inputs())
    self.assertTrue(all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)))

  @parameterized.parameters(("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584))
  def test_full_sizes_have_the_published_parameter_count(self, preset, count):
    config = transformer.PRESETS[preset]
    shapes = jax.eval_shape(
        transformer.WanTransformer(config).init, jax.random.key(0), jnp.zeros((1, 3, 4, 4, 16)),
        jnp.zeros((1, 3)), jnp.zeros((1, config.text_tokens, config.text_dim)))
    self.assertEqual(sum(x.size for x in jax.tree.leaves(shapes)), count)
    self.assertEqual(config.head_dim, 128)

  def test_every_parameter_names_its_logical_axes(self):
    known = {"embed", "heads", "mlp", "layers", "text_embed", None}
    boxes = jax.tree.leaves_with_path(_boxed(), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for path, box in boxes:
      self.assertIsInstance(box, nn.LogicallyPartitioned, msg=path)
      self.assertLen(box.names, box.value.ndim, msg=path)
      self.assertContainsSubset(box.names, known, msg=path)
      self.assertEqual(box.names[0] == "layers", path[0].key == "blocks", msg=path)
      named = [name for name in box.names if name]
      self.assertLen(set(named), len(named), msg=path)
      if path[-1].key == "kernel":
        self.assertNotEmpty(named, msg=path)

  @parameterized.parameters(0, 4, 5, 12)
  def test_chunk_that_does_not_divide_the_clip(self, chunk):
    with self.assertRaisesRegex(errors.UserError, f"{chunk} does not divide the clip's 6 latent frames"):
      MODEL.apply(self.params, *_inputs(), chunk_frames=chunk)

  def test_other_bad_sizes(self):
    latents, timesteps, text = _inputs()
    with self.assertRaisesRegex(errors.UserError, "3x4 is no multiple of the transformer's patch of 2x2"):
      MODEL.apply(self.params, latents[:, :, :3], timesteps, text)
    with self.assertRaisesRegex(errors.UserError, "remat is 'some', expected one of none, full, dots"):
      dataclasses.replace(CONFIG, remat="some")
    with self.assertRaisesRegex(errors.UserError, "dim 24 must split into 5 heads"):
      dataclasses.replace(CONFIG, num_heads=5)


if __name__ == "__main__":
  absltest.main()
