"""Runs the teacher's ODE on prompts and keeps its states at the student's steps: the data of ODE initialisation.

`python -m causvid_jax.generate_ode --config=configs/ode.py --workdir=runs/trajectories`
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from causvid_jax import errors
from causvid_jax.training import trajectories

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config of the ODE stage; --config.x=y overrides a value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the records (default config.trajectories).")
flags.mark_flag_as_required("config")


def main() -> None:
  config = _CONFIG.value
  trajectories.generate(config, pathlib.Path(_WORKDIR.value or config.trajectories))


if __name__ == "__main__":
  errors.run(main)
