"""Weights on disk: components in our own and others' formats, and the pipelines that they form."""

from causvid_jax.weights.formats import load
from causvid_jax.weights.formats import load_config
from causvid_jax.weights.store import load_pipeline
from causvid_jax.weights.store import save
from causvid_jax.weights.store import save_pipeline

__all__ = ["load", "load_config", "load_pipeline", "save", "save_pipeline"]
