"""A tiny random world for tests: component folders like those that ship, and configs that use them."""

import pathlib

from flax import linen as nn
import jax
import ml_collections

from causvid_jax import weights
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.weights import store


def randomized(module: nn.Module, seed: int):
  """Parameters with no zero layers, so that every input reaches the output."""
  params = nn.unbox(store.init(module, jax.random.key(seed)))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(tree, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def build(folder: pathlib.Path) -> None:
  """Writes `vae`, `text_encoder` and the pipeline `teacher` below `folder`."""
  module = vae.WanVAE(vae.PRESETS["test"])
  weights.save(folder / "vae", module, randomized(module, 0))
  encoder = text_encoder.UMT5Encoder(
      text_encoder.TextEncoderConfig(vocab_size=64, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=1))
  weights.save(folder / "text_encoder", encoder, randomized(encoder, 1))
  network = transformer.WanTransformer(transformer.PRESETS["test"])
  weights.save_pipeline(folder / "teacher", network, randomized(network, 2), {
      "vae": "../vae", "text_encoder": "../text_encoder", "tokenizer": "tokenizer", "negative_prompt": "", "fps": 8,
      "clip_frames": 33, "frame_size": [64, 64], "chunk_frames": 3, "independent_chunks": False,
      "sampler": {"kind": "teacher", "schedule": "flow_matching", "prediction": "flow", "num_steps": 4, "shift": 3.0,
                  "solver": "unipc", "guidance": 3.0}})


def shrink(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """Points a stage's config at the tiny world of `build`, for runs of a few steps."""
  config.model = "test"
  config.data_dir = str(folder / "data")
  config.clips, config.validation_clips = 8, 2
  config.batch_size, config.num_steps = 4, 4
  config.log_every, config.checkpoint_every = 2, 2
  for name in ("vae", "text_encoder", "teacher", "init_from"):
    if name in config and (name != "init_from" or config.init_from):
      config[name] = str(folder / ("teacher" if name == "init_from" else name))
  if "trajectories" in config:
    config.trajectories = str(folder / "trajectories")
    config.generate.update(teacher=str(folder / "teacher"), num_trajectories=4, batch_size=2, num_steps=8)
  return config
