"""Asymmetric distribution matching distillation: a causal student under bidirectional scores (paper, Algorithm 1).

The student's few-step samples are pushed along the difference of two scores: the teacher's, of the data, and the fake
score's, of the student's own samples, which is trained beside it at a faster time scale (five updates to one).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import schedules
from causvid_jax.objectives import flow_matching
from causvid_jax.objectives import ode

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
  """What both losses need.

  Attributes:
    timesteps: the student's steps, decreasing, ending in 0.
    chunk_frames: latent frames a chunk of the student.
    teacher_chunk_frames: None for the paper's bidirectional scores; `chunk_frames` for causal ones (Table 4).
    guidance: scale of the teacher's classifier-free guidance, in the usual form.
    shift: of the scores' timesteps.
    min_t: lower clamp of the scores' timesteps.
    max_t: upper clamp.
  """
  timesteps: tuple[float, ...]
  chunk_frames: int
  teacher_chunk_frames: int | None = None
  guidance: float = 4.5
  shift: float = 8.0
  min_t: float = 20.0
  max_t: float = 980.0


def student_samples(student: denoiser_lib.Denoiser, params: Any, x0: jax.Array, text: jax.Array, key: jax.Array,
                    options: Options) -> jax.Array:
  """The student's prediction of a clean clip [B, F, H, W, C], each chunk of `x0` noised to its own step (lines 4 to 7)."""
  step_key, noise_key = jax.random.split(key)
  timesteps = jnp.asarray(options.timesteps, jnp.float32)
  chosen = ode.sample_chunk_steps(step_key, *x0.shape[:2], options.chunk_frames, timesteps.size)
  t = timesteps[chosen]
  x_t = schedules.add_noise(student.schedule, x0, jax.random.normal(noise_key, x0.shape), t)
  return student.x0(params, x_t, t, text, options.chunk_frames)


def _score_timesteps(key: jax.Array, samples: jax.Array, options: Options) -> jax.Array:
  """One t a clip, whatever the student's chunks were at (line 8)."""
  return flow_matching.sample_timesteps(
      key, *samples.shape[:2], options.shift, low=options.min_t, high=options.max_t)


def dmd_gradient(teacher: denoiser_lib.Denoiser, teacher_params: Any, fake: denoiser_lib.Denoiser, fake_params: Any,
                 samples: jax.Array, text: jax.Array, null_text: jax.Array, key: jax.Array,
                 options: Options) -> jax.Array:
  """The direction in which the fake distribution exceeds the data's, at `samples` [B, F, H, W, C] (eq. 4).

  Written through the two predictions of x_0, (x_0^fake - x_0^real) / mean |x_0^hat - x_0^real|, the mean over each
  sample: the weight of DMD2 (arXiv 2405.14867), under which all noise levels push alike.
  """
  time_key, noise_key = jax.random.split(key)
  t = _score_timesteps(time_key, samples, options)
  x_t = schedules.add_noise(teacher.schedule, samples, jax.random.normal(noise_key, samples.shape), t)
  real = teacher.guided_x0(
      teacher_params, x_t, t, text, null_text, options.guidance, options.teacher_chunk_frames)
  generated = fake.x0(fake_params, x_t, t, text, options.teacher_chunk_frames)
  scale = jnp.mean(jnp.abs(samples - real), axis=(1, 2, 3, 4), keepdims=True)
  return jnp.nan_to_num((generated - real) / jnp.maximum(scale, 1e-6))


def generator_loss(student: denoiser_lib.Denoiser, params: Any, teacher: denoiser_lib.Denoiser, teacher_params: Any,
                   fake: denoiser_lib.Denoiser, fake_params: Any, x0: jax.Array, text: jax.Array,
                   null_text: jax.Array, key: jax.Array, options: Options) -> tuple[jax.Array, Metrics]:
  """A loss whose gradient with respect to the student's samples is the DMD gradient, averaged (lines 4 to 11)."""
  sample_key, score_key = jax.random.split(key)
  samples = student_samples(student, params, x0, text, sample_key, options)
  grad = dmd_gradient(teacher, teacher_params, fake, fake_params, jax.lax.stop_gradient(samples), text, null_text,
                      score_key, options)
  loss = 0.5 * jnp.mean(jnp.square(samples - jax.lax.stop_gradient(samples - grad)))
  return loss, {"dmd_loss": loss, "dmd_gradient": jnp.mean(jnp.abs(grad))}


def fake_loss(student: denoiser_lib.Denoiser, params: Any, fake: denoiser_lib.Denoiser, fake_params: Any,
              x0: jax.Array, text: jax.Array, key: jax.Array, options: Options) -> tuple[jax.Array, Metrics]:
  """The fake score's denoising loss on the student's own samples, with a new t and new noise (lines 12 to 15)."""
  sample_key, time_key, noise_key = jax.random.split(key, 3)
  samples = jax.lax.stop_gradient(student_samples(student, params, x0, text, sample_key, options))
  t = _score_timesteps(time_key, samples, options)
  loss, _ = flow_matching.denoising_loss(
      fake, fake_params, samples, text, t, noise_key, options.teacher_chunk_frames)
  return loss, {"fake_loss": loss}
