"""Stage: ODE initialisation of the student from the teacher's trajectories (paper, section 4.3)."""

import functools

import numpy as np

from causvid_jax.data import records
from causvid_jax.objectives import ode as objective
from causvid_jax.training import state as state_lib
from causvid_jax.training.stages import base
from causvid_jax.training.stages import student


class ODE(student.StudentStage):

  @functools.cached_property
  def source(self):
    source = records.RecordSource(self.config.trajectories, "trajectory")
    records.require_sigmas(source, np.asarray(self.denoiser().schedule.alpha_sigma(self.timesteps)[1]))
    return source

  def init(self, key, pretrained):
    return state_lib.create(base.initial_params(self.module, key, pretrained), self.optimizer, with_ema=True)

  def step(self, state, frozen, batch, key, phase):
    def loss(params, batch, key):
      return objective.ode_loss(self.denoiser(), params, batch["latents"], batch["text"], key,
                                timesteps=self.timesteps, chunk_frames=self.config.chunk_frames)

    grads, metrics = state_lib.gradients(loss, state.params, batch, key, self.config.microbatches)
    state, more = state_lib.update(state, grads, self.optimizer, self.config.ema_decay)
    return state, metrics | more
