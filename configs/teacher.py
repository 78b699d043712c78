"""The many-step teacher of the built-in world, bidirectional; `:causal` is the causal teacher of the paper's Table 4.

  python -m causvid_jax.train --config=configs/teacher.py --workdir=runs/teacher
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_latent_config("teacher")
  config.causal = variant == "causal"
  config.text_dropout = 0.1
  config.batch_size, config.num_steps = 32, 2800
  config.microbatches = 4  # on CPUs, parts that fit the cache are faster
  config.ema_decay = 0.998
  config.checkpoint_every = 250
  config.optimizer.learning_rate = 1.5e-3
  if config.causal:
    config.init_from = "digit_world/teacher"
    config.num_steps = 300
  elif variant:
    raise ValueError(f"configs/teacher.py has no variant {variant!r}: expected causal or none")
  return config
