"""Where weights come from: the code, the machine and the versions that made them."""

import os
import pathlib
import platform
import subprocess
from typing import Any

import jax


def environment() -> dict[str, Any]:
  """This process's commit ("unknown" outside a clone), hardware and versions."""
  git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
                       check=False)
  return {
      "commit": git.stdout.strip() or "unknown",
      "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} x {jax.devices()[0].device_kind}",
      "versions": {"jax": jax.__version__, "python": platform.python_version()},
  }
