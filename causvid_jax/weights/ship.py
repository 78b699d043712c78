"""Puts finished weights among what ships, in half precision, with a provenance file beside them.

`python -m causvid_jax.weights.ship --run=runs/vae_images --run=runs/vae --name=digit_world/vae`
"""

import json
import pathlib
import shutil

from absl import flags

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.weights import store

_RUNS = flags.DEFINE_multi_string(
    "run", None, "Workdirs of the runs that led to the weights, in order; the last one's are shipped.", required=True)
_NAME = flags.DEFINE_string("name", None, "Name among what ships, such as digit_world/vae.", required=True)


def main() -> None:
  runs, folder = [pathlib.Path(run) for run in _RUNS.value], store.ASSETS / _NAME.value
  source = runs[-1] / "export"
  folder.mkdir(parents=True, exist_ok=True)
  if (source / "pipeline.json").exists():
    weights.save(folder / "transformer", *weights.load(source / "transformer"), dtype="float16")
    shutil.copy(source / "pipeline.json", folder / "pipeline.json")
  else:
    weights.save(folder, *weights.load(source), dtype="float16")
  provenance = {"script": "launch/make_assets.sh", "runs": {run.name: describe(run) for run in runs}}
  (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def describe(run: pathlib.Path) -> dict:
  """What a run left behind of how it was made."""
  config = json.loads((run / "config.json").read_text())
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  last = {name: round(value, 5) for name, value in lines[-1].items() if name not in ("step", "steps_per_second")}
  return {"config": f"configs/{config['stage']}.py", "seed": config["seed"], "batch_size": config["batch_size"],
          "steps": lines[-1]["step"], "hours": round(sum(_seconds(lines)) / 3600, 3), "last_metrics": last,
          **json.loads((run / "environment.json").read_text())}


def _seconds(lines: list[dict]) -> list[float]:
  """Seconds between logged lines, from the speed that each records."""
  steps = [0, *(line["step"] for line in lines)]
  return [(b - a) / line["steps_per_second"] for a, b, line in zip(steps, steps[1:], lines)]


if __name__ == "__main__":
  errors.run(main)
