"""The transformer against diffusers' WanTransformer3DModel, both ways through the rules.

The bidirectional teacher, the block-causal student in full and chunk by chunk, and Wan's own names against diffusers'
converter.
"""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
from diffusers import WanTransformer3DModel
from diffusers.loaders import single_file_utils
from diffusers.models.transformers import transformer_wan
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from causvid_jax.models import kv_cache
from causvid_jax.models import transformer
from causvid_jax.weights import store
from causvid_jax.weights import transformer_rules
import parity

WAN, DIFFUSERS = transformer_rules.FORMATS["wan"], transformer_rules.FORMATS["diffusers"]
TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 2e-2  # measured: 0.8e-2

# Odd sizes; 7 pairs of a head for three axes; patches, grid and channels of unequal sides.
BATCH, FRAMES, HEIGHT, WIDTH, TEXT = 2, 6, 6, 12, 7
PROMPTS = (TEXT, 4)
TOKENS = (HEIGHT // 2) * (WIDTH // 3)
SIZES = dict(
    patch_size=(1, 2, 3), num_attention_heads=3, attention_head_dim=14, in_channels=3, out_channels=5, text_dim=11,
    freq_dim=10, ffn_dim=50, num_layers=5, cross_attn_norm=True, eps=1e-5, rope_max_seq_len=32)


class BlockCausal(transformer_wan.WanAttnProcessor):
  """Self-attention with the dense mask of paper eq. 5."""

  def __init__(self, chunk_frames):
    super().__init__()
    chunk = torch.arange(FRAMES * TOKENS) // (TOKENS * chunk_frames)
    self.mask = chunk[None, :] <= chunk[:, None]

  def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
    return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@functools.cache
def make_theirs():
  return parity.randomize(WanTransformer3DModel(**SIZES), 0)


@functools.cache
def make_ours():
  theirs = make_theirs()
  return parity.to_ours(DIFFUSERS, transformer.WanTransformer, theirs.state_dict(), {**theirs.config, "text_len": TEXT})


@functools.cache
def make_inputs():
  """Latents, timesteps of every frame, and text that is zero past the prompt."""
  rng = np.random.default_rng(1)
  latents = rng.normal(size=(BATCH, FRAMES, HEIGHT, WIDTH, SIZES["in_channels"]))
  timesteps = rng.uniform(high=1000.0, size=(BATCH, FRAMES))
  timesteps[0, 0], timesteps[1, -1] = 0.0, 1000.0
  text = rng.normal(size=(BATCH, TEXT, SIZES["text_dim"])) * (np.arange(TEXT) < np.array(PROMPTS)[:, None])[..., None]
  return tuple(x.astype(np.float32) for x in (latents, timesteps, text))


def run_theirs(module, latents, timesteps, text, chunk_frames=None):
  """Timesteps [B], or [B, F], which diffusers takes as one for each token."""
  processor = transformer_wan.WanAttnProcessor() if chunk_frames is None else BlockCausal(chunk_frames)
  for block in module.blocks:
    block.attn1.set_processor(processor)
  if timesteps.ndim == 2:
    timesteps = np.repeat(timesteps, TOKENS, axis=1)
  latents, timesteps, text = (torch.from_numpy(np.array(x)) for x in (np.moveaxis(latents, -1, 1), timesteps, text))
  with torch.no_grad():
    return np.moveaxis(module(latents, timesteps, text).sample.double().numpy(), 1, -1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="chunk_frames")
def run_ours(module, params, *inputs, chunk_frames=None):
  return module.apply({"params": params}, *inputs, chunk_frames=chunk_frames)


def run_ours_in_chunks(module, params, latents, timesteps, text, chunk_frames):
  """The same, through a cache that holds every frame, two of them as sinks."""
  extend = jax.jit(lambda *args: module.apply({"params": params}, *args, method="extend"))
  text_kv = module.apply({"params": params}, text, method="encode_text")
  cache = kv_cache.create(module.config, BATCH, TOKENS, sink_frames=2, window_frames=FRAMES - 2)
  flows = []
  for start in range(0, FRAMES, chunk_frames):
    chunk = slice(start, start + chunk_frames)
    flow, kv = extend(latents[:, chunk], timesteps[:, chunk], text_kv, cache)
    cache = kv_cache.write(cache, kv)
    flows.append(flow)
  return np.concatenate(flows, axis=1)


class ParityTest(parameterized.TestCase):

  def assert_close(self, ours, theirs, tolerance=TOLERANCE):
    error = parity.error(ours, theirs)
    print(f"{self.id().rpartition('.')[2]}: relative error {error:.1e}")
    self.assertLessEqual(error, tolerance)

  def test_the_config_is_that_of_the_torch_module(self):
    module, _ = make_ours()
    self.assertEqual(module.config, transformer.TransformerConfig(
        dim=42, ffn_dim=50, num_heads=3, num_layers=5, patch=(1, 2, 3), in_channels=3, out_channels=5, freq_dim=10,
        text_dim=11, text_tokens=TEXT, eps=1e-5))

  def test_bidirectional(self):
    latents, timesteps, text = make_inputs()
    clip = timesteps[:, 1]
    self.assert_close(run_ours(*make_ours(), latents, np.repeat(clip[:, None], FRAMES, 1), text),
                      run_theirs(make_theirs(), latents, clip, text))

  @parameterized.parameters(None, 1, 2, 3)
  def test_a_timestep_a_frame(self, chunk_frames):
    self.assert_close(run_ours(*make_ours(), *make_inputs(), chunk_frames=chunk_frames),
                      run_theirs(make_theirs(), *make_inputs(), chunk_frames))

  @parameterized.parameters(1, 2, 3)
  def test_chunk_by_chunk_with_the_cache(self, chunk_frames):
    self.assert_close(run_ours_in_chunks(*make_ours(), *make_inputs(), chunk_frames),
                      run_theirs(make_theirs(), *make_inputs(), chunk_frames))

  @parameterized.parameters(None, 2)
  def test_bfloat16(self, chunk_frames):
    module, params = make_ours()
    half = transformer.WanTransformer(dataclasses.replace(module.config, dtype="bfloat16"))
    ours = run_ours(half, params, *make_inputs(), chunk_frames=chunk_frames)
    theirs = run_theirs(make_theirs(), *make_inputs(), chunk_frames)
    self.assert_close(ours, theirs, BFLOAT16_TOLERANCE)
    self.assertGreater(parity.error(ours, theirs), 1e-4)  # or bfloat16 was not what ran

  def test_the_mask_and_the_timesteps_matter(self):
    latents, timesteps, text = make_inputs()
    causal = run_theirs(make_theirs(), latents, timesteps, text, 2)
    for other in (run_theirs(make_theirs(), latents, timesteps, text),
                  run_theirs(make_theirs(), latents, timesteps, text, 3),
                  run_theirs(make_theirs(), latents, timesteps[:, 1], text, 2)):
      self.assertGreater(parity.error(other, causal), 1e-2)


class ExportTest(absltest.TestCase):

  def test_diffusers_runs_what_we_trained(self):
    module, _ = make_ours()
    rng = np.random.default_rng(2)
    abstract = nn.unbox(jax.eval_shape(lambda: store.init(module, jax.random.key(0))))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(scale=0.2, size=leaf.shape), jnp.float32), abstract)
    theirs = WanTransformer3DModel.from_config(DIFFUSERS.description(module.config))
    theirs.load_state_dict(parity.to_torch(parity.to_theirs(DIFFUSERS, module, params)), strict=True)
    error = parity.error(run_ours(module, params, *make_inputs(), chunk_frames=3),
                         run_theirs(theirs.eval(), *make_inputs(), 3))
    print(f"export: relative error {error:.1e}")
    self.assertLessEqual(error, TOLERANCE)

  def test_wans_layout_is_the_published_one(self):
    wan = parity.to_theirs(WAN, *make_ours())
    shapes = {
        "patch_embedding.weight": (42, 3, 1, 2, 3), "patch_embedding.bias": (42,),
        "text_embedding.0.weight": (42, 11), "text_embedding.2.weight": (42, 42), "text_embedding.2.bias": (42,),
        "time_embedding.0.weight": (42, 10), "time_embedding.2.weight": (42, 42),
        "time_projection.1.weight": (6 * 42, 42), "time_projection.1.bias": (6 * 42,),
        "blocks.0.modulation": (1, 6, 42), "blocks.0.self_attn.q.weight": (42, 42),
        "blocks.0.self_attn.norm_q.weight": (42,), "blocks.4.self_attn.o.bias": (42,),
        "blocks.2.norm3.weight": (42,), "blocks.2.norm3.bias": (42,), "blocks.3.cross_attn.k.weight": (42, 42),
        "blocks.4.cross_attn.norm_k.weight": (42,), "blocks.1.ffn.0.weight": (50, 42),
        "blocks.1.ffn.2.weight": (42, 50), "head.head.weight": (30, 42), "head.head.bias": (30,),
        "head.modulation": (1, 2, 42),
    }
    self.assertEqual({name: wan[name].shape for name in shapes}, shapes)
    self.assertLen(wan, len(make_theirs().state_dict()))

  def test_diffusers_converts_our_wan_export_to_the_same_tensors(self):
    state = make_theirs().state_dict()
    converted = single_file_utils.convert_wan_transformer_to_diffusers(
        parity.to_torch(parity.to_theirs(WAN, *make_ours())))
    self.assertCountEqual(converted, state)
    for name, tensor in state.items():
      np.testing.assert_array_equal(converted[name], tensor, err_msg=name)

  def test_wans_names_and_back_are_the_identity(self):
    module, params = make_ours()
    again, returned = parity.to_ours(
        WAN, transformer.WanTransformer, parity.to_theirs(WAN, module, params), WAN.description(module.config))
    self.assertEqual(again, module)
    jax.tree.map(np.testing.assert_array_equal, returned, params)


if __name__ == "__main__":
  absltest.main()
