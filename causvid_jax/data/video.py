"""Video files and images in and out, and contact sheets; pixels are uint8 [F, H, W, 3] here."""

import abc
from collections.abc import Iterator, Sequence
import fractions
import os
import pathlib
import re
from typing import BinaryIO
import warnings

import av
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import ImageOps

from causvid_jax import errors

_BT709 = 1  # the code of its matrix, its primaries and its transfer function alike
_LIMITED_RANGE = 1
_H264_SEI = 6  # a NAL unit type; x264 writes its version and settings there

_MAX_PIXELS = 2 ** 26  # of a frame or an image to read: larger than any camera's, smaller than a decompression bomb
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows others that start foreign programs

_MARGIN = 4  # of a contact sheet, in pixels
_PAPER, _INK = (40, 40, 40), (235, 235, 235)


class Writer(abc.ABC):
  """A video file, or a series of images, that takes frames as they are made; see `open_writer`.

    with open_writer("out.mp4", fps=8) as writer:
      for frames in stream:
        writer.write(frames)

  A file that had the name before stays until the first frames are safe under it. What interrupts the block leaves
  the video up to there, or nothing if there was no frame. The same frames give the same bytes.

  Attributes:
    path: of the file.
    frames: how many were written.
  """

  def __init__(self, path: str | os.PathLike, fps: float):
    self.path, self.frames, self._size = pathlib.Path(path), 0, None
    self._fps = fractions.Fraction(fps).limit_denominator(1001)
    self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
    try:
      self._temporary.touch()
    except OSError as error:
      raise self._refuse(error) from error

  def __enter__(self) -> "Writer":
    return self

  def write(self, frames: np.ndarray) -> None:
    """Appends frames, uint8 [F, H, W, 3], all of one size.

    Raises:
      UserError: they are something else, or cannot be written.
    """
    _check_frames(frames)
    self._size = self._size or frames.shape[1:3]
    if frames.shape[1:3] != self._size:
      raise errors.UserError(f"{self.path}: frames of {frames.shape[1:3]} after frames of {self._size} (height, width)")
    try:
      for frame in frames:
        self._append(frame)
        self.frames += 1
    except (OSError, av.FFmpegError) as error:
      raise self._refuse(error) from error

  def __exit__(self, error_type, error, traceback) -> None:
    try:
      if self.frames:
        self._finish()
      elif error_type is None:
        raise errors.UserError(f"{self.path}: expected at least one frame to write")
    except (OSError, av.FFmpegError) as failure:
      if error_type is None:  # else what led here, a full disk for one, is the error to report
        raise self._refuse(failure) from failure
    finally:
      self._temporary.unlink(missing_ok=True)

  @abc.abstractmethod
  def _append(self, frame: np.ndarray) -> None:
    """Takes a frame [H, W, 3]."""

  @abc.abstractmethod
  def _finish(self) -> None:
    """Completes the file, which has at least one frame, under its name."""

  def _refuse(self, error: Exception) -> errors.UserError:
    return errors.UserError(f"{self.path}: cannot write a video there: {error.strerror}")


class _Mp4Writer(Writer):
  """H.264, playable at every moment: fragments of about a second, which begin with a keyframe, go to disk as they fill.

  The finished file is rewritten in place as an ordinary MP4, which any player can seek in. One thread, and neither time
  nor version in the file. 4:2:0 (which every browser plays) needs even sizes: an odd one gains a copy of its last row
  or column.
  """

  def __init__(self, path: str | os.PathLike, fps: float):
    super().__init__(path, fps)
    self._stream, self._whole = None, 0
    self._container = av.open(
        os.fspath(self._temporary), "w", format="mp4", container_options={
            "fflags": "+bitexact+flush_packets",
            "movflags": "+frag_keyframe+empty_moov+default_base_moof+hybrid_fragmented"})

  def _append(self, frame: np.ndarray) -> None:
    frame = np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
    if self._stream is None:
      self._open_stream(*frame.shape[:2])
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", interpolation="BICUBIC")
    self._mux(self._stream.encode(picture))

  def _finish(self) -> None:
    try:
      self._mux(self._stream.encode(None))
      self._container.close()
    except (OSError, av.FFmpegError):
      if self._whole:
        os.truncate(self.path, self._whole)  # half a fragment's header would make all of them unreadable
      raise
    self._publish()

  def _open_stream(self, height: int, width: int) -> None:
    # Without look-ahead every frame that was written is encoded, and on disk by the next keyframe.
    self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "16", "tune": "zerolatency"})
    self._stream.width, self._stream.height = width, height
    self._stream.pix_fmt = "yuv420p"
    context = self._stream.codec_context
    context.thread_count, context.gop_size = 1, max(round(self._fps), 1)
    context.color_range = _LIMITED_RANGE
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    self._strip = av.BitStreamFilterContext(f"filter_units=remove_types={_H264_SEI}", self._stream)

  def _mux(self, packets: Sequence[av.Packet]) -> None:
    for packet in packets:
      for stripped in self._strip.filter(packet):
        stripped.stream = self._stream
        ends_fragment = stripped.is_keyframe and stripped.pts > 0
        self._container.mux(stripped)
        if ends_fragment:
          self._publish()
          self._whole = self.path.stat().st_size

  def _publish(self) -> None:
    if self._temporary.exists():
      os.replace(self._temporary, self.path)  # the file stays open


