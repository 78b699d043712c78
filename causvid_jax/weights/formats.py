"""Weights in any format as our parameters, and back; which component a file holds, in which format, its names tell.

A format is a table of rules (`*_rules.py`). What training wrappers add to the names, and which network of a training
checkpoint is meant, is settled here, before any rule is read.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.weights import files
from causvid_jax.weights import lora as lora_lib
from causvid_jax.weights import rules
from causvid_jax.weights import store
from causvid_jax.weights import tensors as tensors_lib
from causvid_jax.weights import text_encoder_rules
from causvid_jax.weights import transformer_rules
from causvid_jax.weights import vae_rules

FORMATS: dict[str, dict[str, rules.Format]] = {
    "transformer": transformer_rules.FORMATS, "vae": vae_rules.FORMATS, "text_encoder": text_encoder_rules.FORMATS}
OURS = "causvid_jax"

# The networks of CausVid's and Self-Forcing's checkpoints, the best first.
GENERATORS = ("generator_ema", "generator")

_WRAPPERS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = re.compile(rf"(({'|'.join(GENERATORS)}|state_dict|base_model|model|diffusion_model|transformer|module)\.)*")


@dataclasses.dataclass(frozen=True)
class Component:
  """A transformer, VAE or text encoder in files.

  Attributes:
    module: the network.
    tensors: its parameters by path, "/" between the levels of the tree.
    format: what it was read from: "causvid_jax", "wan" or "diffusers".
    generator: the network of a training checkpoint that it is; None for other files.
    source: the file or folder, for errors.
  """
  module: nn.Module
  tensors: Mapping[str, tensors_lib.Tensor]
  format: str
  generator: str | None
  source: str

  @property
  def kind(self) -> str:
    return store.kind_of(self.module)

  @property
  def nbytes(self) -> int:
    return sum(tensor.nbytes for tensor in self.tensors.values())

  def astype(self, dtype: str) -> "Component":
    return dataclasses.replace(self, tensors={name: tensor.astype(dtype) for name, tensor in self.tensors.items()})


def open_component(path: pathlib.Path, select: str | None = None) -> Component:
  """Opens one component in any format; its tensors are read when they are needed.

  Args:
    path: a file, one of several shards or their index, or a folder of one component.
    select: which generator of a training checkpoint; default the averaged one if there is one.

  Raises:
    UserError: when the files are missing or damaged, hold nothing that we know, or not all of it.
  """
  if path.is_dir() and store.holds_component(path):
    if select:
      raise _no_generator(path, select)
    return Component(*store.open_component(path), OURS, None, str(path))
  path = files.find(path) if path.is_dir() else path
  found, generator = _select(files.open_tensors(path), select, path)
  theirs = _unwrap(found, path)
  kind, name = _detect(theirs, path)
  if integers := [f"{n} ({t.dtype})" for n, t in theirs.items() if not jnp.issubdtype(t.dtype, jnp.floating)]:
    raise errors.UserError(f"{path} holds {', '.join(integers[:8])}: expected weights of floating point")
  description = path.with_name("config.json")
  try:
    config = FORMATS[kind][name].config({n: tensor.shape for n, tensor in theirs.items()},
                                        store.read_json(description) if description.exists() else {})
  except errors.UserError as error:
    raise errors.UserError(f"{path}: {error}") from error
  module = store.KINDS[kind][0](config)
  ours = rules.to_ours(FORMATS[kind][name].table(config), theirs, store.shapes_of(module), str(path))
  return Component(module, ours, name, generator, str(path))


def export(component: Component, name: str) -> tuple[dict[str, tensors_lib.Tensor], dict[str, Any]]:
  """A component's tensors under another format's names, and the config.json to put beside them ({} for none).

  Raises:
    UserError: when the format cannot express it.
  """
  form, config = FORMATS[component.kind][name], component.module.config
  return rules.to_theirs(form.table(config), component.tensors, component.source), form.description(config)


def merge_lora(component: Component, path: pathlib.Path, scale: float) -> Component:
  """The transformer with a LoRA added, `scale` times.

  Raises:
    UserError: when any of the LoRA's tensors fits nothing in it.
  """
  theirs, _ = export(component, "wan")
  lora = _unwrap(files.open_tensors(files.find(path) if path.is_dir() else path), path)
  merged = lora_lib.merge(theirs, lora, scale, str(path))
  table = FORMATS[component.kind]["wan"].table(component.module.config)
  shapes = {name: tensor.shape for name, tensor in component.tensors.items()}
  return dataclasses.replace(component, tensors=rules.to_ours(table, merged, shapes, str(path)))


def load(path: str | os.PathLike, base: pathlib.Path | None = None, dtype: str | None = "float32",
         shardings: Any | Callable[[Any], Any] | None = None) -> tuple[nn.Module, Any]:
  """Loads a component in any format, which is detected: (module, params), params as nested dictionaries.

  Args:
    path: a file or folder, as it stands or below `base`, or the name of what ships.
    base: a folder.
    dtype: of the parameters; None keeps the type of each.
    shardings: a tree of shardings, or of any part of the parameters' tree that share one, or a function that makes it
      from the abstract parameters (boxed with their logical axis names). Each host then reads only what its devices
      hold.

  Raises:
    UserError: when the files are missing, damaged or not a whole component.
  """
  component = open_component(store.resolve(path, base))
  if callable(shardings):
    shardings = shardings(jax.eval_shape(lambda: store.init(component.module, jax.random.key(0))))
  return component.module, read(component.tensors, dtype, shardings)


def read(tensors: files.Tensors, dtype: str | None = "float32", shardings: Any = None) -> Any:
  """Parameters as nested dictionaries, from files' tensors by path; the arguments are those of `load`."""
  params = traverse_util.unflatten_dict(dict(tensors), sep="/")
  if shardings is None:
    return jax.tree.map(lambda tensor: jnp.asarray((tensor.astype(dtype) if dtype else tensor).in_memory()), params)
  # A copy, in our order: parameters must not change with the file that they were read from.
  part = lambda tensor, index: np.array(tensor.read(index), dtype, order="C")
  return jax.tree.map(
      lambda tensor, sharding: jax.make_array_from_callback(
          tensor.shape, sharding, lambda index: part(tensor, index)),
      params, jax.tree.broadcast(shardings, params))


