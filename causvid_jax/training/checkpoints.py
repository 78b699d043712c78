"""Checkpoints of a run: the whole state and the data iterator, by Orbax; the config and the environment beside them."""

import json
import os
import pathlib
import shutil
from typing import Any

import grain
import jax
from orbax import checkpoint as ocp

from causvid_jax import errors
from causvid_jax.weights import provenance

_RUN_FILES = ("environment.json", "export", "checkpoints", "metrics.jsonl", "tensorboard", "samples")


class Checkpoints:
  """The checkpoints of one workdir. Unfinished ones (a killed save) are ignored and removed."""

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self._manager = ocp.CheckpointManager(
        pathlib.Path(workdir).resolve() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True))

  def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave(iterator.get_state())))

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def restore(self, state: Any, iterator: grain.DatasetIterator) -> tuple[Any, int]:
    """Restores the newest checkpoint into the shapes and shardings of `state`, and the iterator in place."""
    step = self._manager.latest_step()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), iterator=ocp.args.JsonRestore()))
    except (ValueError, KeyError, OSError) as error:
      raise errors.UserError(f"checkpoint {step} in {self._manager.directory} is damaged or of another model:"
                             f" {str(error).splitlines()[0]}") from error
    iterator.set_state(restored["iterator"])
    return restored["state"], step

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.close()


def claim(workdir: pathlib.Path, config_json: str, restart: bool) -> None:
  """Binds a workdir to one config, so that a run never continues what another one began.

  With `restart`, what a run left there is removed first.

  Raises:
    UserError: when the workdir belongs to another config and `restart` is not asked for, or cannot be written.
  """
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists() and not restart and json.loads(path.read_text()) != json.loads(config_json):
      raise errors.UserError(f"{workdir} holds a run with another config: expected the config in {path}, a fresh"
                             " --workdir, or --restart to begin again there")
    if restart:
      for name in _RUN_FILES:
        _remove(workdir / name)
    _write(path, config_json)
    if not (workdir / "environment.json").exists():  # a run that goes on keeps that of its beginning
      _write(workdir / "environment.json", json.dumps(provenance.environment(), indent=2))
  except OSError as error:
    raise errors.UserError(f"cannot write to workdir {workdir}: {error.strerror}") from error


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file that is whole or absent."""
  partial = path.with_suffix(".partial")
  partial.write_text(text + "\n")
  partial.replace(path)


def _remove(path: pathlib.Path) -> None:
  """Removes a file or a folder, if it is there."""
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
