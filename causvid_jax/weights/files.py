"""Files of tensors: safetensors, whole or in shards, and PyTorch's pickles, read lazily and written piece by piece."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
import pickle
import re
from typing import Any
import warnings
import zipfile

from absl import logging
import ml_dtypes  # pylint: disable=unused-import  (numpy learns the names of the short types)
import numpy as np
import safetensors

from causvid_jax import errors
from causvid_jax.weights import tensors as tensors_lib

Tensors = Mapping[str, tensors_lib.Tensor]
Progress = Callable[[int], Any]  # called with the bytes that were written since the last call

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")


def open_tensors(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """The tensors of a file by name; of one of several shards or their index, those of all.

  The names of nested dictionaries in PyTorch files are joined by ".". Nothing that such a file holds is run.

  Raises:
    UserError: when a file is missing, damaged, of an unknown kind, or a pickle of more than tensors.
  """
  if path.name.endswith(_INDEX):
    return _open_index(path)
  if match := _SHARD.fullmatch(path.name):
    stem, _, count, suffix = match.groups()
    return _join([path.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)])
  return _open_file(path)


def find(folder: pathlib.Path) -> pathlib.Path:
  """The one file of tensors in a folder, the index of its shards, or the first of them; safetensors before pickles.

  Raises:
    UserError: when there is none or more than one.
  """
  names = sorted(path.name for path in folder.iterdir())
  for suffixes in ((_INDEX,), (".safetensors",), _TORCH_SUFFIXES):
    found = [name for name in names if name.endswith(suffixes)]
    found = list({_SHARD.sub(r"\1-of-\3\4", name): name for name in reversed(found)}.values())
    if len(found) > 1:
      raise errors.UserError(f"{folder} holds {', '.join(sorted(found))}: expected the name of one of them")
    if found:
      return folder / found[0]
  raise errors.UserError(f"no weights in {folder}: expected a .safetensors, .pt or .pth file")


def write_safetensors(path: pathlib.Path, tensors: Tensors, metadata: Mapping[str, str] | None = None,
                      progress: Progress = lambda size: None) -> None:
  """Writes a file of tensors, a piece at a time; warns of those that are not finite, by name.

  Raises:
    UserError: when it cannot be written; then nothing is left under its name.
  """
  # The widest types first, so that every tensor is aligned.
  order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  header, end = {"__metadata__": metadata} if metadata else {}, 0
  for name in order:
    tensor = tensors[name]
    start, end = end, end + tensor.nbytes
    header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  broken = []
  with _replacing(path) as partial, partial.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
      finite = True
      for piece in tensors[name].pieces():
        finite = finite and np.isfinite(piece).all()
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
        progress(piece.nbytes)
      broken += [] if finite else [name]
  if broken:
    logging.warning("NaN or infinite weights: %s", ", ".join(broken))


def write_shards(folder: pathlib.Path, stem: str, tensors: Tensors, progress: Progress = lambda size: None,
                 max_bytes: int = 5 * 10**9) -> None:
  """Writes `stem`.safetensors, or, past `max_bytes`, numbered shards and their index, as PyTorch's tools read them."""
  shards, size = [{}], 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > max_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  names = [f"{stem}.safetensors"]
  if len(shards) > 1:
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
    with _replacing(folder / f"{stem}.safetensors{_INDEX}") as partial:
      partial.write_text(json.dumps(index, indent=2) + "\n")
  for name, shard in zip(names, shards):
    write_safetensors(folder / name, shard, {"format": "pt"}, progress)


def write_torch(path: pathlib.Path, tensors: Tensors, wrap: Callable[[dict[str, Any]], Any] = dict,
                progress: Progress = lambda size: None) -> None:
  """Writes `wrap` of a dictionary of tensors by torch.save, which takes the disk space of another copy meanwhile.

  Raises:
    UserError: when it cannot be written, then nothing is left under its name, or torch is absent.
  """
  torch = _import_torch(path)
  scratch = path.with_name(path.name + ".safetensors")
  try:
    # torch.save wants all tensors at once: those of a mapped file take no memory.
    write_safetensors(scratch, tensors, progress=progress)
    state = {name: _to_torch(torch, tensor.read(())) for name, tensor in _open_file(scratch).items()}
    with _replacing(path) as partial:
      torch.save(wrap({name: state[name] for name in tensors}), partial)
  except RuntimeError as error:  # torch's own on a full disk
    raise errors.UserError(f"cannot write {path}: {_first_line(error)}") from error
  finally:
    with contextlib.suppress(OSError):
      scratch.unlink()


