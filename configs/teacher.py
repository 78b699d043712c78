"""The many-step teacher, on ever longer beginnings of the clips: single latent frames, a chunk, the whole clip.

  python -m causvid_jax.train --config=configs/teacher.py:images --workdir=runs/teacher_images
  python -m causvid_jax.train --config=configs/teacher.py:chunks --workdir=runs/teacher_chunks
  python -m causvid_jax.train --config=configs/teacher.py --workdir=runs/teacher

Shapes and colours are learned on images, nine times cheaper than on clips. `:causal` is the causal teacher of the
paper's Table 4, trained from the bidirectional one.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  small = variant in ("images", "chunks", "causal", "")
  config = common.get_latent_config("teacher", "" if small else variant)
  config.causal = variant == "causal"
  config.text_dropout = 0.1
  config.train_frames = config.chunk_frames if variant == "chunks" else 1 if variant == "images" else 0  # 0: all
  if small:
    config.ema_decay = 0.998
    config.checkpoint_every = 250
    config.microbatches = 4  # on CPUs, parts that fit the cache are faster
  if variant == "images":
    config.batch_size, config.num_steps = 128, 1500
    config.optimizer.learning_rate = 2e-3
  elif variant == "chunks":
    config.init_from = "runs/teacher_images/export"
    config.batch_size, config.num_steps = 64, 900
    config.optimizer.learning_rate = 1.5e-3
  elif variant == "":
    config.init_from = "runs/teacher_chunks/export"
    config.batch_size, config.num_steps = 32, 5000
    config.optimizer.learning_rate = 1e-3
  elif variant == "causal":
    config.init_from = "digit_world/teacher"
    config.batch_size, config.num_steps = 32, 300
    config.optimizer.learning_rate = 5e-4
  return config
