"""Reads a digit-world video without knowing its prompt: colours, their digits and where they head.

A thing is a palette colour with enough ink. It is followed by its centre of mass, its digit is the
classifier's mean opinion over the clip, and its heading is the motion with the bounces unfolded: turning
round at a wall is what the world does, turning round in mid-air is an error and counts against the heading.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np
from scipy import ndimage

from causvid_jax.data import captions
from causvid_jax.data import digit_world
from causvid_jax.evaluation import classifier

WALLS = (10.0, digit_world.SIZE - 10.0)  # where the centre of the ink turns
WALL_TOLERANCE = 4.0  # pixels: a centre this close to a wall may turn

_PALETTE = np.array(list(captions.COLORS.values()), np.float32)
_BRIGHTNESS = np.linalg.norm(_PALETTE, axis=1)
_RAYS = _PALETTE / _BRIGHTNESS[:, None]
_MIN_LEVEL = 64  # of the brightest channel: darker pixels have no reliable hue
_MIN_COSINE = 0.95  # to the nearest palette colour: white and grey are none of them
_MIN_MASS = 15.0  # fully inked pixels; the lightest glyph has 23
_MIN_PRESENCE = 0.25  # of the frames: colours of overlaps come and go
_FLOOR = 0.15  # intensity below which a pixel is noise to the centre of mass
_INK = 0.3  # intensity that the ink's bounding box encloses
_BOX = 20  # the ink's largest extent
_VISIBLE = 0.75  # of the usual mass: frames with less are hidden behind another thing
_SLOPE = 4  # visible frames that tell the motion before and after hiding
_CROP_EVERY = 4  # visible frames
_TURN = 3.0  # pixels back from the furthest point that make a turn, not a tremble
_MIN_SPEED = digit_world.SPEED[0] / 2  # pixels a frame that make a motion
_MIN_PURITY = 0.6  # of the way travelled, net along the heading; a diagonal has 0.5


@dataclasses.dataclass(frozen=True)
class Reading:
  """One thing of a video, as seen.

  Attributes:
    color: name of its palette colour.
    digit: 0 to 9.
    direction: of the first frame's heading; None for a thing that rests or wanders.
    confidence: the probability of `digit` by the classifier's mean logits.
    purity: net unfolded displacement over all the way travelled, in [0, 1]; 1 for motion true to the world.
    centers: centre of the ink (y, x) in pixels, float32 [F, 2]; interpolated where hidden.
    features: of the classifier for every fourth visible frame, float32 [n, 64].
  """

  color: str
  digit: int
  direction: str | None
  confidence: float
  purity: float
  centers: np.ndarray
  features: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Track:
  """A thing before its digit is known; crops are float32 [n, 28, 28]."""

  color: str
  centers: np.ndarray
  crops: np.ndarray


def read(video: np.ndarray) -> list[Reading]:
  """Returns the things in a video uint8 [F, 64, 64, 3] of any length, those with most ink first."""
  return read_all([video])[0]


def read_all(videos: Sequence[np.ndarray]) -> list[list[Reading]]:
  """Reads many videos, with one pass of the classifier over all crops."""
  tracks = [_tracks(video) for video in videos]
  crops = [track.crops for found in tracks for track in found]
  logits, features = classifier.classify(np.concatenate([np.zeros((0, 28, 28)), *crops]))
  ends = np.cumsum([len(crop) for crop in crops])[:-1]
  views = iter(zip(np.split(logits, ends), np.split(features, ends)))
  return [[_reading(track, *next(views)) for track in found] for found in tracks]


def align(video: np.ndarray, caption: str) -> dict[str, float]:
  """Reads a video and compares it with a caption; see `compare`."""
  return compare(read(video), caption)


def compare(readings: Sequence[Reading], caption: str) -> dict[str, float]:
  """Scores what was read against a caption.

  Things are matched by colour, and what remains in order, so that a wrong colour spoils no other score.

  Returns:
    digit and direction: the fraction of the caption's things whose match has the right one. color: the
    Jaccard index of the caption's colours and those read, so that missing and invented things both count.
  """
  things = captions.parse(caption)
  free = list(readings)
  pairs = []
  colors = [reading.color for reading in readings]
  for thing in sorted(things, key=lambda thing: thing.color not in colors):
    match = next((r for r in free if r.color == thing.color), free[0] if free else None)
    if match:
      free.remove(match)
    pairs.append((thing, match))
  right = {name: sum(getattr(match, name, "missing") == getattr(thing, name) for thing, match in pairs)
           for name in ("digit", "color", "direction")}
  return dict(digit=right["digit"] / len(things),
              color=right["color"] / (len(things) + len(readings) - right["color"]),
              direction=right["direction"] / len(things))


def _reading(track: _Track, logits: np.ndarray, features: np.ndarray) -> Reading:
  odds = np.exp(logits.mean(0) - logits.mean(0).max())
  direction, purity = heading(track.centers)
  confidence = float(odds.max() / odds.sum())
  return Reading(track.color, int(odds.argmax()), direction, confidence, purity, track.centers, features)


def _tracks(video: np.ndarray) -> list[_Track]:
  """Finds the colours that are present and follows each, the heaviest first."""
  pixels = video.astype(np.float32)
  size = np.linalg.norm(pixels, axis=-1)
  cosine = pixels @ _RAYS.T / np.maximum(size, 1e-6)[..., None]
  nearest = cosine.argmax(-1)
  ink = (video.max(-1) >= _MIN_LEVEL) & (cosine.max(-1) >= _MIN_COSINE)
  weight = size[..., None] / _BRIGHTNESS * (ink[..., None] & (nearest[..., None] == np.arange(len(_RAYS))))
  present = _present(weight)
  if len(present) > 2:  # edges of two things that overlap blend into a third colour
    plane, _ = np.linalg.qr(_RAYS[present[:2]].T)
    blended = np.linalg.norm(pixels @ plane, axis=-1, keepdims=True) > cosine * size[..., None]
    blended[..., present[:2]] = False
    present = _present(np.where(blended, 0, weight))
  nearest = present[cosine[..., present].argmax(-1)] if len(present) else nearest
  names = list(captions.COLORS)
  intensity = np.clip(pixels @ _RAYS.T / _BRIGHTNESS, 0, 1)
  return [_follow(names[i], intensity[..., i] * (nearest == i)) for i in present]


def _present(weight: np.ndarray) -> np.ndarray:
  """Indices of the colours with enough ink for long enough, the heaviest first, by their ink [F, H, W, 6]."""
  mass = weight.sum((1, 2))
  present = np.flatnonzero((mass >= _MIN_MASS).mean(0) >= _MIN_PRESENCE)
  return present[np.argsort(-mass[:, present].sum(0), kind="stable")]


def _follow(color: str, ink: np.ndarray) -> _Track:
  """Follows one colour's ink, [F, 64, 64] in [0, 1]: where it is visible, and crops of it there."""
  half = classifier.SIZE // 2
  solid = np.where(ink > _FLOOR, ink, 0)
  blob = ndimage.uniform_filter(solid, (0, _BOX, _BOX), mode="constant").reshape(len(ink), -1).argmax(1)
  corners = np.stack(np.divmod(blob, ink.shape[2]), -1)  # of the window, in the padded frame: -14 + 14
  masses, middle = _moments(_windows(solid, corners, half))
  corners = corners + np.rint(middle - half).astype(np.int64)  # MNIST puts the centre of mass at 14, 14
  windows = _windows(solid, corners, half)
  masses, middle = _moments(windows)
  seen = np.flatnonzero(masses >= _VISIBLE * np.quantile(masses, 0.75))
  # The box tells where the walls are, the mass moves smoothly; for a rigid shape they differ by a constant.
  offset = np.median(_box_centers(windows[seen]) - middle[seen], 0)
  centers = _fill((corners - half + middle + offset)[seen], seen, len(ink))
  shown = seen[::_CROP_EVERY]
  return _Track(color, centers.astype(np.float32), _windows(ink[shown], corners[shown], half))


