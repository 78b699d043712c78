"""CausVid in JAX and Flax: distils a slow bidirectional video diffusion model into a fast causal one, and streams it."""

import importlib


def __getattr__(name: str):
  """`causvid_jax.Pipeline` and `causvid_jax.weights`, imported when first used: entry points need not wait for them."""
  if name == "Pipeline":
    return importlib.import_module("causvid_jax.pipeline").Pipeline
  if name == "weights":
    return importlib.import_module("causvid_jax.weights")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
