"""Training of the judge's classifier: cross entropy on distorted training glyphs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from causvid_jax.data import digit_world
from causvid_jax.evaluation import classifier


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
