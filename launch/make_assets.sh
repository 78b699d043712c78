#!/usr/bin/env bash
# Remakes everything in causvid_jax/assets from nothing: tokenizer, judge, VAE, text encoder, teacher and both students.
# About four hours on 2 cores. Interrupted, it continues where it was; intermediate runs stay in runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
python="${VENV:-.venv}/bin/python"
assets=causvid_jax/assets

train() {  # train NAME CONFIG [FLAGS...]: trains in runs/NAME
  local name="$1" config="$2"; shift 2
  "$python" -m causvid_jax.train --config="$config" --workdir="runs/$name" "$@"
}
ship() {  # ship NAME RUN...: puts the last run's weights among the assets
  local name="$1"; shift
  "$python" -m causvid_jax.weights.ship --name="$name" "${@/#/--run=runs/}"
}

"$python" -c "from causvid_jax.data import tokenizer; tokenizer.build_digit_world('$assets/tokenizer/tokenizer.json')"
"$python" -m causvid_jax.evaluation.train_judge

train text_encoder configs/text_encoder.py
ship digit_world/text_encoder text_encoder

train vae_images configs/vae.py:images
train vae configs/vae.py --config.init_from=runs/vae_images/export
ship digit_world/vae vae_images vae

train teacher_images configs/teacher.py:images
train teacher_chunks configs/teacher.py:chunks
train teacher_first configs/teacher.py --config.num_steps=800
train teacher configs/teacher.py --config.init_from=runs/teacher_first/export
ship digit_world/teacher teacher_images teacher_chunks teacher_first teacher

"$python" -m causvid_jax.generate_ode --config=configs/ode.py --workdir=runs/trajectories
train ode configs/ode.py
ship digit_world/ode ode

train dmd configs/dmd.py
ship digit_world dmd
