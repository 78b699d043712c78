"""The built-in world's VAE.

  python -m causvid_jax.train --config=configs/vae.py:images --workdir=runs/vae_images
  python -m causvid_jax.train --config=configs/vae.py --workdir=runs/vae --config.init_from=runs/vae_images/export

It learns to code single frames first (its video layers begin as image layers), which is many times cheaper, and then
clips. Expected: reconstruction of held-out clips above 30 dB.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  config = common.get_config("vae")
  config.model = "digit_world"
  config.frames, config.crop, config.crop_candidates = 9, 32, 3
  config.batch_size, config.num_steps = 8, 2400
  config.kl_weight = 3e-6
  config.ema_decay = 0.995
  config.optimizer.learning_rate = 2e-3
  if variant == "images":
    config.frames, config.batch_size, config.num_steps = 1, 32, 1200
    config.optimizer.learning_rate = 3e-3
  elif variant:
    raise ValueError(f"configs/vae.py has no variant {variant!r}: expected images or none")
  return config
