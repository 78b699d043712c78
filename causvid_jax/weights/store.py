"""Our own format for finished weights.

A component folder holds `config.json` (the kind and the frozen config of a module) and `weights.safetensors` (its
parameters, "/" between the levels of the tree). A pipeline folder holds `pipeline.json`: where its components are,
relative to itself, and how its transformer samples. Names of what ships, such as "digit_world" or "digit_world/vae",
stand for their folders. Everything is written beside its place and renamed, so a folder is whole or absent.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from causvid_jax import errors
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae
from causvid_jax.weights import files
from causvid_jax.weights import tensors as tensors_lib

ASSETS = pathlib.Path(__file__).parent.parent / "assets"

_WEIGHTS = "weights.safetensors"

KINDS = {
    "transformer": (transformer.WanTransformer, transformer.TransformerConfig),
    "vae": (vae.WanVAE, vae.VAEConfig),
    "text_encoder": (text_encoder.UMT5Encoder, text_encoder.TextEncoderConfig),
}


def resolve(path: str | os.PathLike, base: pathlib.Path | None = None) -> pathlib.Path:
  """Returns the folder or file that `path` names: as it stands, below `base`, or among what ships."""
  candidates = [pathlib.Path(path), *([base / path] if base else []), ASSETS / path]
  for candidate in candidates:
    if candidate.is_dir():
      return candidate.resolve()
    if candidate.exists():
      return candidate.parent.resolve() / candidate.name  # a link may lead to a file whose name says nothing
  raise errors.UserError(
      f"no weights at {str(path)!r}: expected a folder, or a name of what ships, such as 'digit_world'")


def holds_component(folder: pathlib.Path) -> bool:
  """Whether a folder is a component of ours, even if damaged; others' have a config.json, too."""
  config = folder / "config.json"
  return (folder / _WEIGHTS).exists() or (config.exists() and "kind" in read_json(config))


def open_component(folder: pathlib.Path) -> tuple[nn.Module, dict[str, tensors_lib.Tensor]]:
  """A component's module and its parameters by path, as they are on disk.

  Raises:
    UserError: when the folder is incomplete or does not fit its config.
  """
  module = load_config(folder)
  tensors = files.open_tensors(folder / _WEIGHTS)
  shapes = shapes_of(module)
  if wrong := [n for n in sorted(shapes.keys() | tensors.keys())
               if n not in tensors or shapes.get(n) != tensors[n].shape]:
    raise errors.UserError(f"{folder} does not fit its config.json: {', '.join(wrong[:5])}"
                           f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
  return module, tensors


def load_config(folder: pathlib.Path) -> nn.Module:
  """The module that a component's config.json describes."""
  description = read_json(folder / "config.json")
  try:
    cls, config_cls = KINDS[description["kind"]]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    return cls(config_cls(**values))
  except (KeyError, TypeError) as error:
    raise errors.UserError(f"{folder / 'config.json'} is not a component of this version: {error}") from error


def write_component(folder: pathlib.Path, module: nn.Module, tensors: files.Tensors,
                    progress: files.Progress = lambda size: None) -> None:
  """Fills a folder with a component, piece by piece, each tensor in its own type."""
  files.write_safetensors(folder / _WEIGHTS, tensors, progress=progress)
  _write_config(folder, module)


def save(folder: str | os.PathLike, module: nn.Module, params: Any, dtype: str = "float32") -> None:
  """Writes a component folder; `dtype` is the type on disk ("float16" halves it)."""
  flat = {name: np.asarray(leaf, dtype) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
  with replacing(folder) as partial:
    safetensors_numpy.save_file(flat, partial / _WEIGHTS)
    _write_config(partial, module)


def load_pipeline(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns a pipeline's folder and the content of its pipeline.json."""
  folder = resolve(path)
  return folder, read_json(folder / "pipeline.json")


def save_pipeline(folder: str | os.PathLike, module: nn.Module, params: Any, pipeline: dict[str, Any],
                  dtype: str = "float32") -> None:
  """Writes a pipeline folder around a transformer: `pipeline` names the other components and the sampler's settings."""
  with replacing(folder) as partial:
    save(partial / "transformer", module, params, dtype)
    _write_json(partial / "pipeline.json", {"transformer": "transformer", **pipeline})


def kind_of(module: nn.Module) -> str:
  return next(kind for kind, (cls, _) in KINDS.items() if isinstance(module, cls))


@functools.cache
def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
  """The shapes of all parameters, by path."""
  params = nn.unbox(jax.eval_shape(lambda: init(module, jax.random.key(0))))
  return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def init(module: nn.Module, key: jax.Array) -> Any:
  """Fresh (boxed) parameters of any component; only shapes that the parameters do not depend on are assumed."""
  config = module.config
  if isinstance(module, vae.WanVAE):
    size = 2 * config.space_factor
    args = (jnp.zeros((1, 1 + config.time_factor, size, size, 3)),)
  elif isinstance(module, transformer.WanTransformer):
    t, h, w = config.patch
    args = (jnp.zeros((1, t, h, w, config.in_channels)), jnp.zeros((1, t)),
            jnp.zeros((1, config.text_tokens, config.text_dim)))
  else:
    args = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  return module.init(key, *args)["params"]


class replacing:
  """A folder to fill that takes its final name, in place of what was there, once it is whole."""

  def __init__(self, folder: str | os.PathLike):
    self.final = pathlib.Path(folder)
    self.partial = self.final.with_name(self.final.name + ".partial")

  def __enter__(self) -> pathlib.Path:
    shutil.rmtree(self.partial, ignore_errors=True)
    try:
      self.partial.mkdir(parents=True)
    except OSError as error:
      raise errors.UserError(f"cannot write {self.final}: {error.strerror}") from error
    return self.partial

  def __exit__(self, kind, error, _):
    if kind is None:
      shutil.rmtree(self.final, ignore_errors=True)
      self.partial.rename(self.final)
      return
    shutil.rmtree(self.partial, ignore_errors=True)
    if isinstance(error, OSError):
      raise errors.UserError(f"cannot write {self.final}: {error.strerror or error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path} is missing or damaged: {error}") from error


def _write_config(folder: pathlib.Path, module: nn.Module) -> None:
  _write_json(folder / "config.json", {"kind": kind_of(module), "config": dataclasses.asdict(module.config)})


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")
