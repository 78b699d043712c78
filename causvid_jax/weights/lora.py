"""Merges LoRA files into the transformer that they were made for, tensor by tensor, as the tensors are read.

The keys that circulate, after the name of a module: `lora_A`/`lora_B` or `lora_down`/`lora_up` with an optional
`alpha` (W' = W + scale * alpha / rank * B A), and whole differences of a weight (`diff`), a bias (`diff_b`) and a
modulation table (`diff_m`). Modules are named as Wan or diffusers names them, or as kohya's tools do, with
`lora_unet_` in front and "_" for ".".
"""

from collections.abc import Mapping
import math
import re

import numpy as np

from causvid_jax.weights import rules
from causvid_jax.weights import tensors as tensors_lib
from causvid_jax.weights import transformer_rules

_KEY = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha|diff|diff_b|diff_m)(?:\.default)?(?:\.weight)?")

# What a key changes of its module, and how.
_ROLES = {
    "lora_A": ("weight", "down"), "lora_down": ("weight", "down"), "lora_B": ("weight", "up"),
    "lora_up": ("weight", "up"), "alpha": ("weight", "alpha"), "diff": ("weight", "diff"),
    "diff_b": ("bias", "diff"), "diff_m": ("modulation", "diff"),
}

Parts = Mapping[str, tensors_lib.Tensor]


def merge(theirs: rules.Tensors, lora: rules.Tensors, scale: float, source: str) -> dict[str, tensors_lib.Tensor]:
  """A transformer's tensors with a LoRA added.

  Args:
    theirs: the transformer's tensors, in Wan's or diffusers' names.
    lora: the LoRA's, in Wan's, diffusers' or kohya's names, without what tools put before them.
    scale: how much of the LoRA to add.
    source: the LoRA's file, for errors.

  Returns:
    All tensors, under the names and in the types of `theirs`; the sums are made in float32 when they are read.

  Raises:
    UserError: naming every key that matches nothing, comes twice or alone, or does not fit its tensor's shape.
  """
  names = _names(theirs)
  changes: dict[str, dict[str, tensors_lib.Tensor]] = {}
  problems = []
  for key, tensor in lora.items():
    match = _KEY.fullmatch(key)
    part, role = _ROLES[match[2]] if match else ("", "")
    name = names.get(f"{match[1]}.{part}") if match else None
    if name is None:
      problems.append(f"{key} matches nothing")
    elif role in changes.setdefault(name, {}):
      problems.append(f"{key} comes twice")
    else:
      changes[name][role] = tensor
  for name, parts in changes.items():
    problems += _misfits(name, theirs[name].shape, parts)
  rules.refuse(problems, f"{source} does not fit this transformer")
  return {name: _changed(tensor, changes[name], scale) if name in changes else tensor
          for name, tensor in theirs.items()}


def _names(theirs: rules.Tensors) -> dict[str, str]:
  """What a LoRA may call the tensors -> their names."""
  tables = [rule for table in transformer_rules.RULES.values() for rule in table]
  paths = {rule.theirs: rule.ours for rule in tables}
  synonyms = {path: [rule.theirs for rule in tables if rule.ours == path] for path in paths.values()}
  names = {}
  for name in theirs:
    template, layer = re.sub(r"^blocks\.\d+", "blocks.{}", name), re.match(r"blocks\.(\d+)|", name)[1]
    for synonym in synonyms.get(paths.get(template), [name]):
      synonym = synonym.format(layer)
      module, _, part = synonym.rpartition(".")
      names[synonym] = names[f"lora_unet_{module.replace('.', '_')}.{part}"] = name
  return names


def _misfits(name: str, shape: tuple[int, ...], parts: Parts) -> list[str]:
  """What keeps the parts of a change from being added to a tensor of this shape."""
  problems = []
  if "diff" in parts and _long(parts["diff"].shape) != _long(shape):
    problems.append(f"a difference of shape {parts['diff'].shape} for {name} of {shape}")
  if missing := [role for role in ("down", "up") if role not in parts]:
    if parts.keys() - {"diff"}:
      problems.append(f"{name} lacks the LoRA's {' and '.join(missing)}")
    return problems
  down, up = parts["down"].shape, parts["up"].shape
  if (min(len(up), len(down)) < 2
      or (up[:1], math.prod(up[1:]), math.prod(down[1:])) != (shape[:1], down[0], math.prod(shape[1:]))):
    problems.append(f"{up} times {down} for {name} of {shape}")
  if "alpha" in parts and math.prod(parts["alpha"].shape) != 1:
    problems.append(f"an alpha of shape {parts['alpha'].shape} for {name}")
  return problems


def _long(shape: tuple[int, ...]) -> list[int]:
  """The axes that are longer than 1."""
  return [size for size in shape if size > 1]


def _changed(tensor: tensors_lib.Tensor, parts: Parts, scale: float) -> tensors_lib.Tensor:
  """The tensor plus its change, computed when it is read."""
  def read(index: tensors_lib.Index) -> np.ndarray:
    value = tensor.read(()).astype(np.float32)
    part = {role: part.read(()).astype(np.float32) for role, part in parts.items()}
    if "down" in part:
      rank = len(part["down"])
      weight = scale * (float(part["alpha"].reshape(())) / rank if "alpha" in part else 1.0)
      product = part["up"].reshape(-1, rank) @ part["down"].reshape(rank, -1)
      value += np.float32(weight) * product.reshape(value.shape)
    if "diff" in part:
      value += np.float32(scale) * part["diff"].reshape(value.shape)
    return value.astype(tensor.dtype)[index]

  return tensors_lib.Tensor(tensor.shape, tensor.dtype, read)
