#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) and installs the package into it: launch/setup.sh [EXTRAS]
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -e ".${1:+[$1]}"
