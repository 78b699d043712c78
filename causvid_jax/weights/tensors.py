"""Tensors that are read when they are needed, whole or in part: checkpoints are larger than the memory for copies."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import einops
import jax
import numpy as np

Index = tuple[int | slice, ...]

_PIECE = 64 * 2**20  # bytes that are in memory at a time
_ALIGNMENT = 64  # bytes: JAX on a CPU takes such arrays over, others it copies


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file, or derived from some.

  Attributes:
    shape: its shape.
    dtype: its type; bfloat16 and float8 are ml_dtypes'.
    read: the part that a tuple of integers and slices selects; `()` is all of it.
  """
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def __getitem__(self, position: int) -> "Tensor":
    """The slice at one position of the first axis."""
    return Tensor(self.shape[1:], self.dtype, lambda index: self.read((position, *index)))

  def rearrange(self, pattern: str, **sizes: int) -> "Tensor":
    """The tensor after `einops.rearrange`; reading a part of it reads all of the original."""
    left, right = pattern.split("->")
    if left.split() == right.split():
      return self  # whose parts can be read
    change = lambda x: einops.rearrange(x, pattern, **sizes)
    shape = jax.eval_shape(change, jax.ShapeDtypeStruct(self.shape, np.float32)).shape
    return Tensor(shape, self.dtype, lambda index: change(self.read(()))[index])

  def pieces(self) -> Iterator[np.ndarray]:
    """The tensor in parts along its first axis, of about 64 MB; of stacked layers, some layers each."""
    with np.errstate(all="ignore"):  # a cast may overflow; the result tells
      if not self.shape:
        yield self.read(())
        return
      rows = max(1, _PIECE * self.shape[0] // max(1, self.nbytes))
      for start in range(0, self.shape[0], rows):
        yield self.read((slice(start, start + rows),))

  def in_memory(self) -> np.ndarray:
    """The whole tensor in memory of its own, which took no second copy to fill."""
    buffer = np.empty(self.nbytes + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    array, row = buffer[first:first + self.nbytes].view(self.dtype).reshape(self.shape), 0
    for piece in self.pieces():
      if not self.shape:
        array[...] = piece
      else:
        array[row:row + len(piece)] = piece
        row += len(piece)
    return array

  def astype(self, dtype: Any) -> "Tensor":
    return Tensor(self.shape, np.dtype(dtype), lambda index: self.read(index).astype(dtype))


def of(array: np.ndarray | jax.Array) -> Tensor:
  """An array in memory as a tensor."""
  return Tensor(array.shape, np.dtype(array.dtype), lambda index: np.asarray(array[index]))


def stack(tensors: Sequence[Tensor]) -> Tensor:
  """Tensors of one shape along a new first axis; a part is read from those that it touches.

  Where layers differ in type, as in files of mixed precision, all take the widest: it holds every value exactly.
  """
  dtype = functools.reduce(_promote, [tensor.dtype for tensor in tensors])
  tensors = [tensor if tensor.dtype == dtype else tensor.astype(dtype) for tensor in tensors]

  def read(index: Index) -> np.ndarray:
    first, rest = (index[0], index[1:]) if index else (slice(None), ())
    if not isinstance(first, slice):
      return tensors[first].read(rest)
    return np.stack([tensor.read(rest) for tensor in tensors[first]])

  return Tensor((len(tensors), *tensors[0].shape), dtype, read)


def _promote(a: np.dtype, b: np.dtype) -> np.dtype:
  return a if a == b else np.dtype(np.float64 if np.float64 in (a, b) else np.float32)
