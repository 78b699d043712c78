#!/usr/bin/env bash
# The method, end to end, on the built-in world: trajectories -> ODE initialisation -> DMD -> streamed videos -> report.
# Everything goes to runs/demo. Run it again to continue what was interrupted; with --fresh it begins anew.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/demo
case "${1:-}" in
  "") ;;
  --fresh) rm -rf "$out" ;;
  *) echo "error: unknown argument '$1': expected --fresh or nothing" >&2; exit 2 ;;
esac
launch/setup.sh
python="${VENV:-.venv}/bin/python"

run() { echo; echo "== $1"; shift; "$python" -m "$@"; }

run "1/6 trajectories of the teacher" causvid_jax.generate_ode --config=configs/ode.py:demo --workdir="$out/trajectories"
run "2/6 the starting point: the teacher's weights, sampled as a student" causvid_jax.train \
  --config=configs/ode.py:demo --workdir="$out/start" --config.num_steps=0
run "3/6 ODE initialisation" causvid_jax.train --config=configs/ode.py:demo --workdir="$out/ode"
run "4/6 asymmetric DMD" causvid_jax.train --config=configs/dmd.py:demo --workdir="$out/dmd"
run "5/6 samples and report" causvid_jax.evaluate --output="$out" --num_prompts=32 \
  --checkpoint=start="$out/start/export" --checkpoint=ode="$out/ode/export" --checkpoint=student="$out/dmd/export" \
  --checkpoint=teacher=digit_world/teacher --long=student --curves=ode="$out/ode" --curves=dmd="$out/dmd"
run "6/6 speed" causvid_jax.benchmark --student="$out/dmd/export"
echo
echo "The report: $out/report.md"
