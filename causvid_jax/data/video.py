"""Video files (H.264 in MP4, by PyAV) and contact sheets; pixels are uint8 [F, H, W, 3] here."""

from collections.abc import Sequence
import contextlib
import fractions
import os
import pathlib

import av
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from causvid_jax import errors

_BT709 = 1  # the code of its matrix, its primaries and its transfer function alike
_LIMITED_RANGE = 1
_H264_SEI = 6  # a NAL unit type; x264 writes its version and settings there

_MARGIN = 4  # of a contact sheet, in pixels
_PAPER, _INK = (40, 40, 40), (235, 235, 235)


class VideoWriter:
  """Writes an MP4 frame by frame; the file gets its name only once it is complete.

    with VideoWriter("out.mp4", fps=8) as writer:
      for frames in stream:
        writer.write(frames)

  An exception inside the block removes what was written. The same frames give the same bytes: one thread, and
  neither time nor version in the file. H.264 in 4:2:0 (which every browser plays) needs even sizes: an odd
  one gains a copy of its last row or column.
  """

  def __init__(self, path: str | os.PathLike, fps: float, size: tuple[int, int] | None = None):
    """Opens a temporary file beside `path`.

    Args:
      path: of the finished file; one that exists is replaced.
      fps: frames a second.
      size: (height, width) of the video, which other frames are scaled to; None: that of the first frames.

    Raises:
      UserError: the file cannot be written there.
    """
    self._path = pathlib.Path(path)
    self._fps = fractions.Fraction(fps).limit_denominator(1001)
    self._size = size
    self._stream = None
    if self._path.is_dir():
      raise errors.UserError(f"{self._path}: expected the name of a video file, found a folder")
    self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
    try:
      self._temporary.touch()  # FFmpeg opens the file only for the first frame
    except OSError as error:
      raise errors.UserError(f"{self._path}: cannot write a video there: {error.strerror}") from error
    self._container = av.open(os.fspath(self._temporary), "w", format="mp4",
                              container_options={"fflags": "+bitexact", "movflags": "+faststart"})

  def __enter__(self) -> "VideoWriter":
    return self

  def write(self, frames: np.ndarray) -> None:
    """Appends frames, uint8 [F, H, W, 3]."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
      raise ValueError(f"frames: expected uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    odd = [(0, n % 2) for n in frames.shape[1:3]]
    for frame in np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge"):
      if self._stream is None:
        self._open_stream(*(self._size or frame.shape[:2]))
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
          width=self._stream.width, height=self._stream.height, format="yuv420p", dst_colorspace="ITU709",
          interpolation="BICUBIC")
      self._mux(self._stream.encode(picture))

  def __exit__(self, error_type, error, traceback) -> None:
    try:
      if error_type is None:
        if self._stream is None:
          raise errors.UserError(f"{self._path}: expected at least one frame to write")
        self._mux(self._stream.encode(None))
        self._container.close()
        os.replace(self._temporary, self._path)
    finally:
      with contextlib.suppress(av.FFmpegError):  # what led here, a full disk for one, is the error to report
        self._container.close()
      self._temporary.unlink(missing_ok=True)

  def _open_stream(self, height: int, width: int) -> None:
    self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "16"})
    self._stream.width, self._stream.height = width + width % 2, height + height % 2
    self._stream.pix_fmt = "yuv420p"
    context = self._stream.codec_context
    context.thread_count = 1
    context.color_range = _LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    self._strip = av.BitStreamFilterContext(f"filter_units=remove_types={_H264_SEI}", self._stream)

  def _mux(self, packets: Sequence[av.Packet]) -> None:
    for packet in packets:
      for stripped in self._strip.filter(packet):
        stripped.stream = self._stream
        self._container.mux(stripped)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
  """Writes frames uint8 [F, H, W, 3] to an MP4; raises UserError if it cannot be written there."""
  with VideoWriter(path, fps) as writer:
    writer.write(frames)


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
  """Reads a whole video file, of any format that FFmpeg knows.

  Returns:
    Frames uint8 [F, H, W, 3] and frames a second.

  Raises:
    UserError: the file is missing or is no video.
  """
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise errors.UserError(f"{os.fspath(path)}: expected a video, found no video stream in it")
      frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
      fps = container.streams.video[0].average_rate
  except av.FFmpegError as error:
    raise errors.UserError(f"{os.fspath(path)}: expected a readable video, got: {error.strerror}") from error
  return np.stack(frames), float(fps)


def contact_sheet(videos: Sequence[np.ndarray], labels: Sequence[str], columns: int,
                  scale: int = 2) -> np.ndarray:
  """Lays videos out in a grid, row by row, each with its prompt underneath.

  Args:
    videos: each uint8 [F, H, W, 3]; shorter ones hold their last frame, smaller ones leave black.
    labels: one for each video, wrapped to the cell.
    columns: videos in a row.
    scale: every pixel becomes scale x scale pixels; the text is not scaled.

  Returns:
    uint8 [F, H', W', 3], as long as the longest video.
  """
  length, height, width = (max(video.shape[axis] for video in videos) for axis in range(3))
  height, width = scale * height, scale * width
  font = ImageFont.load_default(11)
  texts = ["\n".join(_wrap(label, width, font)) for label in labels]
  measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
  below = max(int(np.ceil(measure.multiline_textbbox((0, 0), text, font)[3])) for text in texts) + 2 * _MARGIN
  row_height, column_width = height + below, width + _MARGIN
  page = Image.new("RGB", (columns * column_width - _MARGIN, -(-len(videos) // columns) * row_height), _PAPER)
  draw = ImageDraw.Draw(page)
  corners = [(row_height * (i // columns), column_width * (i % columns)) for i in range(len(videos))]
  for (top, left), text in zip(corners, texts, strict=True):
    draw.rectangle((left, top, left + width - 1, top + height - 1), "black")
    draw.multiline_text((left, top + height + _MARGIN), text, _INK, font)
  sheet = np.repeat(np.asarray(page)[None], length, axis=0)
  for (top, left), video in zip(corners, videos):
    frames = video[np.minimum(np.arange(length), len(video) - 1)].repeat(scale, axis=1).repeat(scale, axis=2)
    sheet[:, top:top + frames.shape[1], left:left + frames.shape[2]] = frames
  return sheet


def _wrap(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
  """Breaks a text between words into lines of at most `width` pixels; a longer word has its own line."""
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if not lines[-1] or font.getlength(longer) <= width:
      lines[-1] = longer
    else:
      lines.append(word)
  return lines
