"""What all stages' configs share: run length, optimiser, logging, and where the built-in world's data goes."""

import ml_collections


def get_config(stage: str) -> ml_collections.ConfigDict:
  """Defaults of a run of `stage` on the built-in world."""
  return ml_collections.ConfigDict(dict(
      stage=stage,
      seed=0,
      num_steps=1000,
      batch_size=32,
      microbatches=1,  # parts of a batch whose gradients are averaged one after the other
      init_from="",
      data_dir="runs/data",
      clips=8000,
      validation_clips=512,
      ema_decay=0.999,
      log_every=20,
      preview_every=0,
      checkpoint_every=500,
      keep_checkpoints=2,
      mesh=dict(fsdp=1),
      optimizer=dict(learning_rate=1e-3, warmup=100, final_lr_ratio=0.05, clip_norm=1.0, b1=0.9, b2=0.99,
                     weight_decay=0.0, max_skipped=20),
  ))
