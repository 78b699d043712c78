"""Metrics of a run: the terminal's progress bar, JSON lines and TensorBoard."""

import json
import pathlib

import numpy as np
import tensorboardX
import tqdm

from causvid_jax.data import video


class MetricWriter:
  """Writes scalars to `metrics.jsonl`, TensorBoard event files and a progress bar with ETA; a context manager."""

  def __init__(self, workdir: pathlib.Path, first_step: int, num_steps: int, name: str):
    self._lines = _open_lines(workdir / "metrics.jsonl", first_step)
    self._samples = workdir / "samples"
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
    self._bar = tqdm.tqdm(total=num_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True)

  def advance(self) -> None:
    self._bar.update()

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    self._lines.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

  def samples(self, step: int, videos: dict[str, np.ndarray], fps: float) -> None:
    """Sample clips uint8 [F, H, W, 3] by caption: an MP4 in `samples/`, and its last frame in TensorBoard."""
    self._samples.mkdir(exist_ok=True)
    sheet = video.contact_sheet(list(videos.values()), list(videos), columns=len(videos))
    video.write_video(self._samples / f"{step:06d}.mp4", sheet, fps)
    self._board.add_image("samples", sheet[-1], step, dataformats="HWC")

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._board.close()
    self._lines.close()


def _open_lines(path: pathlib.Path, first_step: int):
  """Opens the log after the last line that the restored state knows of: a killed run may have logged further."""
  kept = []
  if path.exists():
    for line in path.read_text().splitlines(keepends=True):
      if line.endswith("\n") and json.loads(line)["step"] <= first_step:
        kept.append(line)
  partial = path.with_suffix(".partial")
  partial.write_text("".join(kept))
  partial.replace(path)
  return path.open("a")
