"""A tiny random world for tests: component folders like those that ship, and configs that use them."""

import importlib
import pathlib
import sys

from absl.testing import absltest
from flax import linen as nn
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import ml_collections
import numpy as np

from causvid_jax import weights
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.weights import store

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT))  # `configs`, for test files that run alone

_NOISE = {"schedule": "flow_matching", "prediction": "flow", "shift": 3.0}
_CACHE = {"chunk_frames": 3, "sink_frames": 3, "window_frames": 3}
_ODE = {"num_steps": 4, "solver": "unipc", "guidance": 3.0}
TEACHER = {"kind": "teacher", **_NOISE, **_ODE}
STUDENT = {"kind": "student", "steps": 2, **_NOISE, **_CACHE}
CAUSAL_TEACHER = {"kind": "causal_teacher", **_NOISE, **_ODE, **_CACHE}


def randomized(module: nn.Module, seed: int):
  """Parameters with no zero layers, so that every input reaches the output; drawn without compiling anything."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name, shape = path[-1].key, leaf.shape
    noise = rng.normal(size=shape)
    if name == "kernel":
      noise /= np.sqrt(np.prod(shape[:-1]) if len(shape) == 5 else shape[-2])
    elif name != "embedding":
      noise = (name == "scale") + 0.1 * noise
    return jnp.asarray(noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(
      draw, nn.unbox(jax.eval_shape(lambda: store.init(module, jax.random.key(0)))))


def compile_fast(test: type[absltest.TestCase], folder: pathlib.Path) -> dict[str, str]:
  """While the tests of a class run, compiles quickly rather than well, and every program once.

  Returns the environment in which other processes do the same.
  """
  settings = {"jax_disable_most_optimizations": True, "jax_compilation_cache_dir": str(folder / "cache"),
              "jax_persistent_cache_min_compile_time_secs": 0}
  test.addClassCleanup(compilation_cache.reset_cache)  # it looks for its folder only once
  for name, value in settings.items():
    test.addClassCleanup(jax.config.update, name, jax.config.values[name])
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  return {name.upper(): str(value) for name, value in settings.items()}


def build(folder: pathlib.Path) -> None:
  """Writes `vae`, `text_encoder` and the pipelines `teacher`, `student` and `causal_teacher` below `folder`."""
  module = vae.WanVAE(vae.PRESETS["test"])
  weights.save(folder / "vae", module, randomized(module, 0))
  encoder = text_encoder.UMT5Encoder(
      text_encoder.TextEncoderConfig(vocab_size=64, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=1))
  weights.save(folder / "text_encoder", encoder, randomized(encoder, 1))
  network = transformer.WanTransformer(transformer.PRESETS["test"])
  params = randomized(network, 2)
  for name, sampler in (("teacher", TEACHER), ("student", STUDENT), ("causal_teacher", CAUSAL_TEACHER)):
    weights.save_pipeline(folder / name, network, params, {
        "vae": "../vae", "text_encoder": "../text_encoder", "tokenizer": "tokenizer", "negative_prompt": "", "fps": 8,
        "clip_frames": 33, "frame_size": [64, 64], "chunk_frames": 3, "independent_chunks": False, "sampler": sampler})


def config(name: str, variant: str = "") -> ml_collections.ConfigDict:
  """The config of configs/`name`.py."""
  return importlib.import_module(f"configs.{name}").get_config(variant)


def shrink(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """Points a stage's config, of any variant, at the tiny world of `build`, for runs of a few steps."""
  config.model = "test"
  config.data_dir = str(folder / "data")
  config.clips, config.validation_clips = 8, 2
  config.batch_size, config.num_steps = 4, 4
  config.log_every, config.checkpoint_every = 2, 2
  config.mesh.fsdp = 1
  # The rates of full size would not move every float32 in a few steps.
  config.ema_decay = 0.5
  config.optimizer.learning_rate = max(config.optimizer.learning_rate, 1e-4)
  for name in ("vae", "text_encoder", "teacher", "init_from"):
    if name in config and (name != "init_from" or config.init_from):
      config[name] = str(folder / ("teacher" if name == "init_from" else name))
  if "clip" in config:
    config.tokenizer, config.latents = "tokenizer", ""
    # Two chunks of 1 + 4 (k - 1) pixel frames if the VAE codes each on its own.
    config.clip.frames = 2 * (4 * config.chunk_frames - 3) if config.clip.independent_chunks else 33
    config.clip.height = config.clip.width = 64
    config.sampler.num_steps = 4
  if "trajectories" in config:
    config.trajectories = str(folder / "trajectories")
    config.generate.update(teacher=str(folder / "teacher"), num_trajectories=4, batch_size=2, num_steps=8)
  return config
