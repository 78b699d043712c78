"""The judge: near perfect on real clips, at chance on wrong captions, undeceived by errors; metrics."""

import functools
import json
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
from scipy import ndimage

from causvid_jax import errors
from causvid_jax.data import captions
from causvid_jax.data import digit_world
from causvid_jax.evaluation import classifier
from causvid_jax.evaluation import judge
from causvid_jax.evaluation import metrics
from causvid_jax.evaluation import report
from causvid_jax.evaluation import classifier_training


@functools.cache
def _clips(count: int, frames: int = digit_world.FRAMES) -> tuple[list[np.ndarray], list[str]]:
  """Validation clips other than those behind `metrics.real_features`."""
  clips = [digit_world.clip(1_000 + seed, "validation", frames) for seed in range(count)]
  return [clip["video"] for clip in clips], [clip["caption"] for clip in clips]


@functools.cache
def _readings(count: int) -> list[list[judge.Reading]]:
  return judge.read_all(_clips(count)[0])


def _alignment(readings, texts) -> dict[str, float]:
  """Mean of each score over all clips, in %."""
  scores = [judge.compare(found, text) for found, text in zip(readings, texts, strict=True)]
  return {name: 100 * np.mean([s[name] for s in scores]) for name in scores[0]}


def _draw(path: np.ndarray, color: str = "red", digit: int = 3) -> np.ndarray:
  """A validation glyph along whole-pixel centres (y, x) [F, 2] of its 28x28 image: uint8 [F, 64, 64, 3]."""
  images, labels = digit_world.glyphs("validation")
  glyph = np.pad(images[labels == digit][0], 18)
  frames = [np.roll(glyph, (y - 32, x - 32), (0, 1)) for y, x in path]
  return np.rint(np.stack(frames)[..., None] / 255 * np.array(captions.COLORS[color])).astype(np.uint8)


def _horizontal(*steps: tuple[int, int], start: int = 20) -> np.ndarray:
  """A path at y = 32 from x = `start` by (count, velocity) steps, int [F, 2]."""
  x = start + np.cumsum([0] + [velocity for count, velocity in steps for _ in range(count)])
  return np.stack([np.full_like(x, 32), x], -1)


class ClassifierTest(absltest.TestCase):

  def test_reads_held_out_glyphs(self):
    images, labels = digit_world.glyphs("validation")
    logits, features = classifier.classify(images / 255)
    self.assertEqual(features.shape, (500, classifier.FEATURES))
    self.assertGreaterEqual(np.mean(logits.argmax(-1) == labels), 0.98)
    distorted, _ = classifier.classify(classifier.augment(jax.random.key(1), images / np.float32(255)))
    self.assertGreaterEqual(np.mean(distorted.argmax(-1) == labels), 0.96)

  def test_any_number_of_crops_gives_the_same_answers(self):
    images = digit_world.glyphs("validation")[0][:300] / 255
    whole = classifier.features(images)
    np.testing.assert_allclose(whole[:3], classifier.features(images[:3]), atol=1e-4)
    self.assertEqual(classifier.features(images[:0]).shape, (0, classifier.FEATURES))

  def test_training_learns_and_repeats(self):
    first = classifier_training.train(seed=1, steps=25, batch=64)
    again = classifier_training.train(seed=1, steps=25, batch=64)
    chex.assert_trees_all_equal(first, again)
    self.assertGreater(classifier_training.accuracy(first, distort=False), 0.5)

  def test_what_ships_is_small_and_has_its_provenance(self):
    provenance = json.loads((classifier.ASSET / "provenance.json").read_text())
    self.assertContainsSubset({"command", "commit", "seed", "hardware", "seconds", "metrics"}, provenance)
    self.assertLess(sum(path.stat().st_size for path in classifier.ASSET.iterdir()), 500_000)
    self.assertAlmostEqual(classifier_training.accuracy(classifier.load(), distort=False),
                           provenance["metrics"]["validation_accuracy"], delta=0.005)


