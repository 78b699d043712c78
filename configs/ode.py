"""ODE initialisation: the teacher's trajectories, and the student's regression onto their ends.

  python -m causvid_jax.generate_ode --config=configs/ode.py --workdir=runs/trajectories
  python -m causvid_jax.train --config=configs/ode.py --workdir=runs/ode

Variants: see `common.get_latent_config`.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_student_config("ode", variant)
  config.trajectories = "runs/demo/trajectories" if variant == "demo" else "runs/trajectories"
  config.init_from = "digit_world/teacher"
  config.generate = dict(  # how `generate_ode` makes the trajectories
      teacher="digit_world/teacher", num_trajectories=512, batch_size=16, num_steps=50, solver="euler", guidance=3.0)
  if variant in ("", "demo"):
    config.batch_size, config.num_steps = 16, 1200
    config.microbatches = 2
    config.ema_decay = 0.99
    config.optimizer.learning_rate = 5e-4
  if variant == "demo":
    config.generate.num_trajectories = 128
    config.num_steps = 300
    config.ema_decay = 0.98
  elif variant:
    config.init_from = config.generate.teacher = f"weights/{config.model}"
    config.generate.num_trajectories = 1000
    config.generate.guidance = config.sampler.guidance
    config.num_steps = 3000
  return config
