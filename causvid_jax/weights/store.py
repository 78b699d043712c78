"""Our own format for finished weights.

A component folder holds `config.json` (the kind and the frozen config of a module) and `weights.safetensors` (its
parameters, "/" between the levels of the tree). A pipeline folder holds `pipeline.json`: where its components are,
relative to itself, and how its transformer samples. Names of what ships, such as "digit_world" or "digit_world/vae",
stand for their folders. Everything is written beside its place and renamed, so a folder is whole or absent.
"""

import dataclasses
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
from safetensors import SafetensorError

from causvid_jax import errors
from causvid_jax.models import text_encoder
from causvid_jax.models import transformer
from causvid_jax.models import vae

ASSETS = pathlib.Path(__file__).parent.parent / "assets"

_KINDS = {
    "transformer": (transformer.WanTransformer, transformer.TransformerConfig),
    "vae": (vae.WanVAE, vae.VAEConfig),
    "text_encoder": (text_encoder.UMT5Encoder, text_encoder.TextEncoderConfig),
}


def resolve(path: str | os.PathLike, base: pathlib.Path | None = None) -> pathlib.Path:
  """Returns the folder that `path` names: as it stands, below `base`, or among what ships."""
  candidates = [pathlib.Path(path), *([base / path] if base else []), ASSETS / path]
  for candidate in candidates:
    if candidate.exists():
      return candidate.resolve()
  raise errors.UserError(f"no weights at {str(path)!r}: expected a folder, or a name of what ships, such as 'digit_world'")


def load(path: str | os.PathLike, base: pathlib.Path | None = None) -> tuple[nn.Module, Any]:
  """Loads a component: (module, params), params as nested dictionaries of float32 arrays.

  Raises:
    UserError: when the folder is missing, incomplete or does not fit its config.
  """
  folder = resolve(path, base)
  module, expected = _abstract(folder)
  try:
    flat = safetensors_numpy.load_file(folder / "weights.safetensors")
  except (OSError, SafetensorError) as error:
    raise errors.UserError(f"{folder / 'weights.safetensors'} is missing or damaged: {error}") from error
  shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(expected, sep="/").items()}
  if wrong := [n for n in sorted(shapes.keys() | flat.keys()) if n not in flat or shapes.get(n) != flat[n].shape]:
    raise errors.UserError(f"{folder} does not fit its config.json: {', '.join(wrong[:5])}"
                           f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
  return module, traverse_util.unflatten_dict({name: jnp.asarray(flat[name], jnp.float32) for name in flat}, sep="/")


def load_config(path: str | os.PathLike, base: pathlib.Path | None = None) -> nn.Module:
  """The module of a component folder, without its weights."""
  return _abstract(resolve(path, base))[0]


def save(folder: str | os.PathLike, module: nn.Module, params: Any, dtype: str = "float32") -> None:
  """Writes a component folder; `dtype` is the type on disk ("float16" halves it)."""
  kind = next(kind for kind, (cls, _) in _KINDS.items() if isinstance(module, cls))
  flat = {name: np.asarray(leaf, dtype) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
  with _replacing(folder) as partial:
    safetensors_numpy.save_file(flat, partial / "weights.safetensors")
    _write_json(partial / "config.json", {"kind": kind, "config": dataclasses.asdict(module.config)})


def load_pipeline(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns a pipeline's folder and the content of its pipeline.json."""
  folder = resolve(path)
  return folder, _read_json(folder / "pipeline.json")


def save_pipeline(folder: str | os.PathLike, module: nn.Module, params: Any, pipeline: dict[str, Any],
                  dtype: str = "float32") -> None:
  """Writes a pipeline folder around a transformer: `pipeline` names the other components and the sampler's settings."""
  with _replacing(folder) as partial:
    save(partial / "transformer", module, params, dtype)
    _write_json(partial / "pipeline.json", {"transformer": "transformer", **pipeline})


def _abstract(folder: pathlib.Path) -> tuple[nn.Module, Any]:
  """The module that config.json describes, and its parameters as shapes."""
  description = _read_json(folder / "config.json")
  try:
    cls, config_cls = _KINDS[description["kind"]]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    module = cls(config_cls(**values))
  except (KeyError, TypeError) as error:
    raise errors.UserError(f"{folder / 'config.json'} is not a component of this version: {error}") from error
  return module, nn.unbox(jax.eval_shape(lambda: init(module, jax.random.key(0))))


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


class _replacing:
  """A folder to fill that takes its final name, in place of what was there, once it is whole."""

  def __init__(self, folder: str | os.PathLike):
    self.final = pathlib.Path(folder)
    self.partial = self.final.with_name(self.final.name + ".partial")

  def __enter__(self) -> pathlib.Path:
    shutil.rmtree(self.partial, ignore_errors=True)
    self.partial.mkdir(parents=True)
    return self.partial

  def __exit__(self, kind, *_):
    if kind is None:
      shutil.rmtree(self.final, ignore_errors=True)
      self.partial.rename(self.final)
    else:
      shutil.rmtree(self.partial, ignore_errors=True)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path} is missing or damaged: {error}") from error


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")