class RealClipsTest(parameterized.TestCase):

  def test_real_clips_are_near_perfect(self):
    scores = _alignment(_readings(200), _clips(200)[1])
    print("real clips:", scores)
    self.assertGreaterEqual(scores["digit"], 97)
    self.assertGreaterEqual(scores["color"], 99)
    self.assertGreaterEqual(scores["direction"], 99)

  def test_wrong_captions_score_at_chance(self):
    rng = np.random.default_rng(0)
    single = [found for found, text in zip(_readings(200), _clips(200)[1]) if len(captions.parse(text)) == 1]
    readings = [found for found in single for _ in range(20)]
    things = [captions.Thing(str(rng.choice(list(captions.COLORS))), int(rng.integers(10)),
                             str(rng.choice(list(captions.DIRECTIONS)))) for _ in readings]
    scores = _alignment(readings, [captions.describe((thing,)) for thing in things])
    print("random captions:", scores)
    self.assertAlmostEqual(scores["digit"], 10, delta=2)
    self.assertAlmostEqual(scores["color"], 100 / 6, delta=2.5)
    self.assertAlmostEqual(scores["direction"], 25, delta=3)

  def test_one_wrong_word_costs_only_its_own_column(self):
    texts = _clips(200)[1]
    for name, wrong in (("digit", lambda t: captions.Thing(t.color, (t.digit + 3) % 10, t.direction)),
                        ("direction", lambda t: captions.Thing(t.color, t.digit, {
                            "left": "right", "right": "left", "up": "down", "down": "up"}[t.direction]))):
      changed = [captions.describe(tuple(map(wrong, captions.parse(text)))) for text in texts]
      scores = _alignment(_readings(200), changed)
      self.assertLessEqual(scores.pop(name), 1.0)
      self.assertGreaterEqual(min(scores.values()), 97)
    other = dict(zip(captions.COLORS, [*list(captions.COLORS)[1:], "red"]))
    singles = [(found, text) for found, text in zip(_readings(200), texts) if " and " not in text]
    scores = _alignment(*zip(*((found, re.sub(r"^a (\w+)", lambda match: f"a {other[match[1]]}", text))
                               for found, text in singles)))
    self.assertLessEqual(scores.pop("color"), 1.0)
    self.assertGreaterEqual(min(scores.values()), 97)

  def test_long_clips_are_near_perfect(self):
    videos, texts = _clips(32, 141)
    scores = _alignment(judge.read_all(videos), texts)
    print("141 frames:", scores)
    self.assertGreaterEqual(min(scores.values()), 97)

  @parameterized.named_parameters(("blurred", 0.7, 0.0), ("noisy", 0.0, 8.0), ("both", 0.6, 6.0))
  def test_imperfect_decoding_is_forgiven(self, blur, noise):
    rng = np.random.default_rng(0)
    videos, texts = _clips(64)
    worse = [np.rint(ndimage.gaussian_filter(video.astype(float), (0, blur, blur, 0)) + rng.normal(
        0, noise, video.shape)).clip(0, 255).astype(np.uint8) for video in videos]
    scores = _alignment(judge.read_all(worse), texts)
    print(f"PSNR {np.mean([metrics.psnr(a, b) for a, b in zip(worse, videos)]):.1f} dB:", scores)
    self.assertGreaterEqual(min(scores.values()), 95)


