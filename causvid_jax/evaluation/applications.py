"""How well a student does what only a stream can: follow a video, change its prompt, go on without end.

  python -m causvid_jax.evaluation.applications --checkpoint=digit_world --output=runs/applications

Four measurements on the built-in world, where the truth is known; each is a function, and the command prints their
tables and draws their curves.
"""

from collections.abc import Mapping, Sequence
import itertools
import json
import os
import pathlib
import resource
import time

from absl import flags
from matplotlib import figure
import numpy as np
import tqdm

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.data import captions
from causvid_jax.data import digit_world
from causvid_jax.evaluation import judge
from causvid_jax.evaluation import metrics
from causvid_jax.evaluation import report
from causvid_jax.sampling import stream as stream_lib

_CHECKPOINT = flags.DEFINE_string("checkpoint", "digit_world", "The student's pipeline.")
_OUTPUT = flags.DEFINE_string("output", "runs/applications", "Folder of tables and plots.")
_VIDEOS = flags.DEFINE_integer("videos", 32, "Videos of each setting.", lower_bound=1)
_CHUNKS = flags.DEFINE_integer("chunks", 2000, "Chunks over which time and memory are watched.", lower_bound=10)
_PARTS = flags.DEFINE_multi_enum(
    "part", ["video_to_video", "prompt_switch", "drift", "cost"], ["video_to_video", "prompt_switch", "drift", "cost"],
    "What to measure; may be repeated.")

_SEED = 11
_STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_BEFORE, _AFTER = 3, 5  # chunks before and after a change of prompt

Rows = dict[str, dict[str, float]]


def video_to_video(pipe: pipeline.Pipeline, count: int, strengths: Sequence[float] = _STRENGTHS,
                   one_step: bool = False) -> Rows:
  """Real validation clips made anew in another colour, by strength.

  Returns, by strength: `input`, the correlation of the brightness of every pixel with the source's, in %; and how well
  digit, colour and direction fit the new prompt, in %.
  """
  rng = np.random.default_rng(_SEED)
  clips = [digit_world.clip(seed, "validation", pipe.clip_frames) for seed in range(count)]
  prompts = [_recolored(clip["caption"], rng) for clip in clips]
  rows = {}
  for strength in strengths:
    videos = [np.concatenate(list(pipe.stream(prompt, i, video=[clip["video"]], strength=strength, one_step=one_step)))
              for i, (clip, prompt) in enumerate(zip(clips, prompts))]
    kept = [np.corrcoef(video.max(-1).ravel(), clip["video"].max(-1).ravel())[0, 1] for video, clip in zip(videos, clips)]
    rows[f"{strength:g}"] = {"input": 100 * float(np.mean(kept)), **_alignment(videos, prompts)}
  return rows


def prompt_switch(pipe: pipeline.Pipeline, count: int) -> Rows:
  """A prompt that changes between chunks, by policy and blending.

  Returns, by setting: `chunk n`, the share of the new prompt's colours in the n-th chunk after the change, in %;
  `digit`, that of its digits in the last one; and `jump`, how much more the picture changes at the seam than from frame
  to frame of real clips (1: not at all).
  """
  rng = np.random.default_rng(_SEED)
  pairs = []
  while len(pairs) < count:
    old, new = (captions.Thing(str(c), int(d), str(h)) for c, d, h in zip(
        rng.choice(list(captions.COLORS), 2, replace=False), rng.choice(10, 2, replace=False),
        rng.choice(list(captions.DIRECTIONS), 2)))
    pairs.append((captions.describe((old,)), captions.describe((new,))))
  usual = np.mean([metrics.flicker(digit_world.clip(seed, "validation")["video"]) for seed in range(count)])
  rows = {}
  for policy, blend in itertools.product(stream_lib.POLICIES, (0, 2)):
    colors, digits, jumps = np.zeros((count, _AFTER)), np.zeros(count), np.zeros(count)
    for i, (old, new) in enumerate(pairs):
      stream = pipe.stream(old, i, policy=policy, blend_chunks=blend)
      before = [next(stream) for _ in range(_BEFORE)]
      stream.prompt = new
      after = [next(stream) for _ in range(_AFTER)]
      scores = [judge.align(chunk, new) for chunk in after]
      colors[i], digits[i] = [score["color"] for score in scores], scores[-1]["digit"]
      jumps[i] = metrics.flicker(np.stack([before[-1][-1], after[0][0]]))
    rows[f"{policy}, blended over {blend} chunks" if blend else policy] = {
        **{f"chunk {n + 1}": 100 * colors[:, n].mean() for n in range(_AFTER)},
        "digit": 100 * digits.mean(), "jump": jumps.mean() / usual}
  return rows