def _open_file(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  if path.suffix in _TORCH_SUFFIXES:
    return _open_torch(path)
  raise errors.UserError(f"{path}: expected a folder, or a file of .safetensors, {', '.join(_TORCH_SUFFIXES)}")


def _open_index(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  try:
    places = json.loads(path.read_text())["weight_map"]
    shards = [path.with_name(name) for name in sorted(set(places.values()))]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(f"{path} is missing or damaged: {error}") from error
  tensors = _join(shards)
  if wrong := sorted(places.keys() ^ tensors.keys()):
    raise errors.UserError(f"{path} and its shards differ in {_list(wrong)}")
  return tensors


def _join(shards: list[pathlib.Path]) -> dict[str, tensors_lib.Tensor]:
  if missing := [path.name for path in shards if not path.is_file()]:
    raise errors.UserError(f"{shards[0].parent} lacks {_list(missing)} of {len(shards)} shards")
  tensors = {}
  for shard in shards:
    more = _open_file(shard)
    if twice := sorted(tensors.keys() & more.keys()):
      raise errors.UserError(f"{shard} repeats tensors of another shard: {_list(twice)}")
    tensors |= more
  return tensors


def _open_safetensors(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  try:
    with safetensors.safe_open(path, "np"):  # checks the header against the file's size
      pass
    with path.open("rb") as file:
      size = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(size))
  except (OSError, safetensors.SafetensorError, ValueError) as error:
    raise errors.UserError(f"{path} is missing or damaged: {error}") from error
  header.pop("__metadata__", None)
  _check_dtypes({name: entry["dtype"] for name, entry in header.items()}, _DTYPES, path)
  return {name: _mapped(path, _DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
          for name, entry in header.items()}


def _mapped(path: pathlib.Path, dtype: str, offset: int, shape: tuple[int, ...]) -> tensors_lib.Tensor:
  """A tensor that maps its part of a file for each read: only touched pages take memory, and no longer than that."""
  # "c", since torch shares no memory with what it may not write to; the file stays as it is.
  return tensors_lib.Tensor(
      shape, np.dtype(dtype), lambda index: np.asarray(np.memmap(path, dtype, "c", offset, shape)[index]))


def _open_torch(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  torch = _import_torch(path)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about the age of pickles
      # Files from before torch 1.6 are no zip archives and cannot be mapped.
      content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except pickle.UnpicklingError as error:
    found = re.search(r"GLOBAL (\S+) ", str(error))
    what = f"it holds {found[1]}, and reading that may run code" if found else "it is damaged, or no file of tensors"
    raise errors.UserError(f"{path} is refused: {what}; expected a file of tensors only") from error
  except Exception as error:  # there is no end to what damaged archives raise
    raise errors.UserError(f"{path} is missing or damaged: {_first_line(error)}") from error
  found = dict(_flatten(torch, content, ()))
  dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()}
  _check_dtypes(dtypes, _NAMES, path)
  return {name: tensors_lib.of(_to_numpy(torch, tensor, dtypes[name])) for name, tensor in found.items()}


def _flatten(torch: Any, content: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  """The tensors in nested dictionaries; steps, settings and the like are passed over."""
  if isinstance(content, torch.Tensor):
    yield ".".join(keys), content.detach()
  elif isinstance(content, Mapping):
    for key, value in content.items():
      yield from _flatten(torch, value, (*keys, str(key)))


def _to_numpy(torch: Any, tensor: Any, dtype: str) -> np.ndarray:
  """numpy's view of a tensor; by way of integers, since torch passes on no short types."""
  integers = getattr(torch, f"int{8 * tensor.element_size()}")
  return tensor.view(integers).numpy().view(dtype)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
  return torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(getattr(torch, array.dtype.name))


def _import_torch(path: pathlib.Path) -> Any:
  try:
    import torch  # pylint: disable=import-outside-toplevel  (an extra)
  except ImportError as error:
    raise errors.UserError(
        f"{path} is a PyTorch file, which needs torch: pip install 'causvid_jax[convert]'") from error
  return torch


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write that takes its final name once it is whole."""
  partial = path.with_name(path.name + ".partial")
  try:
    yield partial
    partial.replace(path)
  except OSError as error:
    raise errors.UserError(f"cannot write {path}: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def _check_dtypes(dtypes: Mapping[str, str], known: Mapping[str, str], path: pathlib.Path) -> None:
  if wrong := [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in known]:
    raise errors.UserError(f"{path} holds tensors of unknown types: {_list(wrong)}; expected {', '.join(known)}")


def _list(names: list[str]) -> str:
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]
