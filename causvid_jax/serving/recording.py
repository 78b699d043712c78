"""A stream's own MP4 on disk: fragmented, hence playable at any moment, and downloaded while it grows.

The muxer holds a frame back until it knows when the next one comes, so that the file lacks the last one until it ends.
"""

import os
import pathlib

import av
import numpy as np

_BT709, _LIMITED_RANGE = 1, 1


class Recording:
  """H.264 in 4:2:0, a fragment a frame; `write` may be called from any one thread at a time.

  Attributes:
    path: of the file.
    closed: whether it is complete.
  """

  def __init__(self, path: pathlib.Path, fps: int, size: tuple[int, int], max_frames: int):
    """`size` is (height, width)."""
    self.path, self.closed = path, False
    self._left = max_frames
    self._container = av.open(os.fspath(path), "w", format="mp4", container_options={
        "movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"})
    self._stream = self._container.add_stream("libx264", rate=fps, options={
        "crf": "18", "preset": "veryfast", "tune": "zerolatency"})
    self._stream.height, self._stream.width = (n + n % 2 for n in size)
    self._stream.pix_fmt = "yuv420p"
    context = self._stream.codec_context
    context.thread_count = 1
    context.gop_size = 4 * fps
    context.color_range = _LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = _BT709

  def write(self, frames: np.ndarray) -> None:
    """Appends uint8 [F, H, W, 3], as far as there is room."""
    odd = [(0, n % 2) for n in frames.shape[1:3]]
    for frame in np.pad(frames[:self._left], [(0, 0), *odd, (0, 0)], mode="edge"):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
      self._container.mux(self._stream.encode(picture))
    self._left = max(self._left - len(frames), 0)

  def close(self) -> None:
    """Ends the file, which stays."""
    self._container.mux(self._stream.encode(None))
    self._container.close()
    self.closed = True