class _AnimationWriter(Writer):
  """GIF or WebP, held in memory and written at the end."""

  def __init__(self, path: str | os.PathLike, fps: float):
    super().__init__(path, fps)
    self._images: list[Image.Image] = []

  def _append(self, frame: np.ndarray) -> None:
    self._images.append(Image.fromarray(frame))

  def _finish(self) -> None:
    is_gif = self.path.suffix.lower() == ".gif"
    unit = 10 if is_gif else 1  # of durations, in milliseconds; what is lost to rounding goes to the frames that follow
    ends = np.round(np.arange(self.frames + 1) * 1000 / (float(self._fps) * unit)).astype(int) * unit
    self._images[0].save(
        self._temporary, "GIF" if is_gif else "WEBP", save_all=True, append_images=self._images[1:],
        duration=np.diff(ends).tolist(), loop=0, **({} if is_gif else {"quality": 90}))
    os.replace(self._temporary, self.path)


class _PngWriter(Writer):
  """A file a frame: `path` with the frame's number where it has a pattern such as %06d, or else before the extension."""

  def __init__(self, path: str | os.PathLike, fps: float):
    super().__init__(path, fps)
    name = self.path.name if "%" in self.path.name else f"{self.path.stem}_%06d.png"
    if not re.fullmatch(r"[^%]*%(0\d+)?d[^%]*", name):
      self._temporary.unlink()
      raise errors.UserError(f"{self.path}: expected one number such as %06d in the name")
    self._name = name

  def _append(self, frame: np.ndarray) -> None:
    Image.fromarray(frame).save(self._temporary, "PNG")
    os.replace(self._temporary, self.path.with_name(self._name % self.frames))

  def _finish(self) -> None:
    """Every frame is complete."""


_WRITERS = {".mp4": _Mp4Writer, ".gif": _AnimationWriter, ".webp": _AnimationWriter, ".png": _PngWriter}
ENDLESS_SUFFIXES = (".mp4", ".png")  # written as the frames come, in constant memory


def open_writer(path: str | os.PathLike, fps: float) -> Writer:
  """The writer for a file name's extension.

  Args:
    path: .mp4 (H.264), .gif, .webp, or .png: a file a frame, numbered where the name has a pattern such as %06d, or
      else before the extension.
    fps: frames a second.

  Raises:
    UserError: the extension is another, or the file cannot be written there.
  """
  if pathlib.Path(path).is_dir():
    raise errors.UserError(f"{path}: expected the name of a video file, found a folder")
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in _WRITERS:
    raise errors.UserError(f"{path}: expected a name that ends in {', '.join(_WRITERS)}")
  return _WRITERS[suffix](path, fps)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
  """Writes frames uint8 [F, H, W, 3] with `open_writer`."""
  with open_writer(path, fps) as writer:
    writer.write(frames)


