"""Samplers from their settings, as `pipeline.json` keeps them beside a transformer."""

from typing import Any

from causvid_jax import errors
from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import steps
from causvid_jax.sampling import bidirectional
from causvid_jax.sampling import causal

Sampler = bidirectional.BidirectionalSampler | causal.CausalSampler


def sampler(module: Any, settings: dict[str, Any]) -> Sampler:
  """The sampler of a transformer.

  `settings` holds `schedule`, `prediction` and `kind`: "student" (steps, shift, chunk_frames, sink_frames,
  window_frames), "teacher" (num_steps, shift, solver, guidance) or "causal_teacher" (all but steps).
  """
  denoiser = denoiser_lib.Denoiser(module, schedules.get_schedule(settings["schedule"]), settings["prediction"])
  kind, shift = settings["kind"], settings["shift"]
  cache = {name: settings[name] for name in ("chunk_frames", "sink_frames", "window_frames") if name in settings}
  if kind == "student":
    return causal.CausalSampler(denoiser, tuple(map(float, steps.student_timesteps(settings["steps"], shift))), **cache)
  timesteps = tuple(map(float, steps.inference_timesteps(settings["num_steps"], shift)))
  ode = {"solver": settings["solver"], "guidance": settings["guidance"]}
  if kind == "teacher":
    return bidirectional.BidirectionalSampler(denoiser, timesteps, **ode)
  if kind == "causal_teacher":
    return causal.CausalTeacherSampler(denoiser, timesteps, **cache, **ode)
  raise errors.UserError(f"unknown kind of sampler {kind!r}: expected student, teacher or causal_teacher")
