"""The digit world: captions that parse back, motion as captioned, clips that survive storage."""

import itertools
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from causvid_jax import errors
from causvid_jax.data import captions
from causvid_jax.data import digit_world

_FIRST_BOUNCE = 10
_SINGLES = [captions.Thing(*parts)
            for parts in itertools.product(captions.COLORS, range(10), captions.DIRECTIONS)]


def _render_one(direction: str, seed: int, frames: int = 60) -> np.ndarray:
  rng = np.random.default_rng(seed)
  images, _ = digit_world.glyphs("train")
  thing = captions.Thing("red", 0, direction)
  return digit_world.render((thing,), rng.choice(images, 1), rng, frames)


def _centroids(video: np.ndarray) -> np.ndarray:
  """Centres of mass (y, x) in pixels, float [F, 2]."""
  mass = video.sum(-1, dtype=np.float64)
  grid = np.arange(digit_world.SIZE)
  return np.stack([mass.sum(2) @ grid, mass.sum(1) @ grid], -1) / mass.sum((1, 2))[:, None]


class CaptionsTest(parameterized.TestCase):

  def test_caption_is_the_grammar(self):
    self.assertEqual(captions.describe((captions.Thing("red", 7, "left"),)), "a red seven moving left")
    self.assertEqual(captions.describe((captions.Thing("red", 7, "left"), captions.Thing("blue", 2, "up"))),
                     "a red seven moving left and a blue two moving up")

  def test_parse_inverts_describe(self):
    self.assertLen(_SINGLES, 240)
    pairs = itertools.product(_SINGLES[::3], _SINGLES[::7])
    for things in itertools.chain(((thing,) for thing in _SINGLES), pairs):
      self.assertEqual(captions.parse(captions.describe(things)), things)

  @parameterized.parameters(
      "", "a red seven", "a pink seven moving left", "red seven moving left", "a red seven moving left and",
      "a red seven moving left and a blue two moving up and a cyan one moving up", "xa red seven moving left")
  def test_parse_refuses_what_is_not_the_grammar(self, caption):
    with self.assertRaisesRegex(errors.UserError, "not of the digit world"):
      captions.parse(caption)

  def test_samples_cover_the_grammar_and_a_quarter_are_pairs(self):
    rng = np.random.default_rng(0)
    draws = [captions.sample_things(rng) for _ in range(4_000)]
    pairs = [things for things in draws if len(things) == 2]
    self.assertAlmostEqual(len(pairs) / len(draws), 0.25, delta=0.03)
    self.assertTrue(all(first.color != second.color for first, second in pairs))
    self.assertEqual({thing for things in draws for thing in things}, set(_SINGLES))


class GlyphsTest(absltest.TestCase):

  def test_splits_share_no_image_and_hold_every_digit_alike(self):
    (train, train_labels), (held_out, held_out_labels) = map(digit_world.glyphs, digit_world.SPLITS)
    self.assertEqual((train.shape, held_out.shape), ((4_500, 28, 28), (500, 28, 28)))
    self.assertEmpty({image.tobytes() for image in train} & {image.tobytes() for image in held_out})
    np.testing.assert_array_equal(np.bincount(train_labels), [450] * 10)
    np.testing.assert_array_equal(np.bincount(held_out_labels), [50] * 10)


