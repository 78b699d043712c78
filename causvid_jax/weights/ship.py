"""Puts finished weights among what ships, in half precision, with a provenance file beside them.

`python -m causvid_jax.weights.ship --run=runs/vae --name=digit_world/vae --command="..." [--report=metrics.json]`
"""

import json
import pathlib
import platform
import shutil
import subprocess

from absl import flags
import jax

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.weights import store

_RUN = flags.DEFINE_string("run", None, "Workdir of the finished run.", required=True)
_NAME = flags.DEFINE_string("name", None, "Name among what ships, such as digit_world/vae.", required=True)
_COMMAND = flags.DEFINE_string("command", None, "The command that made the run.", required=True)
_REPORT = flags.DEFINE_string("report", None, "JSON file with measured results to record.")


def main() -> None:
  run, folder = pathlib.Path(_RUN.value), store.ASSETS / _NAME.value
  source = run / "export"
  folder.mkdir(parents=True, exist_ok=True)
  if (source / "pipeline.json").exists():
    weights.save(folder / "transformer", *weights.load(source / "transformer"), dtype="float16")
    shutil.copy(source / "pipeline.json", folder / "pipeline.json")
  else:
    weights.save(folder, *weights.load(source), dtype="float16")
  (folder / "provenance.json").write_text(json.dumps(provenance(run), indent=2) + "\n")


def provenance(run: pathlib.Path) -> dict:
  """Where the weights of a run come from, from what the run left behind."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  config = json.loads((run / "config.json").read_text())
  git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()
  result = {
      "command": _COMMAND.value,
      "commit": git("rev-parse", "HEAD"),
      "seed": config["seed"],
      "steps": lines[-1]["step"],
      "hours": round(sum(_seconds(lines)) / 3600, 3),
      "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.processor() or platform.machine()})",
      "versions": {"jax": jax.__version__, "python": platform.python_version()},
      "training_metrics": {k: round(v, 5) for k, v in lines[-1].items() if k not in ("step", "steps_per_second")},
  }
  if _REPORT.value:
    result["measured"] = json.loads(pathlib.Path(_REPORT.value).read_text())
  return result


def _seconds(lines: list[dict]) -> list[float]:
  """Seconds between logged lines, from the speed that each records."""
  steps = [0, *(line["step"] for line in lines)]
  return [(b - a) / line["steps_per_second"] for a, b, line in zip(steps, steps[1:], lines)]


if __name__ == "__main__":
  errors.run(main)
