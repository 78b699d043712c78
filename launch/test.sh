#!/usr/bin/env bash
# Sets up the environment and runs the whole suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
JAX_PLATFORMS=cpu exec "${VENV:-.venv}/bin/python" -m pytest -q "$@"