def _fill(centers: np.ndarray, seen: np.ndarray, frames: int) -> np.ndarray:
  """Completes a path seen at frames `seen` [n], n >= 1, to [frames, 2].

  Hidden frames are interpolated; but if the thing comes back as it went, both motions go on to where they
  meet, since a wall may be there and a straight line would turn short of it.
  """
  path = np.stack([np.interp(np.arange(frames), seen, centers[:, axis]) for axis in range(2)], -1)
  for i in np.flatnonzero(np.diff(seen) > 1):
    before, after = max(i - _SLOPE, 0), min(i + 1 + _SLOPE, len(seen) - 1)
    if before == i or after == i + 1:
      continue
    gone = (centers[i] - centers[before]) / (seen[i] - seen[before])
    come = (centers[after] - centers[i + 1]) / (seen[after] - seen[i + 1])
    hidden = np.arange(seen[i] + 1, seen[i + 1])[:, None]
    onward = centers[i] + gone * (hidden - seen[i])
    backward = centers[i + 1] + come * (hidden - seen[i + 1])
    met = np.where(gone > 0, np.minimum(onward, backward), np.maximum(onward, backward))
    turned = (gone * come < 0) & (np.minimum(abs(gone), abs(come)) > _MIN_SPEED)
    path[hidden[:, 0]] = np.where(turned, met, path[hidden[:, 0]])
  return path


