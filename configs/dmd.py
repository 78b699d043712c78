"""Asymmetric DMD: distils the teacher into the causal student.

  python -m causvid_jax.train --config=configs/dmd.py --workdir=runs/dmd --config.init_from=runs/ode/export

Without `init_from` it starts from the ODE-initialised student that ships. The paper's Table 4: `causal_teacher` scores
with a causal teacher (give its pipeline as `teacher`), and `init_from` is the teacher's own pipeline where there is no
ODE initialisation. Variants: see `common.get_latent_config`.
"""

import ml_collections

from causvid_jax.diffusion import guidance
from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_student_config("dmd", variant)
  config.init_from = "digit_world/ode"
  config.teacher = "digit_world/teacher"
  config.causal_teacher = False
  config.guidance = 3.0  # in the usual form uncond + scale (cond - uncond)
  config.fake_updates = 5
  config.min_t, config.max_t = 20.0, 980.0
  if variant in ("", "demo"):
    config.batch_size, config.num_steps = 16, 300
    config.microbatches = 2
    config.ema_decay = 0.98
    config.guidance = 2.0  # a run with 3, twice the rate and 1,000 steps lost 15 points of colour
    config.optimizer.update(learning_rate=5e-5, warmup=5, b1=0.0)
  if variant == "demo":
    config.init_from = "runs/demo/ode/export"
    config.ema_decay = 0.95
  elif variant:
    config.init_from, config.teacher = "runs/ode/export", f"weights/{config.model}"
    config.num_steps = 30_000  # 6,000 updates of the generator
    config.optimizer.learning_rate = 2e-6
    config.guidance = guidance.scale_from_authors(3.5)
  config.fake_optimizer = config.optimizer.copy_and_resolve_references()
  if variant in ("", "demo"):
    config.fake_optimizer.learning_rate = 3e-4
  return config