class RenderTest(parameterized.TestCase):

  def test_draws_the_glyph_itself_in_its_colour(self):
    glyph = np.zeros((28, 28), np.uint8)
    glyph[5:15, 9:19] = np.arange(100, 200).reshape(10, 10)
    draws = mock.Mock()
    draws.uniform.side_effect = [2.0, 20.0, 30.5]  # speed, start and perpendicular position
    video = digit_world.render((captions.Thing("green", 1, "right"),), glyph[None], draws, frames=4)
    # The centre is at x = 20 + 3 * 2 and y = 30.5: whole columns, and rows half way between two pixels.
    ink = glyph[5:15, 9:19].astype(np.float64)
    expected = np.zeros((64, 64, 3))
    expected[25:36, 21:31] = ((np.pad(ink, ((0, 1), (0, 0))) + np.pad(ink, ((1, 0), (0, 0)))) / 2)[..., None]
    np.testing.assert_allclose(video[3], expected * np.array(captions.COLORS["green"]) / 255, atol=0.51)

  @parameterized.parameters(*captions.DIRECTIONS)
  def test_moves_as_captioned_then_reverses_at_the_walls(self, direction):
    dy, dx = captions.DIRECTIONS[direction]
    axis, sign = (0, dy) if dy else (1, dx)
    speeds = []
    for seed in range(40):
      video = _render_one(direction, seed)
      path = _centroids(video)
      np.testing.assert_allclose(path[:, 1 - axis], path[0, 1 - axis], atol=0.1)
      steps = np.diff(path[:, axis]) * sign
      speeds.append(np.median(np.abs(steps)))
      np.testing.assert_allclose(steps[:_FIRST_BOUNCE], speeds[-1], atol=0.1)
      # A step that contains a bounce is shorter than all others, which are equal.
      full = np.flatnonzero(np.abs(np.abs(steps) - speeds[-1]) < 0.1)
      turns = np.flatnonzero(np.diff(np.sign(steps[full])))
      self.assertBetween(len(turns), 1, 3)  # 60 frames cover 71 to 118 pixels; the walls are 44 apart
      self.assertLessEqual(len(steps) - len(full), len(turns) + 1)
      for wall, turn in zip(itertools.cycle((54, 10) if sign > 0 else (10, 54)), turns):
        inked = np.flatnonzero(video[full[turn] + 1].any((1 - axis, 2)))
        centre = (inked[0] + inked[-1] + 1) / 2
        self.assertAlmostEqual(centre, wall, delta=speeds[-1] + 0.5)
    self.assertBetween(min(speeds), 1.15, 1.35)
    self.assertBetween(max(speeds), 1.85, 2.05)

  def test_no_ink_leaves_the_frame(self):
    for seed, direction in itertools.product(range(40), captions.DIRECTIONS):
      mass = _render_one(direction, seed).sum((1, 2, 3), dtype=np.float64)  # interpolation keeps it
      np.testing.assert_allclose(mass, mass.mean(), rtol=0.01)

  def test_second_thing_covers_the_first_by_its_intensity(self):
    images, _ = digit_world.glyphs("train")
    things = (captions.Thing("blue", 0, "left"), captions.Thing("red", 0, "up"))
    overlap = 0
    for seed in range(20):
      both = digit_world.render(things, images[:2], np.random.default_rng(seed))
      lower = digit_world.render(things[:1], images[:1], np.random.default_rng(seed)).astype(np.float64)
      rng = np.random.default_rng(seed)
      rng.random(3)  # the first thing's draws
      upper = digit_world.render(things[1:], images[1:2], rng).astype(np.float64)
      alpha = upper[..., :1] / 255  # red's red is 255
      np.testing.assert_allclose(both, lower * (1 - alpha) + alpha * captions.COLORS["red"], atol=1.51)
      overlap += np.sum(lower.any(-1) & upper.any(-1))
    self.assertGreater(overlap, 1_000)


class ClipTest(absltest.TestCase):

  def test_is_a_function_of_seed_and_split_alone(self):
    first = digit_world.clip(5, "train")
    digit_world.clip(6, "train")
    again, other = digit_world.clip(5, "train"), digit_world.clip(6, "train")
    held_out = digit_world.clip(5, "validation")
    np.testing.assert_array_equal(first["video"], again["video"])
    self.assertEqual(first["caption"], again["caption"])
    self.assertFalse(np.array_equal(first["video"], other["video"]))
    self.assertFalse(np.array_equal(first["video"], held_out["video"]))
    self.assertEqual((first["video"].shape, first["video"].dtype), ((33, 64, 64, 3), np.uint8))

  def test_unknown_split_is_refused(self):
    with self.assertRaises(ValueError):
      digit_world.clip(0, "test")
    with self.assertRaises(ValueError):
      digit_world.glyphs("test")


class DatasetTest(absltest.TestCase):

  def test_round_trip_with_random_access(self):
    directory = self.enterContext(tempfile.TemporaryDirectory())
    builder = digit_world.build(directory, train_clips=12, validation_clips=3)
    for split, count in (("train", 12), ("validation", 3)):
      source = builder.as_data_source(split)
      self.assertLen(source, count)
      for index in (count - 1, 0, 2):
        stored, expected = digit_world.decode(source[index]), digit_world.clip(index, split)
        np.testing.assert_array_equal(stored["video"], expected["video"])
        self.assertEqual(stored["caption"], expected["caption"])
    other = digit_world.build(directory, train_clips=2, validation_clips=1)
    self.assertLen(other.as_data_source("train"), 2)
    self.assertLen(digit_world.build(directory, 12, 3).as_data_source("train"), 12)

  def test_needs_no_tensorflow(self):
    program = ("import sys; from causvid_jax.data import digit_world as d;"
               "b = d.build(sys.argv[1], 2, 1); d.decode(b.as_data_source('train')[1]);"
               "assert 'tensorflow' not in sys.modules")
    directory = self.enterContext(tempfile.TemporaryDirectory())
    result = subprocess.run([sys.executable, "-c", program, directory], capture_output=True, text=True,
                            check=False, env={"PYTHONPATH": ":".join(sys.path)})
    self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
  absltest.main()
