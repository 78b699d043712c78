#!/usr/bin/env bash
# Runs one stage on a TPU VM with one host (v5e-8, v6e-8, ...):
#   launch/tpu.sh NAME ZONE -- --config=configs/dmd.py:wan_1_3b --workdir=gs://bucket/dmd
# NAME is a TPU VM that exists (gcloud compute tpus tpu-vm create ...). The host clones the commit checked out here.
set -euo pipefail
if [ $# -lt 4 ] || [ "$3" != "--" ]; then
  echo "error: usage: launch/tpu.sh NAME ZONE -- FLAGS of causvid_jax.train" >&2
  exit 2
fi
name="$1" zone="$2"; shift 3
commit="$(git rev-parse HEAD)" origin="$(git remote get-url origin)"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="
  set -e
  [ -d causvid_jax_repo ] || git clone '$origin' causvid_jax_repo
  cd causvid_jax_repo && git fetch -q && git checkout -q '$commit'
  launch/setup.sh tpu
  .venv/bin/python -m causvid_jax.train $(printf '%q ' "$@")"
