"""Stage: the many-step teacher, bidirectional, or causal with `config.causal` (an ablation of the paper's Table 4)."""

from causvid_jax.objectives import flow_matching
from causvid_jax.training import state as state_lib
from causvid_jax.training.stages import base
from causvid_jax.training.stages import latent


class Teacher(latent.LatentStage):

  def __init__(self, config):
    super().__init__(config)
    self.frozen = {"null_text": self.null_text}
    self.chunk_frames = config.chunk_frames if config.causal else None

  def transform(self, example, rng):
    arrays = super().transform(example, rng)
    frames = self.config.train_frames or len(arrays["latents"])
    return arrays | {"latents": arrays["latents"][:frames]}

  def init(self, key, pretrained):
    return state_lib.create(base.initial_params(self.module, key, pretrained), self.optimizer, with_ema=True)

  def step(self, state, frozen, batch, key, phase):
    def loss(params, batch, key):
      return flow_matching.teacher_loss(
          self.denoiser(), params, batch["latents"], batch["text"], frozen["null_text"], key,
          shift=self.config.shift, text_dropout=self.config.text_dropout, chunk_frames=self.chunk_frames)

    grads, metrics = state_lib.gradients(loss, state.params, batch, key, self.config.microbatches)
    state, more = state_lib.update(state, grads, self.optimizer, self.config.ema_decay)
    return state, metrics | more

  def sampler_settings(self):
    config = self.config
    settings = {"kind": "teacher", "schedule": config.schedule, "prediction": config.prediction,
                "num_steps": config.sampler.num_steps, "shift": config.shift, "solver": config.sampler.solver,
                "guidance": config.sampler.guidance}
    if not config.causal:
      return settings
    return settings | {"kind": "causal_teacher", "chunk_frames": config.chunk_frames,
                       "sink_frames": config.cache.sink_frames, "window_frames": config.cache.window_frames}
