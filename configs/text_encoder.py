"""The built-in world's text encoder.

  python -m causvid_jax.train --config=configs/text_encoder.py --workdir=runs/text_encoder

Expected: context accuracy above 99.8 % within a minute.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant:
    raise ValueError(f"configs/text_encoder.py has no variant {variant!r}: expected none")
  config = common.get_config("text_encoder")
  config.model = "digit_world"
  config.tokenizer = "tokenizer"
  config.text_tokens = 24
  config.batch_size, config.num_steps = 64, 800
  config.optimizer.learning_rate = 3e-3
  return config
