"""The judge's eye: a small convolutional network that names a digit and gives features to compare.

It is trained by `classifier_training` on the training glyphs alone, real digits and nothing generated, with the
distortions that a crop from a decoded video may have: shifted, turned, scaled, blurred, dimmed, noisy.
"""

import functools
import os
import pathlib

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

SIZE = 28
FEATURES = 64
ASSET = pathlib.Path(__file__).parents[1] / "assets" / "digit_world" / "judge"

_BATCH = 256  # one compiled shape for any number of crops


class Classifier(nn.Module):
  """Maps crops [B, 28, 28] in [0, 1] to logits [B, 10] and penultimate features [B, 64]."""

  @nn.compact
  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = images[..., None]
    for channels in (16, 32, 64):
      x = nn.relu(nn.Conv(channels, (3, 3))(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    features = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
    return nn.Dense(10)(features), features


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
  """Distorts crops [B, 28, 28] in [0, 1], each on its own, as decoding and an imperfect centre would."""

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    turn, stretch, shift, soften, dim, level, noise = jax.random.split(key, 7)
    angle = jax.random.uniform(turn, minval=-0.2, maxval=0.2)
    scale = jax.random.uniform(stretch, (2, 1), minval=0.88, maxval=1.12)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    grid = jnp.stack(jnp.meshgrid(*2 * [jnp.arange(SIZE) - (SIZE - 1) / 2], indexing="ij")).reshape(2, -1)
    center = (SIZE - 1) / 2 + jax.random.uniform(shift, (2, 1), minval=-2.0, maxval=2.0)
    source = scale * (rotation @ grid) + center
    image = jax.scipy.ndimage.map_coordinates(image, list(source), order=1).reshape(SIZE, SIZE)
    kernel = jnp.array([1.0, 2.0, 1.0]) / 4
    blurred = jax.scipy.signal.convolve2d(image, jnp.outer(kernel, kernel), mode="same")
    image += jax.random.uniform(soften) * (blurred - image)
    image *= jax.random.uniform(dim, minval=0.6, maxval=1.0)
    image += jax.random.uniform(level, maxval=0.08) * jax.random.normal(noise, image.shape)
    return jnp.clip(image, 0.0, 1.0)

  return jax.vmap(one)(jax.random.split(key, len(images)), images)


def save(path: str | os.PathLike, params: dict) -> None:
  """Writes parameters to a safetensors file, float32, "/" between the levels of the tree."""
  flat = traverse_util.flatten_dict(params, sep="/")
  safetensors_numpy.save_file({name: np.asarray(leaf) for name, leaf in flat.items()}, path)


@functools.cache
def load(path: str | os.PathLike = ASSET / "weights.safetensors") -> dict:
  """Reads the parameters that `save` wrote; those that ship by default."""
  return traverse_util.unflatten_dict(safetensors_numpy.load_file(path), sep="/")


@jax.jit
def _apply(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  return Classifier().apply({"params": params}, images)


def classify(images: np.ndarray, params: dict | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Reads any number of crops.

  Args:
    images: float [n, 28, 28] in [0, 1], the mass centred as in MNIST.
    params: of `Classifier`; None: those that ship.

  Returns:
    Logits float32 [n, 10] and features float32 [n, 64].
  """
  params = load() if params is None else params
  padded = np.pad(np.asarray(images, np.float32), ((0, -len(images) % _BATCH), (0, 0), (0, 0)))
  outputs = [_apply(params, batch) for batch in padded.reshape(-1, _BATCH, SIZE, SIZE)]
  logits, features = (np.concatenate([np.zeros((0, n), np.float32), *parts])[:len(images)]
                      for n, parts in zip((10, FEATURES), zip(*outputs) if outputs else ((), ())))
  return logits, features


def features(images: np.ndarray) -> np.ndarray:
  """The penultimate features, float32 [n, 64], of crops [n, 28, 28]."""
  return classify(images)[1]
