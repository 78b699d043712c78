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


def get_latent_config(stage: str) -> ml_collections.ConfigDict:
  """Adds what the stages that train a transformer on latents share."""
  config = get_config(stage)
  config.model = "digit_world"
  config.vae = "digit_world/vae"
  config.text_encoder = "digit_world/text_encoder"
  config.tokenizer = "tokenizer"
  config.negative_prompt = ""
  config.clip = dict(frames=33, height=64, width=64, fps=8)
  config.schedule = "flow_matching"
  config.prediction = "flow"
  config.shift = 3.0  # 64x64 clips have few dimensions: Wan's 8 at 480p would leave too little to the low noise levels
  config.chunk_frames = 3
  config.cache = dict(sink_frames=3, window_frames=3)  # with the chunk itself as many frames as a training clip has
  config.sampler = dict(num_steps=50, solver="unipc", guidance=3.0)
  return config


def get_student_config(stage: str, variant: str) -> ml_collections.ConfigDict:
  """Adds what the student's two stages share."""
  config = get_latent_config(stage)
  config.student_steps = 4
  if variant:
    raise ValueError(f"configs/{stage}.py has no variant {variant!r}")
  return config
