"""Asymmetric DMD: distils the teacher into the causal student.

  python -m causvid_jax.train --config=configs/dmd.py --workdir=runs/dmd --config.init_from=runs/ode/export

Without `init_from` it starts from the ODE-initialised student that ships.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_student_config("dmd", variant)
  config.init_from = "digit_world/ode"
  config.teacher = "digit_world/teacher"
  config.causal_teacher = False  # True scores with a causal teacher: an ablation of the paper's Table 4
  config.guidance = 3.0
  config.fake_updates = 5
  config.min_t, config.max_t = 20.0, 980.0
  config.batch_size, config.num_steps = 16, 2000
  config.ema_decay = 0.95
  config.optimizer.update(learning_rate=1e-4, warmup=5, b1=0.0)
  config.fake_optimizer = config.optimizer.copy_and_resolve_references()
  config.fake_optimizer.learning_rate = 3e-4
  return config
