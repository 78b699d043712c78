"""Latent and trajectory records: what the objectives after the VAE are trained on, in ArrayRecord.

A folder holds one ArrayRecord file and `metadata.json` (schema version, kind, the shape and type of every array, how
the records were made), written last: a folder without it is unfinished. A record is a safetensors blob of arrays:

  latent      latents [F, H, W, C], sigmas [] (0: clean), text [T, D], caption [bytes]
  trajectory  latents [S, F, H, W, C], sigmas [S], text [T, D], caption [bytes]: states of the teacher's ODE

Every latent carries the noise level it stands at: reading a step list into records made with another one (a bug that
went unnoticed in earlier projects) is refused by `require_sigmas`.
"""

import json
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
import grain
import numpy as np
from safetensors import numpy as safetensors_numpy

from causvid_jax import errors

SCHEMA_VERSION = 1
_DATA = "records.array_record"
_METADATA = "metadata.json"


class RecordWriter:
  """Writes a folder of records; a context manager. `made_by` tells how, and is kept in the metadata."""

  def __init__(self, folder: str | os.PathLike, kind: str, made_by: dict[str, Any]):
    self._folder = pathlib.Path(folder)
    self._metadata = {"schema_version": SCHEMA_VERSION, "kind": kind, "made_by": made_by, "count": 0}
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      (self._folder / _METADATA).unlink(missing_ok=True)
    except OSError as error:
      raise errors.UserError(f"cannot write records to {folder}: {error.strerror}") from error
    self._writer = array_record_module.ArrayRecordWriter(str(self._folder / _DATA), "group_size:1")

  def write(self, latents: np.ndarray, sigmas: np.ndarray, text: np.ndarray, caption: str) -> None:
    arrays = {"latents": np.ascontiguousarray(latents), "sigmas": np.asarray(sigmas, np.float32),
              "text": np.ascontiguousarray(text), "caption": np.frombuffer(caption.encode(), np.uint8)}
    self._metadata["arrays"] = {name: [a.dtype.name, list(a.shape)] for name, a in arrays.items() if name != "caption"}
    self._metadata["count"] += 1
    self._writer.write(safetensors_numpy.save(arrays))

  def __enter__(self) -> "RecordWriter":
    return self

  def __exit__(self, kind, *_):
    self._writer.close()
    if kind is None:
      partial = self._folder / (_METADATA + ".partial")
      partial.write_text(json.dumps(self._metadata, indent=2) + "\n")
      partial.rename(self._folder / _METADATA)


class RecordSource(grain.sources.RandomAccessDataSource):
  """Random access to a folder of records: index -> dict of arrays, `caption` as a str.

  Raises:
    UserError: when the folder is missing, unfinished, of another kind or another schema version.
  """

  def __init__(self, folder: str | os.PathLike, kind: str):
    folder = pathlib.Path(folder)
    try:
      self.metadata = json.loads((folder / _METADATA).read_text())
    except (OSError, ValueError) as error:
      raise errors.UserError(f"no finished {kind} records in {folder}: {_METADATA} is missing or damaged") from error
    found = self.metadata["schema_version"], self.metadata["kind"]
    if found != (SCHEMA_VERSION, kind):
      raise errors.UserError(f"{folder} holds {found[1]} records of schema {found[0]}: expected {kind} records of"
                             f" schema {SCHEMA_VERSION}")
    self._records = grain.sources.ArrayRecordDataSource(str(folder / _DATA))

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    arrays = safetensors_numpy.load(self._records[index])
    return {**arrays, "caption": arrays["caption"].tobytes().decode()}


def finished(folder: str | os.PathLike, made_by: dict[str, Any]) -> bool:
  """Whether `folder` holds finished records that were made in this way."""
  path = pathlib.Path(folder) / _METADATA
  return path.exists() and json.loads(path.read_text())["made_by"] == made_by


def require_sigmas(source: RecordSource, sigmas: np.ndarray) -> None:
  """Refuses trajectory records whose noise levels are not `sigmas` [S] (the student's steps, ending in 0)."""
  stored = source[0]["sigmas"]
  if stored.shape != sigmas.shape or not np.allclose(stored, sigmas, atol=1e-5):
    found, expected = (np.round(np.asarray(s, np.float64), 4).tolist() for s in (stored, sigmas))
    raise errors.UserError(f"the trajectories stand at sigmas {found}, the config's student steps at {expected}:"
                           " generate them again, or use the config they were made with")