class ErrorsOfTheWorldTest(parameterized.TestCase):

  @parameterized.parameters(*captions.DIRECTIONS)
  def test_bounce_at_a_wall_keeps_the_heading(self, direction):
    path = _horizontal((16, 2), (16, -2), start=22)  # ink centred at 54 when it turns
    dy, dx = captions.DIRECTIONS[direction]
    path = path if dx + dy > 0 else 64 - path
    reading, = judge.read(_draw(path[:, ::-1] if dy else path))
    self.assertEqual((reading.color, reading.digit, reading.direction), ("red", 3, direction))
    self.assertAlmostEqual(reading.purity, 1.0, delta=0.02)

  def test_reversal_in_mid_air_is_caught(self):
    reading, = judge.read(_draw(_horizontal((12, 1), (12, -1))))
    self.assertIsNone(reading.direction)
    self.assertLess(reading.purity, 0.1)

  def test_late_reversal_lowers_purity(self):
    reading, = judge.read(_draw(_horizontal((12, 2), (2, -2), start=18)))
    self.assertEqual(reading.direction, "right")
    self.assertAlmostEqual(reading.purity, 20 / 28, delta=0.02)  # 24 forth and 4 back

  def test_frozen_or_trembling_digit_does_not_move(self):
    rng = np.random.default_rng(0)
    for path in (np.full((33, 2), 30), 30 + rng.integers(-1, 2, (33, 2))):
      reading, = judge.read(_draw(path))
      self.assertIsNone(reading.direction)
      self.assertEqual(judge.compare([reading], "a red three moving left"),
                       dict(digit=1.0, color=1.0, direction=0.0))

  def test_diagonal_motion_has_no_direction(self):
    path = 20 + np.repeat(np.arange(20)[:, None], 2, 1)
    self.assertIsNone(judge.read(_draw(path))[0].direction)

  def test_black_and_grey_videos_show_nothing(self):
    for level in (0, 20, 200):
      video = np.full((9, 64, 64, 3), level, np.uint8)
      self.assertEmpty(judge.read(video))
      self.assertEqual(judge.align(video, "a red three moving left"),
                       dict(digit=0.0, color=0.0, direction=0.0))

  def test_missing_and_invented_things_count_against_colour(self):
    red = _draw(_horizontal((20, 1)) - [14, 0])
    both = np.maximum(red, _draw(_horizontal((20, 1)) + [14, 0], "green", 0))
    one, two = "a red three moving right", "a red three moving right and a green zero moving right"
    self.assertEqual(judge.align(both, two), dict(digit=1.0, color=1.0, direction=1.0))
    self.assertEqual(judge.align(both, one), dict(digit=1.0, color=0.5, direction=1.0))
    self.assertEqual(judge.align(red, two), dict(digit=0.5, color=0.5, direction=0.5))
    self.assertEqual(judge.align(both, "a blue zero moving right and a red three moving right"),
                     dict(digit=1.0, color=1 / 3, direction=1.0))

  def test_change_of_colour_is_two_things(self):
    path = _horizontal((32, 1))
    video = np.concatenate([_draw(path)[:16], _draw(path, "blue")[16:]])
    self.assertEqual(judge.align(video, "a red three moving right")["color"], 0.5)


class MetricsTest(parameterized.TestCase):

  def test_frechet_distance_of_gaussians(self):
    rng = np.random.default_rng(0)
    white = rng.normal(size=(40, 4))
    white = np.sqrt(40) * np.linalg.qr(white - white.mean(0))[0]  # mean 0, covariance 1
    self.assertAlmostEqual(metrics.frechet_distance(white, white), 0.0, places=9)
    scale, shift = np.array([1.0, 2.0, 3.0, 0.5]), np.array([1.0, -2.0, 0.0, 3.0])
    # Covariances that commute: |m|^2 + sum (s_a - s_b)^2.
    self.assertAlmostEqual(metrics.frechet_distance(white, white * scale + shift), 14 + 5.25, places=8)
    # Covariances that do not: diag(1, 9) and itself turned by 45 degrees, [[5, 4], [4, 5]]. Of a 2x2 matrix,
    # tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)); here tr M = 1 * 5 + 9 * 5 and det M = 81.
    flat = white[:, :2] * [1, 3]
    turn = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    self.assertAlmostEqual(metrics.frechet_distance(flat, flat @ turn.T), 20 - 2 * np.sqrt(50 + 18), places=8)

  def test_frechet_distance_tells_real_from_damaged(self):
    videos, texts = _clips(64)
    real = metrics.score(videos, texts)["frechet"]
    blurred = [ndimage.gaussian_filter(video, (0, 2, 2, 0)) for video in videos]
    self.assertLess(real, 0.25 * metrics.score(blurred, texts)["frechet"])

  def test_flicker(self):
    video = np.zeros((4, 64, 64, 3), np.uint8)
    video[1::2] = 200
    self.assertEqual(metrics.flicker(video), 200.0)
    self.assertEqual(metrics.flicker(video[:1].repeat(3, 0)), 0.0)
    video[1::2, :32] = 0
    self.assertEqual(metrics.flicker(video), 100.0)

  def test_motion_smoothness(self):
    x = np.arange(20.0, 40.0)
    beside_wall = np.stack([x * 0 + 3, x], -1)
    self.assertEqual(metrics.motion_smoothness(beside_wall), 1.0)
    self.assertEqual(metrics.motion_smoothness(np.stack([x * 0, 30 + x % 2], -1)), 0.0)
    self.assertEqual(metrics.motion_smoothness(np.full((9, 2), 30.0)), 0.0)
    uneven = 20 + np.cumsum([0, 1, 3] * 4)[:11]  # velocities 1, 3, 0, 1, ...: accelerations 2, 3, 1, 2, ...
    self.assertAlmostEqual(metrics.motion_smoothness(np.stack([uneven * 0, uneven], -1)), 1 - 18 / 24)
    bounce = 64 - 10 - np.abs(np.arange(-15.0, 16.0))
    self.assertEqual(metrics.motion_smoothness(np.stack([bounce, bounce * 0 + 30], -1)), 1.0)
    mid_air = 34 - np.abs(np.arange(-10.0, 11.0))  # one acceleration of 2 among 19 pairs of unit speeds
    self.assertAlmostEqual(metrics.motion_smoothness(np.stack([mid_air, mid_air * 0 + 30], -1)), 1 - 2 / 38)

  def test_psnr(self):
    black = np.zeros((2, 4, 4, 3), np.uint8)
    self.assertEqual(metrics.psnr(black, black), float("inf"))
    self.assertAlmostEqual(metrics.psnr(black + np.uint8(255), black), 0.0)
    self.assertAlmostEqual(metrics.psnr(black, black + np.uint8(51)), 20 * np.log10(5))

  def test_score_of_real_clips_and_of_black(self):
    videos, texts = _clips(64)
    real = metrics.score(videos, texts)
    black = metrics.score(np.zeros((64, 33, 64, 64, 3), np.uint8), texts)
    print("score, real:", real, "\nscore, black:", black)
    self.assertGreaterEqual(min(real[name] for name in ("digit", "color", "direction")), 97)
    self.assertGreaterEqual(real["smoothness"], 95)
    self.assertBetween(real["flicker"], 1, 10)
    self.assertEqual([black[n] for n in ("digit", "color", "direction", "flicker", "smoothness")], [0.0] * 5)
    self.assertGreater(black["frechet"], 10 * real["frechet"])

  def test_score_refuses_what_does_not_pair(self):
    videos, texts = _clips(64)
    for arguments in ((videos[:2], texts[:1]), ([], [])):
      with self.assertRaisesRegex(errors.UserError, "one caption for each video"):
        metrics.score(*arguments)
    with self.assertRaisesRegex(errors.UserError, "not of the digit world"):
      metrics.score(videos[:1], ["a pink seven moving left"])


