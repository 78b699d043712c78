"""Metrics of videos as functions: text alignment, Fréchet distance, flicker, motion smoothness and PSNR."""

from collections.abc import Sequence
import functools

import numpy as np

from causvid_jax import errors
from causvid_jax.data import digit_world
from causvid_jax.evaluation import classifier
from causvid_jax.evaluation import judge


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
  """Squared 2-Wasserstein distance of Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

  |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), by eigenvalues, with moments of maximum likelihood. Few
  features bias it upwards, so compare only distances of equally large sets.

  Args:
    features_a: float [n, D].
    features_b: float [m, D].
  """
  a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
  covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False, bias=True)) for x in (a, b))
  values, vectors = np.linalg.eigh(covariance_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  # tr (S_a S_b)^(1/2) = tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), and the latter is symmetric.
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
  distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariance_a + covariance_b) - 2 * cross
  return float(max(distance, 0.0))


def flicker(video: np.ndarray) -> float:
  """Mean absolute difference of consecutive frames, in levels of 0 to 255, of uint8 [F, H, W, 3], F >= 2."""
  return float(np.mean(np.abs(np.diff(video.astype(np.int16), axis=0))))


def motion_smoothness(centers: np.ndarray) -> float:
  """1 - mean |acceleration| / (2 mean |velocity|) of a path away from the walls, in [0, 1].

  Constant velocity gives 1 and a reversal in every frame 0; a thing at rest shows no motion and gives 0.

  Args:
    centers: of the ink (y, x) in pixels, [F, 2]. Only three in a row that are clear of the walls, along the
      axis of the greater way, tell an acceleration, as a bounce is no roughness; without any the result is 0.
  """
  velocity = np.diff(centers, axis=0)
  axis = int(np.abs(velocity).sum(0).argmax()) if len(velocity) else 0
  low, high = judge.WALLS[0] + judge.WALL_TOLERANCE, judge.WALLS[1] - judge.WALL_TOLERANCE
  clear = (centers[:, axis] > low) & (centers[:, axis] < high)
  inner = clear[:-2] & clear[1:-1] & clear[2:]
  before, after = velocity[:-1][inner], velocity[1:][inner]
  speed = (np.linalg.norm(before, axis=1) + np.linalg.norm(after, axis=1)).sum()
  if not speed > 1e-3 * len(before):
    return 0.0
  return float(1 - np.linalg.norm(after - before, axis=1).sum() / speed)


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB between uint8 arrays of one shape; infinite if they are equal."""
  error = np.mean((video.astype(np.float64) - reference) ** 2)
  return float(10 * np.log10(255.0 ** 2 / error)) if error else float("inf")


@functools.cache
def real_features(clips: int = 256, frames: int = digit_world.FRAMES) -> np.ndarray:
  """Features float32 [n, 64] of the first real validation clips, to which `score` measures its distance."""
  videos = [digit_world.clip(seed, "validation", frames)["video"] for seed in range(clips)]
  return np.concatenate([_features(readings) for readings in judge.read_all(videos)])


def score(videos: Sequence[np.ndarray], captions: Sequence[str],
          reference: np.ndarray | None = None) -> dict[str, float]:
  """Judges videos against their captions and against the real world.

  Args:
    videos: each uint8 [F, 64, 64, 3], F >= 2; or one array [n, F, 64, 64, 3].
    captions: one for each, of the grammar.
    reference: features of real clips, float [m, 64]; None: those of `real_features`.

  Returns:
    digit, color, direction: text alignment in % (`judge.compare`). frechet: distance of the features, where a
    video without a thing counts with an empty crop. flicker: in levels of 0 to 255. smoothness: of the things
    in each video, in %, with 0 for a video without any.

  Raises:
    UserError: when there is no video, or not one caption for each, or a caption is not of the grammar.
  """
  if not len(videos) or len(videos) != len(captions):
    raise errors.UserError(
        f"expected one caption for each video, got {len(videos)} videos and {len(captions)} captions")
  readings = judge.read_all(videos)
  alignment = [judge.compare(found, caption) for found, caption in zip(readings, captions)]
  features = np.concatenate([_features(found) for found in readings])
  smoothness = [np.mean([motion_smoothness(r.centers) for r in found] or [0.0]) for found in readings]
  return dict(
      **{name: 100 * float(np.mean([a[name] for a in alignment])) for name in alignment[0]},
      frechet=frechet_distance(features, real_features() if reference is None else reference),
      flicker=float(np.mean([flicker(video) for video in videos])),
      smoothness=100 * float(np.mean(smoothness)))


def _features(readings: Sequence[judge.Reading]) -> np.ndarray:
  """Features of all things in a video, [n, 64]; of an empty crop if there is none."""
  if not readings:
    return classifier.features(np.zeros((1, classifier.SIZE, classifier.SIZE)))
  return np.concatenate([reading.features for reading in readings])
