"""ODE pairs: states of the teacher's probability-flow ODE at the student's steps."""

import pathlib

import jax
import ml_collections
import numpy as np
import tqdm

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import captions
from causvid_jax.data import latents as latents_lib
from causvid_jax.data import records
from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import steps
from causvid_jax.sampling import bidirectional
from causvid_jax.training import rng


def solver_timesteps(num_steps: int, shift: float, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The teacher's step list passing exactly through the student's, and the indices of those in it.

  The nearest of the teacher's timesteps gives way to each of the student's, so that what a record says and where its
  state stands are the same number.
  """
  timesteps = steps.inference_timesteps(num_steps, shift)
  indices = np.abs(timesteps[:, None] - student).argmin(axis=0)
  if np.unique(indices).size < student.size:
    raise errors.UserError(f"generate.num_steps = {num_steps} is too coarse for the student's steps {student.tolist()}")
  timesteps[indices] = student
  return timesteps, indices


def generate(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Writes `config.generate.num_trajectories` trajectory records to `folder`, unless they are there already."""
  options = config.generate
  module, params = weights.load(f"{options.teacher}/transformer")
  coding = latents_lib.ClipCoding(config.clip.frames, config.clip.height, config.clip.width, config.chunk_frames,
                                  config.clip.independent_chunks)
  embed = latents_lib.load_embedder(config.text_encoder, config.tokenizer, module.config.text_tokens)
  student = steps.student_timesteps(
      config.student_steps if isinstance(config.student_steps, int) else list(config.student_steps), config.shift)
  timesteps, kept = solver_timesteps(options.num_steps, config.shift, student)
  made_by = {**options.to_dict(), "seed": config.seed, "shift": config.shift, "student_timesteps": student.tolist()}
  if records.finished(folder, made_by):
    return

  denoiser = denoiser_lib.Denoiser(module, schedules.get_schedule(config.schedule), config.prediction)
  sampler = bidirectional.BidirectionalSampler(denoiser, tuple(map(float, timesteps)), options.solver, options.guidance)
  sigmas = np.asarray(denoiser.schedule.alpha_sigma(student)[1])
  null_text = embed([config.negative_prompt])
  shape = coding.latent_shape(weights.load_config(config.vae).config)

  @jax.jit
  def solve(params, key, text):
    noise = jax.random.normal(key, (text.shape[0], *shape))
    return sampler.sample(params, noise, text, null_text, return_trajectory=True)[kept].swapaxes(0, 1)

  with records.RecordWriter(folder, "trajectory", made_by) as writer:
    with tqdm.tqdm(total=options.num_trajectories, desc="teacher trajectories", unit="clip") as bar:
      for first in range(0, options.num_trajectories, options.batch_size):
        prompts = [captions.describe(captions.sample_things(np.random.default_rng((config.seed, i))))
                   for i in range(first, first + options.batch_size)]
        text = embed(prompts)
        states = np.asarray(solve(params, rng.stream_key(config.seed, "trajectories", first), text))
        for i in range(min(options.batch_size, options.num_trajectories - first)):
          writer.write(states[i], sigmas, np.asarray(text[i]), prompts[i])
          bar.update()
