"""Counts of what the server does, as Prometheus text."""

import collections
from collections.abc import Mapping
import os

_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Metrics:
  """Counters by name, refusals by reason, and a histogram of the seconds that chunks took."""

  def __init__(self):
    self._counts = collections.Counter({name: 0 for name in ("sessions", "chunks", "frames", "source_frames_dropped")})
    self._refused = collections.Counter()
    self._buckets = [0] * len(_BUCKETS)
    self._seconds = 0.0

  def count(self, name: str, by: int = 1) -> None:
    self._counts[name] += by

  def refuse(self, reason: str) -> None:
    self._refused[reason] += 1

  def chunk(self, frames: int, seconds: float) -> None:
    """One more chunk, and the seconds that the device took."""
    self.count("chunks")
    self.count("frames", frames)
    self._seconds += seconds
    self._buckets = [n + (seconds <= bound) for n, bound in zip(self._buckets, _BUCKETS)]

  def text(self, gauges: Mapping[str, float]) -> str:
    """Everything, with `gauges` as they stand; names may carry labels."""
    lines = []
    for name, value in {**gauges, "resident_memory_bytes": _resident_bytes()}.items():
      kind = f"# TYPE causvid_{name.partition('{')[0]} gauge"
      lines += [kind] * (kind not in lines) + [f"causvid_{name} {value}"]
    for name, value in self._counts.items():
      lines += [f"# TYPE causvid_{name}_total counter", f"causvid_{name}_total {value}"]
    lines.append("# TYPE causvid_refused_total counter")
    lines += [f'causvid_refused_total{{reason="{reason}"}} {n}' for reason, n in sorted(self._refused.items())]
    lines.append("# TYPE causvid_chunk_seconds histogram")
    lines += [f'causvid_chunk_seconds_bucket{{le="{bound}"}} {n}' for bound, n in zip(_BUCKETS, self._buckets)]
    lines += [f'causvid_chunk_seconds_bucket{{le="+Inf"}} {self._counts["chunks"]}',
              f"causvid_chunk_seconds_sum {self._seconds:.6f}", f"causvid_chunk_seconds_count {self._counts['chunks']}"]
    return "\n".join(lines) + "\n"


def _resident_bytes() -> int:
  try:
    with open("/proc/self/statm", encoding="ascii") as file:
      return int(file.read().split()[1]) * _PAGE
  except OSError:  # no Linux
    return 0
