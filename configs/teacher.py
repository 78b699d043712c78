"""The many-step teacher; `:causal` is the causal teacher of the paper's Table 4, trained from the bidirectional one.

  python -m causvid_jax.train --config=configs/teacher.py --workdir=runs/teacher
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_latent_config("teacher", "" if variant == "causal" else variant)
  config.causal = variant == "causal"
  config.text_dropout = 0.1
  if variant in ("", "causal"):
    config.batch_size, config.num_steps = 32, 2000
    config.microbatches = 4  # on CPUs, parts that fit the cache are faster
    config.ema_decay = 0.998
    config.checkpoint_every = 250
    config.optimizer.learning_rate = 1.5e-3
  if config.causal:
    config.init_from = "digit_world/teacher"
    config.num_steps = 300
    config.optimizer.learning_rate = 5e-4
  return config
