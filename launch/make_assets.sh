#!/usr/bin/env bash
# Remakes everything in causvid_jax/assets from nothing: tokenizer, judge, VAE, text encoder, teacher and both students.
# About two hours on 2 cores. Interrupted, it continues where it was; intermediate runs stay in runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
python="${VENV:-.venv}/bin/python"
assets=causvid_jax/assets

train() {  # train NAME CONFIG [FLAGS...]: trains in runs/NAME
  local name="$1" config="$2"; shift 2
  "$python" -m causvid_jax.train --config="$config" --workdir="runs/$name" "$@"
}
ship() {  # ship RUN NAME COMMAND: puts the run's weights among the assets
  "$python" -m causvid_jax.weights.ship --run="runs/$1" --name="$2" --command="$3"
}

"$python" -c "from causvid_jax.data import tokenizer; tokenizer.build_digit_world('$assets/tokenizer/tokenizer.json')"
"$python" -m causvid_jax.evaluation.train_judge

train text_encoder configs/text_encoder.py
ship text_encoder digit_world/text_encoder "train --config=configs/text_encoder.py"

train vae_images configs/vae.py:images
train vae configs/vae.py --config.init_from=runs/vae_images/export
ship vae digit_world/vae "train --config=configs/vae.py:images, then configs/vae.py"

train teacher_images configs/teacher.py:images
train teacher_chunks configs/teacher.py:chunks
train teacher configs/teacher.py
ship teacher digit_world/teacher "train --config=configs/teacher.py:images, :chunks, then without variant"

"$python" -m causvid_jax.generate_ode --config=configs/ode.py --workdir=runs/trajectories
train ode configs/ode.py
ship ode digit_world/ode "generate_ode --config=configs/ode.py, then train --config=configs/ode.py"

train dmd configs/dmd.py
ship dmd digit_world "train --config=configs/dmd.py"