def load_config(path: str | os.PathLike, base: pathlib.Path | None = None) -> nn.Module:
  """The module of a component in any format, without its weights."""
  path = store.resolve(path, base)
  if path.is_dir() and store.holds_component(path):
    return store.load_config(path)
  return open_component(path).module


def _select(tensors: files.Tensors, select: str | None, path: pathlib.Path) -> tuple[files.Tensors, str | None]:
  """The tensors of one network of a training checkpoint; all of other files."""
  top = {name.partition(".")[0] for name in tensors}
  found = [generator for generator in GENERATORS if generator in top]
  if select and select not in found:
    raise _no_generator(path, select)
  if not found:
    return tensors, None
  chosen = select or found[0]
  return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{chosen}.")}, chosen


def _no_generator(path: pathlib.Path, select: str) -> errors.UserError:
  return errors.UserError(f"{path} holds no {select!r}: expected a training checkpoint of CausVid or Self-Forcing")


def _unwrap(tensors: files.Tensors, path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """The tensors without what training wrappers and other tools put before or into their names."""
  unwrapped = {}
  for name, tensor in tensors.items():
    short = _PREFIXES.sub("", _WRAPPERS.sub("", name), count=1)
    if short in unwrapped:
      raise errors.UserError(f"{path} holds {short} twice, the second time as {name}: expected one network")
    unwrapped[short] = tensor
  return unwrapped


def _detect(theirs: files.Tensors, path: pathlib.Path) -> tuple[str, str]:
  """The kind of component and the format that the names belong to."""
  for kind, forms in FORMATS.items():
    for name, form in forms.items():
      if form.signature in theirs:
        return kind, name
  hint = ", which look like a LoRA's: give it with a transformer" if any("lora" in name for name in theirs) else ""
  raise errors.UserError(
      f"{path} is nothing that we know: it holds {', '.join(list(theirs)[:3]) or 'no tensors'}{hint}; expected"
      " Wan 2.1's transformer or VAE or the UMT5 encoder, in Wan's, diffusers' or our own format")
