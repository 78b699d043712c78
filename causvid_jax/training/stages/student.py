"""What the student's two stages share: its step list and how it samples."""

from causvid_jax.diffusion import steps
from causvid_jax.training.stages import latent


class StudentStage(latent.LatentStage):
  """A few-step block-causal student."""

  def __init__(self, config):
    super().__init__(config)
    self.student_steps = config.student_steps if isinstance(config.student_steps, int) else list(config.student_steps)
    self.timesteps = steps.student_timesteps(self.student_steps, config.shift)

  def sampler_settings(self):
    config = self.config
    return {"kind": "student", "schedule": config.schedule, "prediction": config.prediction,
            "steps": self.student_steps, "shift": config.shift, "chunk_frames": config.chunk_frames,
            "sink_frames": config.cache.sink_frames, "window_frames": config.cache.window_frames}
