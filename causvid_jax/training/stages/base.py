"""What a stage is to the training loop."""

import abc
from collections.abc import Sequence
import functools
import pathlib
from typing import Any

from flax import linen as nn
import jax
import ml_collections
import numpy as np

from causvid_jax import errors
from causvid_jax.training import state as state_lib
from causvid_jax.weights import store


def preset(presets: dict[str, Any], name: str) -> Any:
  """The sizes that `config.model` names."""
  if name not in presets:
    raise errors.UserError(f"unknown model {name!r}: expected one of {', '.join(presets)}")
  return presets[name]


def initial_params(module: nn.Module, key: jax.Array, pretrained: Any = None) -> Any:
  """Fresh parameters, or `pretrained` ones, boxed with their logical axis names."""
  fresh = store.init(module, key)
  if pretrained is None:
    return fresh
  return jax.tree.map(lambda box, value: box.replace_boxed(value), fresh, pretrained,
                      is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


class Stage(abc.ABC):
  """One stage of the method. Subclasses fill in the parts; `config` is the run's config.

  Attributes:
    frozen: parameters and constants that `step` reads and nothing trains.
  """
  frozen: Any = None

  def __init__(self, config: ml_collections.ConfigDict):
    self.config = config

  @property
  @abc.abstractmethod
  def source(self) -> Sequence[Any]:
    """Random access to the training examples."""

  @abc.abstractmethod
  def transform(self, example: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One example as the arrays of a batch."""

  def pretrained(self) -> Any:
    """Finished weights that `init` starts from, read anew by each call."""
    return None

  @abc.abstractmethod
  def init(self, key: jax.Array, pretrained: Any) -> Any:
    """The state before the first step, pure; its leaves may be boxed with logical axis names."""

  def phase(self, step: int) -> str:
    """Names the program of a step, for stages that alternate; static to `step`."""
    del step
    return "train"

  @abc.abstractmethod
  def step(self, state: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array,
           phase: str) -> tuple[Any, dict[str, jax.Array]]:
    """One training step, pure: the new state and scalar metrics; `skipped` counts non-finite updates in a row."""

  @abc.abstractmethod
  def export(self, state: Any, folder: pathlib.Path) -> None:
    """Writes what the stage leaves to later ones."""

  def preview(self, state: Any) -> dict[str, np.ndarray]:
    """Sample clips for the eye, by caption: uint8 [F, H, W, 3]."""
    del state
    return {}

  @functools.cached_property
  def optimizer(self):
    return state_lib.create_optimizer(self.config.optimizer, self.config.num_steps)
