"""Trains one stage of the method: `python -m causvid_jax.train --config=configs/dmd.py --workdir=runs/dmd`."""

import pathlib

from absl import flags
from ml_collections import config_flags

from causvid_jax import errors
from causvid_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The stage's config, with an optional :variant; --config.x=y overrides a value.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics and export (default runs/<stage>); a run in it continues.")
_RESTART = flags.DEFINE_bool("restart", False, "Begin again in a workdir that holds a run.")
flags.mark_flag_as_required("config")


def main() -> None:
  config = _CONFIG.value
  loop.train(config, pathlib.Path(_WORKDIR.value or f"runs/{config.stage}"), _RESTART.value)


if __name__ == "__main__":
  errors.run(main)