class ReportTest(absltest.TestCase):

  def test_table(self):
    rows = {"teacher": dict(digit=96.25, frechet=9.1234), "student": dict(digit=100.0, seconds=0.51234)}
    self.assertEqual(report.table(rows), ("|  | digit % | Fréchet distance | seconds |\n"
                                          "| :-- | --: | --: | --: |\n"
                                          "| teacher | 96.2 | 9.12 | - |\n"
                                          "| student | 100.0 | - | 0.512 |\n"))

  def test_report_links_relatively_and_repeats_to_the_byte(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    log = folder / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / (1 + step), "speed": 3.0} for step in range(5)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    contents = []
    for _ in range(2):
      report.plot_curves({"ode": log, "dmd": log}, folder / "curves.png")
      path = report.write_report(
          folder / "out", rows={"student": dict(digit=97.0)}, media={"Samples": folder / "a b.mp4"},
          curves=folder / "curves.png", notes=["Trained for 5 steps."])
      contents.append((path.read_text(), (folder / "curves.png").read_bytes()))
    self.assertEqual(contents[0], contents[1])
    self.assertStartsWith(contents[0][1], b"\x89PNG")
    for part in ("# Report\n\nTrained for 5 steps.\n\n|", "| student | 97.0 |", "[Samples](../a%20b.mp4)",
                 "![curves](../curves.png)"):
      self.assertIn(part, contents[0][0])
    self.assertNotIn("![Samples]", contents[0][0])

  def test_bad_paths_are_user_errors(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "file").write_text("{")
    with self.assertRaisesRegex(errors.UserError, "expected lines of JSON"):
      report.plot_curves({"run": folder / "file"}, folder / "curves.png")
    with self.assertRaisesRegex(errors.UserError, "expected lines of JSON"):
      report.plot_curves({"run": folder / "missing"}, folder / "curves.png")
    with self.assertRaisesRegex(errors.UserError, "cannot write the report"):
      report.write_report(folder / "file" / "out", {}, {})
    with self.assertRaisesRegex(errors.UserError, "cannot write the curves"):
      report.plot_curves({}, folder / "nowhere" / "curves.png")


if __name__ == "__main__":
  absltest.main()
