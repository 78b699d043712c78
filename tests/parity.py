"""What the parity tests share: random torch modules, and their parameters through the rules and back."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np
import torch

from causvid_jax.weights import rules
from causvid_jax.weights import store
from causvid_jax.weights import tensors


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws every parameter anew, norms and biases included, so that none can be forgotten or swapped unseen."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if squeezed := [size for size in parameter.shape[1:] if size > 1]:
        parameter.copy_(noise / float(np.prod(squeezed)) ** 0.5)
      else:
        parameter.copy_(0.2 * noise + (not name.endswith("bias")))
  return module.eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
  """Shapes of our parameters by path."""
  abstract = nn.unbox(jax.eval_shape(lambda: store.init(module, jax.random.key(0))))
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}


def to_ours(form: rules.Format, cls: type[nn.Module], state: Mapping[str, Any],
            description: Mapping[str, Any]) -> tuple[nn.Module, Any]:
  """Our module and its parameters from a torch state (or one of arrays) and its config.json."""
  theirs = {name: tensors.of(np.asarray(tensor)) for name, tensor in state.items()}
  config = form.config({name: tensor.shape for name, tensor in theirs.items()}, description)
  module = cls(config)
  ours = rules.to_ours(form.table(config), theirs, shapes(module), "test")
  return module, traverse_util.unflatten_dict({path: tensor.read(()) for path, tensor in ours.items()}, sep="/")


def to_theirs(form: rules.Format, module: nn.Module, params: Any) -> dict[str, np.ndarray]:
  """The state of the other tool from our parameters."""
  ours = {path: tensors.of(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
  theirs = rules.to_theirs(form.table(module.config), ours, "test")
  return {name: tensor.read(()) for name, tensor in theirs.items()}


def to_torch(state: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
  return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def error(ours: Any, theirs: Any) -> float:
  """max |ours - theirs| / max |theirs|."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  np.testing.assert_equal(ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