def read_frames(path: str | os.PathLike, fps: float | None = None) -> Iterator[np.ndarray]:
  """Reads a video file of any format that FFmpeg knows, upright, in constant memory.

  Args:
    path: of the file, which is opened at once.
    fps: frames a second to yield, each the last that the video shows by then; None: every frame of the video.

  Returns:
    An iterator of pieces, uint8 [n, H, W, 3].

  Raises:
    UserError: now, or while it is read: the file is missing, damaged, too large or no video.
  """
  decoded = _decode(_open(path), os.fspath(path))
  frames = _resample(decoded, fps) if fps else (frame for frame, _, _ in decoded)
  return (frame[None] for frame in frames)


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
  """Reads a whole video file, as `read_frames` does.

  Returns:
    Frames uint8 [F, H, W, 3] and frames a second.
  """
  container = _open(path)
  rate = container.streams.video[0].average_rate
  frames = [frame for frame, _, _ in _decode(container, os.fspath(path))]
  if not frames:
    raise errors.UserError(f"{os.fspath(path)}: expected a video, found no frame in it")
  return np.stack(frames), float(rate)


def read_image(file: str | os.PathLike | BinaryIO) -> np.ndarray:
  """Reads an image, upright, on black where it is transparent: uint8 [H, W, 3].

  Raises:
    UserError: the file is missing, damaged, too large or no image.
  """
  name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else "the image"
  try:
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=_IMAGE_FORMATS) as image:
      _check_size(*image.size, name)
      image = ImageOps.exif_transpose(image).convert("RGBA")
  except errors.UserError:
    raise
  except Image.DecompressionBombError as error:
    raise errors.UserError(f"{name}: too many pixels: expected at most {_MAX_PIXELS:,}") from error
  except (OSError, ValueError, SyntaxError, EOFError) as error:
    reason = getattr(error, "strerror", None) or f"none of {', '.join(_IMAGE_FORMATS)}, or damaged"
    raise errors.UserError(f"{name}: expected a readable image, got: {reason}") from error
  return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB"))


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
  """Scales frames uint8 [F, H, W, 3] to cover height x width and cuts what sticks out, evenly on both sides."""
  _check_frames(frames)
  if frames.shape[1:3] == (height, width):
    return frames
  scale = lambda frame: ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BICUBIC)
  return np.stack([np.asarray(scale(frame)) for frame in frames])


def _open(path: str | os.PathLike) -> av.container.InputContainer:
  try:
    container = av.open(os.fspath(path))
  except av.FFmpegError as error:
    raise errors.UserError(f"{os.fspath(path)}: expected a readable video, got: {error.strerror}") from error
  if not container.streams.video:
    raise errors.UserError(f"{os.fspath(path)}: expected a video, found no video stream in it")
  _check_size(container.streams.video[0].width, container.streams.video[0].height, os.fspath(path))
  return container


def _decode(container: av.container.InputContainer, name: str) -> Iterator[tuple[np.ndarray, float, float]]:
  """The frames [H, W, 3], each with the seconds between which it is shown."""
  start, end = None, 0.0
  with container:
    rate = float(container.streams.video[0].guessed_rate or 25)
    try:
      for frame in container.decode(video=0):
        _check_size(frame.width, frame.height, name)
        if start is None:
          start = frame.time or 0.0
        begin = end if frame.time is None else frame.time - start
        end = begin + (float(frame.duration * frame.time_base) if frame.duration else 1 / rate)
        pixels = frame.to_ndarray(format="rgb24")
        yield np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels, begin, end
    except av.FFmpegError as error:
      raise errors.UserError(f"{name}: expected a readable video, got: {error.strerror}") from error


def _resample(decoded: Iterator[tuple[np.ndarray, float, float]], fps: float) -> Iterator[np.ndarray]:
  """Frame n of the output is the one that is shown at n / fps seconds."""
  count, held, end = 0, None, 0.0
  for frame, begin, next_end in decoded:
    while held is not None and count < round(begin * fps, 3):  # rounded: times are sums of fractions of a second
      yield held
      count += 1
    held, end = frame, next_end
  while held is not None and count < max(round(end * fps, 3), 1):
    yield held
    count += 1


def _check_frames(frames: np.ndarray) -> None:
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
    raise errors.UserError(f"frames: expected uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")


def _check_size(width: int, height: int, name: str) -> None:
  if width * height > _MAX_PIXELS:
    raise errors.UserError(f"{name}: {width}x{height} are too many pixels: expected at most {_MAX_PIXELS:,}")


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