def _windows(images: np.ndarray, corners: np.ndarray, pad: int) -> np.ndarray:
  """Cuts [F, 28, 28] at `corners` [F, 2] of the frames after padding by `pad` on each side."""
  padded = np.pad(images, ((0, 0), (2 * pad, 2 * pad), (2 * pad, 2 * pad)))
  index = np.arange(classifier.SIZE) + pad
  rows, columns = corners[:, :1] + index, corners[:, 1:] + index
  return padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _moments(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mass [F] and its centre (y, x) [F, 2], in pixels from the window's corner; the middle of an empty one."""
  grid = np.arange(windows.shape[-1]) + 0.5
  mass = windows.sum((1, 2))
  center = np.stack([windows.sum(2) @ grid, windows.sum(1) @ grid], -1) / np.maximum(mass, 1e-6)[:, None]
  return mass, np.where(mass[:, None] > 0, center, windows.shape[-1] / 2)


def _box_centers(windows: np.ndarray) -> np.ndarray:
  """Centres (y, x) of the ink's bounding box, [F, 2], in pixels from the window's corner."""
  centers = []
  for axis in (2, 1):
    inked = windows.max(axis) > _INK
    centers.append((inked.argmax(1) + inked.shape[1] - inked[:, ::-1].argmax(1)) / 2)
  return np.stack(centers, -1)


def heading(centers: np.ndarray) -> tuple[str | None, float]:
  """Unfolds a path and names its heading.

  The path along each axis is cut at its turns. A turn within `WALL_TOLERANCE` of the wall it ran into
  reflects all that follows; any other turn does not, so that what follows counts against the heading.

  Args:
    centers: of the ink (y, x) in pixels, [F, 2].

  Returns:
    The direction's name and its purity: the net unfolded displacement along the better axis over the way
    travelled along both. The name is None when the net speed is below half of the world's slowest or the
    purity below 0.6.
  """
  nets, way = [], 0.0
  for axis in range(2):
    net, state = 0.0, 1
    turns = _turns(centers[:, axis])
    for start, end in zip(turns[:-1], turns[1:]):
      net += state * (end - start)
      way += abs(end - start)
      at_wall = end >= WALLS[1] - WALL_TOLERANCE if end > start else end <= WALLS[0] + WALL_TOLERANCE
      state = -state if at_wall else state
    nets.append(net)
  axis = int(np.abs(nets).argmax())
  purity = abs(nets[axis]) / way if way else 0.0
  if abs(nets[axis]) < _MIN_SPEED * (len(centers) - 1) or purity < _MIN_PURITY:
    return None, purity
  return next(name for name, step in captions.DIRECTIONS.items() if step[axis] * nets[axis] > 0), purity


def _turns(path: np.ndarray) -> list[float]:
  """The positions where a path starts, turns (goes back by more than `_TURN`) and ends."""
  turns, furthest, sign = [float(path[0])], float(path[0]), 0
  for position in map(float, path):
    if not sign:
      sign = int(np.sign(position - turns[0])) if abs(position - turns[0]) > _TURN else 0
      furthest = position
    elif (position - furthest) * sign >= 0:
      furthest = position
    elif (furthest - position) > _TURN if sign > 0 else (position - furthest) > _TURN:
      turns.append(furthest)
      sign, furthest = -sign, position
  return turns + [furthest if sign else turns[0]]
