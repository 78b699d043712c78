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


def get_latent_config(stage: str, variant: str = "") -> ml_collections.ConfigDict:
  """Adds what the stages that train a transformer on latents share.

  Variants: none, the built-in world; `demo`, less of it; `paper`, the setting of arXiv 2412.07772, section 5, on its
  own architecture's scale (1.3B); `wan_1_3b` and `wan_14b`, Wan 2.1 at 480p. Full sizes read weights from `weights/`
  and latent records from `data/`.
  """
  config = get_config(stage)
  config.model = "digit_world"
  config.vae = "digit_world/vae"
  config.text_encoder = "digit_world/text_encoder"
  config.tokenizer = "tokenizer"
  config.negative_prompt = ""
  config.latents = ""
  config.preview_every = 400
  config.clip = dict(frames=33, height=64, width=64, fps=8, independent_chunks=False)
  config.schedule = "flow_matching"
  config.prediction = "flow"
  config.shift = 3.0  # 64x64 clips have few dimensions: Wan's 8 at 480p would leave too little to the low noise levels
  config.chunk_frames = 3
  config.cache = dict(sink_frames=3, window_frames=3)  # with the chunk itself as many frames as a training clip has
  config.sampler = dict(num_steps=50, solver="unipc", guidance=3.0)
  if variant == "demo":
    config.clips, config.validation_clips = 800, 16
    config.data_dir = "runs/demo/data"
  elif variant in ("wan_1_3b", "wan_14b", "paper"):
    _full_size(config, "wan_1_3b" if variant == "paper" else variant)
    if variant == "paper":
      _paper(config)
  elif variant:
    raise ValueError(f"no variant {variant!r} of the {stage} config: expected demo, paper, wan_1_3b, wan_14b, none, or"
                     f" another that configs/{stage}.py names")
  return config


def _full_size(config: ml_collections.ConfigDict, model: str) -> None:
  """Wan 2.1 at 832x480, 81 frames: 21 latent frames in 7 chunks."""
  config.model = model
  config.vae = f"weights/{model}/vae"
  config.text_encoder = f"weights/{model}/text_encoder"
  config.tokenizer = f"weights/{model}/tokenizer"
  config.latents = "data/latents"
  config.clip = dict(frames=81, height=480, width=832, fps=16, independent_chunks=False)
  config.shift = 8.0
  config.cache = dict(sink_frames=3, window_frames=15)
  config.sampler.guidance = 6.0
  config.batch_size, config.microbatches = 64, 1
  config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.final_lr_ratio = 5e-6, 0, 1.0
  config.mesh.fsdp = 8


def _paper(config: ml_collections.ConfigDict) -> None:
  """352x640 at 12 fps, chunks of 5 latent frames that the VAE codes on their own, variance-preserving, v-prediction."""
  config.clip = dict(frames=119, height=352, width=640, fps=12, independent_chunks=True)
  config.chunk_frames = 5
  config.cache = dict(sink_frames=5, window_frames=25)
  config.schedule, config.prediction, config.shift = "variance_preserving", "v", 1.0
  config.sampler.guidance = 3.5


def get_student_config(stage: str, variant: str = "") -> ml_collections.ConfigDict:
  """Adds what the student's two stages share."""
  config = get_latent_config(stage, variant)
  config.student_steps = (999, 748, 502, 247) if variant == "paper" else 4
  return config
