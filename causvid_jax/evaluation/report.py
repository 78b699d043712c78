"""Reports: Markdown tables, loss curves and a page that links them; the same content gives the same bytes."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib

from matplotlib import figure

from causvid_jax import errors

TITLES = {
    "digit": "digit %",
    "color": "colour %",
    "direction": "direction %",
    "frechet": "Fréchet distance",
    "flicker": "flicker (of 255)",
    "smoothness": "smoothness %",
}
_PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg")


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """Returns a Markdown table, a line for each row; columns as they first appear, "-" where a row has none."""
  columns = list(dict.fromkeys(name for row in rows.values() for name in row))
  lines = [["", *(TITLES.get(name, name) for name in columns)], [":--", *("--:" for _ in columns)]]
  for name, row in rows.items():
    lines.append([name, *(_number(row[column]) if column in row else "-" for column in columns)])
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float) -> str:
  return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def plot_curves(runs: Mapping[str, str | os.PathLike], output: str | os.PathLike,
                contains: str = "loss") -> None:
  """Draws the curves of several runs, a panel for each metric and a line for each run.

  Args:
    runs: the label of each run and its metrics.jsonl, lines of {"step": ..., name: value}.
    output: the PNG to write.
    contains: which metrics: those with this in their name.

  Raises:
    UserError: when a log is missing or damaged, or `output` cannot be written.
  """
  logs = {label: _read(pathlib.Path(path)) for label, path in runs.items()}
  names = dict.fromkeys(name for log in logs.values() for line in log for name in line if contains in name)
  page = figure.Figure(figsize=(8, 2.6 * max(len(names), 1)), layout="constrained")
  for axes, name in zip(page.subplots(max(len(names), 1), squeeze=False)[:, 0], names):
    for label, log in logs.items():
      points = [(line["step"], line[name]) for line in log if name in line]
      if points:
        axes.plot(*zip(*points), label=label, linewidth=1)
    if all(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
      axes.set_yscale("log")
    axes.set(ylabel=name, xlabel="step")
    axes.grid(alpha=0.3)
    axes.legend()
  try:  # the version of the software would change the bytes
    page.savefig(output, format="png", dpi=110, metadata={"Software": None})
  except OSError as error:
    raise errors.UserError(f"{os.fspath(output)}: cannot write the curves there: {error.strerror}") from error


def _read(path: pathlib.Path) -> list[dict[str, float]]:
  try:
    return [json.loads(line) for line in path.read_text().splitlines()]
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path}: expected lines of JSON with metrics, got: {error}") from error


def write_report(folder: str | os.PathLike, rows: Mapping[str, Mapping[str, float]],
                 media: Mapping[str, str | os.PathLike], curves: str | os.PathLike | None = None,
                 notes: Sequence[str] = ()) -> pathlib.Path:
  """Writes `report.md` into a folder: notes, table, media and curves, with links relative to it.

  Args:
    folder: made if missing.
    rows: of the table.
    media: title and file of each video or picture; pictures show on the page.
    curves: the picture of `plot_curves`.
    notes: paragraphs before the table.

  Returns:
    The path of report.md.

  Raises:
    UserError: when the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  path = folder / "report.md"
  sections = ["# Report", *notes, table(rows).rstrip("\n"), *(_link(folder, *item) for item in media.items())]
  if curves is not None:
    sections += ["## Curves", _link(folder, "curves", curves)]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n")
  except OSError as error:
    raise errors.UserError(f"{path}: cannot write the report there: {error.strerror}") from error
  return path


def _link(folder: pathlib.Path, title: str, path: str | os.PathLike) -> str:
  target = pathlib.Path(os.path.relpath(path, folder)).as_posix().replace(" ", "%20")
  return f"{'!' if target.lower().endswith(_PICTURES) else ''}[{title}]({target})"
