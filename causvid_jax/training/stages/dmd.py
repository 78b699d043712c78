"""Stage: asymmetric DMD (paper, Algorithm 1), with separate states for the generator and the fake score."""

from flax import struct

from causvid_jax import weights
from causvid_jax.objectives import dmd as objective
from causvid_jax.training import state as state_lib
from causvid_jax.training.stages import base
from causvid_jax.training.stages import student


class DMDState(struct.PyTreeNode):
  generator: state_lib.TrainState
  fake: state_lib.TrainState


class DMD(student.StudentStage):
  """Every step updates the fake score; every `config.fake_updates`-th also the generator, first.

  Microbatches are parts of one step, so they leave that ratio as it is.
  """

  def __init__(self, config):
    super().__init__(config)
    self.teacher_module, teacher_params = weights.load(f"{config.teacher}/transformer")
    self.frozen = {"teacher": teacher_params, "null_text": self.null_text}
    self.options = objective.Options(
        timesteps=tuple(map(float, self.timesteps)), chunk_frames=config.chunk_frames,
        teacher_chunk_frames=config.chunk_frames if config.causal_teacher else None, guidance=config.guidance,
        shift=config.shift, min_t=config.min_t, max_t=config.max_t)
    self.fake_optimizer = state_lib.create_optimizer(config.fake_optimizer, config.num_steps)
    self.generator_optimizer = state_lib.create_optimizer(config.optimizer, config.num_steps // config.fake_updates)

  def pretrained(self):
    return {"generator": super().pretrained(), "teacher": self.frozen["teacher"]}

  def init(self, key, pretrained):
    generator = state_lib.create(
        base.initial_params(self.module, key, pretrained["generator"]), self.generator_optimizer, with_ema=True)
    # The fake score starts as the teacher: it then already is a score, and of about the right distribution.
    fake = base.initial_params(self.teacher_module, key, pretrained["teacher"])
    return DMDState(generator, state_lib.create(fake, self.fake_optimizer))

  def phase(self, step):
    return "both" if step % self.config.fake_updates == 0 else "fake"

  def step(self, state, frozen, batch, key, phase):
    generator, metrics = state.generator, {}
    teacher = self.denoiser(self.teacher_module)
    if phase == "both":
      def generator_loss(params, batch, key):
        return objective.generator_loss(
            self.denoiser(), params, teacher, frozen["teacher"], teacher, state.fake.params, batch["latents"],
            batch["text"], frozen["null_text"], key, self.options)

      grads, losses = state_lib.gradients(generator_loss, generator.params, batch, key, self.config.microbatches)
      generator, more = state_lib.update(generator, grads, self.generator_optimizer, self.config.ema_decay)
      metrics = losses | {f"generator_{name}": value for name, value in more.items()}

    def fake_loss(params, batch, key):
      return objective.fake_loss(self.denoiser(), generator.params, teacher, params, batch["latents"], batch["text"],
                                 key, self.options)

    grads, losses = state_lib.gradients(fake_loss, state.fake.params, batch, key, self.config.microbatches)
    fake, more = state_lib.update(state.fake, grads, self.fake_optimizer)
    metrics |= losses | more
    skipped = metrics.pop("generator_skipped", 0) + metrics["skipped"]
    return DMDState(generator, fake), metrics | {"skipped": skipped}

  def exported(self, state):
    return state.generator.ema
