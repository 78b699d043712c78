"""Grain pipelines: shuffled, repeated, batched, and resumable from a small state."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

_EPOCHS = 1 << 32  # Endless; grain's own endless repeat is too long for its batches of one example.


def batches(source: Sequence[Any], batch_size: int, seed: int,
            transform: Callable[[Any, np.random.Generator], dict[str, np.ndarray]]) -> grain.DatasetIterator:
  """An endless iterator of batches, a dict of stacked arrays each; `get_state`/`set_state` resume it exactly.

  Args:
    source: random access to examples.
    batch_size: examples a batch; the last partial batch of an epoch runs into the next epoch.
    seed: of the shuffling (anew each epoch) and of `transform`'s generator (a new one for every example).
    transform: example, generator -> dict of arrays.
  """
  shuffled = grain.MapDataset.source(source).seed(seed).shuffle()
  dataset = shuffled.repeat(_EPOCHS).random_map(transform).batch(batch_size)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
