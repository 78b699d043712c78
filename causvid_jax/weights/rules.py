"""Rule tables: which tensor of a published checkpoint is which of our parameters, as data, read in both directions.

A table knows nothing of files, and this engine nothing of any layer. Both directions check that every tensor is used
once, that none is left over, and that shapes agree, and name all culprits in one error.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

from causvid_jax import errors
from causvid_jax.weights import tensors as tensors_lib

Tensors = Mapping[str, tensors_lib.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One tensor of theirs, or one a layer, and one parameter of ours.

  Attributes:
    theirs: their name; "{}" stands for the number of the layer where we stack the layers.
    ours: the path of our parameter, "/" between the levels of the tree.
    pattern: from their axes to ours, for `einops.rearrange`; for a stacked parameter, of one layer.
  """
  theirs: str
  ours: str
  pattern: str = "... -> ..."

  @property
  def inverse(self) -> str:
    left, right = self.pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


@dataclasses.dataclass(frozen=True)
class Table:
  """The rules of one component in one format, at one size.

  Attributes:
    rules: one for each of our parameters.
    layers: what "{}" counts to.
    sizes: lengths of axes that a pattern cannot tell from the shapes, by their letters.
    repeated: names under which a checkpoint may hold a tensor for a second time.
  """
  rules: tuple[Rule, ...]
  layers: int = 0
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  repeated: tuple[str, ...] = ()

  def names(self, rule: Rule) -> list[str]:
    """What the checkpoint calls the tensors of a rule."""
    return [rule.theirs.format(layer) for layer in range(self.layers)] if "{}" in rule.theirs else [rule.theirs]

  def size_of(self, pattern: str) -> dict[str, int]:
    """The `sizes` that a pattern mentions; einops refuses others."""
    letters = pattern.replace("(", " ").replace(")", " ").split()
    return {letter: size for letter, size in self.sizes.items() if letter in letters}


@dataclasses.dataclass(frozen=True)
class Format:
  """How other tools write one component.

  Attributes:
    signature: a name that this component has in this format and nothing else has.
    config: our config of the module, from the shapes of the checkpoint's tensors and its config.json ({} if none).
    table: the rules at that config's size.
    description: the config.json that these tools want beside the weights; {} if none.
  """
  signature: str
  config: Callable[[Shapes, Mapping[str, Any]], Any]
  table: Callable[[Any], Table]
  description: Callable[[Any], dict[str, Any]]


def to_ours(table: Table, theirs: Tensors, expected: Shapes, source: str) -> dict[str, tensors_lib.Tensor]:
  """Our parameters, by path, from a checkpoint's tensors.

  Args:
    table: of the checkpoint's format.
    theirs: the checkpoint's tensors by name.
    expected: shapes of all our parameters.
    source: where the tensors come from, for errors.

  Raises:
    UserError: naming every tensor that is missing, left over, or of another shape.
  """
  names = {rule: table.names(rule) for rule in table.rules}
  wanted = [name for rule in table.rules for name in names[rule]]
  problems = _difference("missing", wanted, theirs) + _difference("not expected", theirs, {*wanted, *table.repeated})
  problems += _difference("without a rule", expected, {rule.ours for rule in table.rules})
  ours = {}
  for rule in table.rules:
    parts = [theirs[name] for name in names[rule] if name in theirs]
    if len(parts) < len(names[rule]):
      continue
    for name, part in zip(names[rule], parts):
      if part.shape != parts[0].shape:
        problems.append(f"{name}: {part.shape}, expected {parts[0].shape}")
    try:
      parts = [part.rearrange(rule.pattern, **table.size_of(rule.pattern)) for part in parts]
    except Exception:  # einops raises its own, JAX another
      problems.append(f"{names[rule][0]}: {parts[0].shape} is not of the form {rule.pattern.split('->')[0].strip()!r}")
      continue
    tensor = tensors_lib.stack(parts) if "{}" in rule.theirs else parts[0]
    if tensor.shape != expected.get(rule.ours, tensor.shape):
      problems.append(f"{names[rule][0]}: {tensor.shape} for {rule.ours}, expected {expected[rule.ours]}")
    ours[rule.ours] = tensor
  refuse(problems, source)
  return ours


def to_theirs(table: Table, ours: Tensors, source: str) -> dict[str, tensors_lib.Tensor]:
  """A checkpoint's tensors, by name, from our parameters: the inverse of `to_ours`.

  Raises:
    UserError: naming every parameter that is missing or left over.
  """
  paths = [rule.ours for rule in table.rules]
  refuse(_difference("missing", paths, ours) + _difference("not expected", ours, paths), source)
  theirs = {}
  for rule in table.rules:
    tensor, sizes = ours[rule.ours], table.size_of(rule.pattern)
    if "{}" in rule.theirs:
      theirs |= {name: tensor[layer].rearrange(rule.inverse, **sizes) for layer, name in enumerate(table.names(rule))}
    else:
      theirs[rule.theirs] = tensor.rearrange(rule.inverse, **sizes)
  return theirs


def _difference(what: str, names: Iterable[str], others: Iterable[str]) -> list[str]:
  others = set(others)
  return [f"{name} {what}" for name in names if name not in others]


def refuse(problems: list[str], source: str) -> None:
  """Raises a UserError that names the problems, if there are any."""
  if problems:
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise errors.UserError(f"{source}: {'; '.join(problems[:8])}{more}")