def drift(path: str | os.PathLike, count: int, lengths: int = 50) -> dict[str, Rows]:
  """Quality along streams of `lengths` training lengths, by what the cache keeps.

  Returns, by setting and number of the training length: digit and colour in % and `ink`, the mean brightness in levels.
  """
  settings = {}
  pipe = pipeline.Pipeline.from_checkpoint(path)
  slots = pipe.sampler.sink_frames + pipe.sampler.window_frames
  for sinks, refresh in itertools.product(sorted({0, pipe.sampler.sink_frames}), (False, True)):
    name = f"{sinks} sink frames{', cache recomputed' if refresh else ''}"
    settings[name] = (pipeline.Pipeline.from_checkpoint(path, sink_frames=sinks, window_frames=slots - sinks), refresh)
  rng = np.random.default_rng(_SEED)
  prompts = [captions.describe(captions.sample_things(rng)) for _ in range(count)]
  results = {}
  for name, (pipe, refresh) in settings.items():
    stream, held, rows = pipe.stream(prompts, _SEED, refresh=refresh), np.zeros((count, 0, *pipe.frame_size, 3), np.uint8), {}
    with tqdm.tqdm(total=lengths, desc=name, unit="length") as bar:
      while len(rows) < lengths:
        held = np.concatenate([held, next(stream)], axis=1)
        if held.shape[1] >= pipe.clip_frames:
          videos, held = held[:, :pipe.clip_frames], held[:, pipe.clip_frames:]
          scores = _alignment(videos, prompts)
          rows[str(len(rows) + 1)] = {"digit": scores["digit"], "color": scores["color"], "ink": float(videos.max(-1).mean())}
          bar.update()
    results[name] = rows
  return results


def cost(pipe: pipeline.Pipeline, chunks: int) -> Rows:
  """Time of a chunk and memory of the process along one stream, in five parts, after 20 chunks to warm up."""
  stream = pipe.stream("a red seven moving left", _SEED)
  for _ in range(20):
    next(stream)
  rows = {}
  for part in range(5):
    seconds = []
    for _ in range(chunks // 5):
      start = time.perf_counter()
      next(stream)
      seconds.append(time.perf_counter() - start)
    rows[f"chunks {part * (chunks // 5) + 1} to {(part + 1) * (chunks // 5)}"] = {
        "milliseconds a chunk": 1e3 * float(np.median(seconds)), "peak memory, MB": _peak_memory() / 1e6}
  return rows


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(f"--output={output}: cannot write there: {error.strerror}") from error
  pipe, count, results = pipeline.Pipeline.from_checkpoint(_CHECKPOINT.value), _VIDEOS.value, {}
  if "cost" in _PARTS.value:
    results["cost"] = cost(pipe, _CHUNKS.value)
  if "video_to_video" in _PARTS.value:
    results["video to video, all steps below t_1"] = steps = video_to_video(pipe, count)
    results["video to video, one step"] = one = video_to_video(pipe, count, one_step=True)
    plot({"all steps": steps, "one step": one}, ["input", "color", "digit"], "strength", output / "video_to_video.png")
  if "prompt_switch" in _PARTS.value:
    results["prompt switch"] = prompt_switch(pipe, count)
  if "drift" in _PARTS.value:
    curves = drift(_CHECKPOINT.value, count)
    results |= {f"drift, {name}": {n: rows[n] for n in ("1", "2", "4", "10", "25", "50") if n in rows}
                for name, rows in curves.items()}
    plot(curves, ["digit", "color", "ink"], "training lengths", output / "drift.png")
  (output / "applications.json").write_text(json.dumps(results, indent=2) + "\n")
  for name, rows in results.items():
    print(f"\n{name}\n\n{report.table(rows)}")


def plot(curves: Mapping[str, Rows], columns: Sequence[str], label: str, path: pathlib.Path) -> None:
  """Draws a panel for each column and a line for each setting, over the rows' names as numbers."""
  page = figure.Figure(figsize=(4 * len(columns), 3), layout="constrained")
  for axes, column in zip(page.subplots(1, len(columns)), columns):
    for name, rows in curves.items():
      axes.plot([float(row) for row in rows], [values[column] for values in rows.values()], label=name, linewidth=1)
    axes.set(title=report.TITLES.get(column, column), xlabel=label)
    axes.grid(alpha=0.3)
  axes.legend(fontsize=7)
  page.savefig(path, dpi=110, metadata={"Software": None})


def _alignment(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
  """Text alignment in %, averaged."""
  scores = [judge.align(video, prompt) for video, prompt in zip(videos, prompts)]
  return {name: 100 * float(np.mean([score[name] for score in scores])) for name in ("digit", "color", "direction")}


def _recolored(caption: str, rng: np.random.Generator) -> str:
  """The caption with other colours."""
  things = captions.parse(caption)
  free = [color for color in captions.COLORS if color not in {thing.color for thing in things}]
  colors = rng.choice(free, len(things), replace=False)
  return captions.describe(tuple(
      captions.Thing(str(color), thing.digit, thing.direction) for color, thing in zip(colors, things)))


def _peak_memory() -> float:
  """Of this process, in bytes."""
  return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
  errors.run(main)
