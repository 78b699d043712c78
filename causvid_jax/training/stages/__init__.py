"""The stages of the method, a class each: what is trained, on which examples, by which objective, and what it leaves.

The loop knows only the interface of `base.Stage`.
"""

import ml_collections

from causvid_jax import errors
from causvid_jax.training.stages import base
from causvid_jax.training.stages import dmd
from causvid_jax.training.stages import ode
from causvid_jax.training.stages import teacher
from causvid_jax.training.stages import text
from causvid_jax.training.stages import vae

_STAGES = {"vae": vae.VAE, "text_encoder": text.Text, "teacher": teacher.Teacher, "ode": ode.ODE, "dmd": dmd.DMD}


def create(config: ml_collections.ConfigDict) -> base.Stage:
  """The stage that `config.stage` names."""
  if config.stage not in _STAGES:
    raise errors.UserError(f"unknown stage {config.stage!r}: expected one of {', '.join(_STAGES)}")
  return _STAGES[config.stage](config)
