"""Judges checkpoints on the built-in world and writes a report.

`python -m causvid_jax.evaluate --checkpoint=digit_world [--checkpoint=teacher=digit_world/teacher] --output=runs/report`
"""

import json
import pathlib

from absl import flags
import numpy as np
import tqdm

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.data import captions
from causvid_jax.data import digit_world
from causvid_jax.data import video
from causvid_jax.evaluation import metrics
from causvid_jax.evaluation import report

_CHECKPOINTS = flags.DEFINE_multi_string(
    "checkpoint", ["digit_world"], "A pipeline to judge, as path or name=path; repeat the flag to compare several.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 64, "Videos to judge of each checkpoint.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Videos made at once.", lower_bound=1)
_LONG = flags.DEFINE_multi_string(
    "long", [], "Names of causal checkpoints to judge at 4 times the training length too.")
_SEED = flags.DEFINE_integer("seed", 1, "Seed of the prompts and the noise.")
_SHEET = flags.DEFINE_integer("sheet", 12, "Videos shown in the contact sheet of each checkpoint.")
_CURVES = flags.DEFINE_multi_string("curves", [], "Runs whose loss curves the report shows, as name=workdir.")
_OUTPUT = flags.DEFINE_string("output", "runs/report", "Folder of the report.")


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  pipes = {}
  for name, path in map(_named, _CHECKPOINTS.value):
    if name in pipes:
      raise errors.UserError(f"two checkpoints are named {name!r}: expected --checkpoint=name=path with different names")
    pipes[name] = pipeline.Pipeline.from_checkpoint(path)
  if unknown := set(_LONG.value) - pipes.keys():
    raise errors.UserError(f"--long={unknown.pop()}: expected the name of one of the checkpoints")
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(f"--output={output}: cannot write there: {error.strerror}") from error
  rng = np.random.default_rng(_SEED.value)
  prompts = [captions.describe(captions.sample_things(rng)) for _ in range(_NUM_PROMPTS.value)]

  real = [digit_world.clip(seed, "validation") for seed in range(_NUM_PROMPTS.value)]
  rows = {"real clips": metrics.score([clip["video"] for clip in real], [clip["caption"] for clip in real])}
  media = {}
  for name, pipe in pipes.items():
    videos = make(pipe, prompts, pipe.clip_frames, name)
    rows[name] = metrics.score(videos, prompts)
    shown = min(_SHEET.value, len(videos))
    media[f"{name}: samples"] = _write(output / f"{name}.mp4", video.contact_sheet(videos[:shown], prompts[:shown], 4), pipe)
    if name in _LONG.value:
      frames = pipe.vae.config.pixel_frames(4 * pipe.vae.config.latent_shape(pipe.clip_frames, 8, 8)[0])
      videos = make(pipe, prompts, frames, f"{name}, 4x")
      rows[f"{name}, 4x length"] = metrics.score(videos, prompts)
      media[f"{name}: {frames} frames of {prompts[0]!r}"] = _write(
          output / f"{name}_long.mp4", video.contact_sheet(videos[:1], prompts[:1], 1, scale=4), pipe)

  curves = None
  if _CURVES.value:
    curves = output / "curves.png"
    report.plot_curves({name: pathlib.Path(run) / "metrics.jsonl" for name, run in map(_named, _CURVES.value)}, curves)
  notes = [f"{_NUM_PROMPTS.value} prompts and their noise from seed {_SEED.value}. Text alignment in %, by a judge that reads"
           " digit, colour and direction off the pixels."]
  path = report.write_report(output, rows, media, curves, notes)
  (output / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n")
  print(report.table(rows))
  for file in [*media.values(), *([curves] if curves else []), path]:
    print(file)


def make(pipe: pipeline.Pipeline, prompts: list[str], num_frames: int, name: str) -> np.ndarray:
  """One video a prompt, uint8 [n, num_frames, H, W, 3]; the same noise whatever the checkpoint."""
  videos = []
  size = min(_BATCH_SIZE.value, len(prompts))
  with tqdm.tqdm(total=len(prompts), desc=f"sampling {name}", unit="video") as bar:
    for first in range(0, len(prompts), size):
      batch = prompts[first:first + size]
      padded = batch + batch[-1:] * (size - len(batch))  # one compiled shape
      videos.extend(pipe(padded, num_frames, seed=_SEED.value + first)[:len(batch)])
      bar.update(len(batch))
  return np.stack(videos)


def _named(value: str) -> tuple[str, str]:
  """"name=path" or "path" -> (name, path)."""
  name, _, path = value.rpartition("=")
  return name or pathlib.Path(path).name, path


def _write(path: pathlib.Path, frames: np.ndarray, pipe: pipeline.Pipeline) -> pathlib.Path:
  video.write_video(path, frames, pipe.fps)
  return path


if __name__ == "__main__":
  errors.run(main)
