"""Causal models: one pure step a chunk on an explicit KV cache, under `lax.scan` or in a stream (paper, Algorithm 2).

A chunk is a pure function of (parameters, cache, prompt, key); scan, stream and rollout all call `step`, with the same
key for the same chunk, so they agree.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.diffusion import denoiser as denoiser_lib
from causvid_jax.diffusion import guidance
from causvid_jax.diffusion import schedules
from causvid_jax.diffusion import solvers
from causvid_jax.models import kv_cache


@dataclasses.dataclass(frozen=True)
class CausalSampler:
  """Few-step sampling of a distilled student.

  Attributes:
    denoiser: the student.
    timesteps: its steps, decreasing, ending in 0: the last pass, at t = 0, is the one whose keys and values are kept.
    chunk_frames: latent frames k a chunk.
    sink_frames: first frames that are attended for ever.
    window_frames: last frames that are attended.
  """
  denoiser: denoiser_lib.Denoiser
  timesteps: tuple[float, ...]
  chunk_frames: int
  sink_frames: int
  window_frames: int
  guided: ClassVar[bool] = False  # the guidance is distilled into the student, and no null prompt is needed

  def start(self, params: Any, text: jax.Array, null_text: jax.Array,
            frame_shape: tuple[int, int, int]) -> tuple[kv_cache.KVCache, kv_cache.TextKV]:
    """An empty cache for latent frames of shape [H, W, C], and the keys and values of text [B, T, D]."""
    text_kv = self.text_kv(params, text, null_text)
    config = self.denoiser.module.config
    tokens = config.tokens_per_frame(*frame_shape[:2])
    return kv_cache.create(config, text_kv.k.shape[1], tokens, self.sink_frames, self.window_frames), text_kv

  def text_kv(self, params: Any, text: jax.Array, null_text: jax.Array) -> kv_cache.TextKV:
    """The keys and values of text [B, T, D]."""
    del null_text
    return self.denoiser.module.apply({"params": params}, text, method="encode_text")

  def write(self, params: Any, cache: kv_cache.KVCache, text_kv: kv_cache.TextKV, x0: jax.Array) -> kv_cache.KVCache:
    """The cache after clean frames x0 [B, F, H, W, C] that were not generated here; donate the cache."""
    timesteps = jnp.zeros(x0.shape[:2], jnp.float32)
    return kv_cache.write(cache, _extend(self.denoiser, params, x0, timesteps, text_kv, cache)[1])

  def step(self, params: Any, cache: kv_cache.KVCache, text_kv: kv_cache.TextKV, key: jax.Array, x0: jax.Array,
           timesteps: jax.Array | None = None) -> tuple[kv_cache.KVCache, jax.Array]:
    """Generates the next chunk and writes it to the cache.

    Every pass noises the current estimate afresh to the next t and predicts again. At t = 0 this leaves the estimate as it
    is and yields the clean keys and values.

    Args:
      params: the student's.
      cache: the past; donate it.
      text_kv: the prompt.
      key: of this chunk's noise.
      x0: [B, k, H, W, C] the estimate to start from: without a source video zeros, which the first t hides.
      timesteps: of the passes [S], decreasing and ending in 0; default all of the student's. A source video is kept the
        better, the lower the first.

    Returns:
      The cache with the chunk, and the chunk's clean latents.
    """
    def one_pass(carry, inputs):
      x0, _ = carry
      t, key = inputs
      timesteps = jnp.broadcast_to(t, x0.shape[:2])
      x_t = schedules.add_noise(self.denoiser.schedule, x0, jax.random.normal(key, x0.shape), timesteps)
      return _extend(self.denoiser, params, x_t, timesteps, text_kv, cache), None

    timesteps = jnp.asarray(self.timesteps if timesteps is None else timesteps, jnp.float32)
    _, kv = jax.eval_shape(lambda: one_pass((x0, None), (timesteps[0], key))[0])
    carry = (x0, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kv))
    (x0, kv), _ = jax.lax.scan(one_pass, carry, (timesteps, jax.random.split(key, timesteps.size)))
    return kv_cache.write(cache, kv), x0

  def sample(self, params: Any, text: jax.Array, null_text: jax.Array, key: jax.Array, num_chunks: int,
             frame_shape: tuple[int, int, int]) -> jax.Array:
    """Latents [B, num_chunks k, H, W, C] of whole videos: `step` under `lax.scan` with the cache as carry."""
    cache, text_kv = self.start(params, text, null_text, frame_shape)
    zeros = jnp.zeros((text.shape[0], self.chunk_frames, *frame_shape))

    def body(cache, chunk):
      return self.step(params, cache, text_kv, jax.random.fold_in(key, chunk), zeros)

    _, chunks = jax.lax.scan(body, cache, jnp.arange(num_chunks))
    return chunks.swapaxes(0, 1).reshape(text.shape[0], -1, *frame_shape)


@dataclasses.dataclass(frozen=True)
class CausalTeacherSampler(CausalSampler):
  """Many-step sampling of the causal teacher: each chunk by the ODE with guidance, given the chunks before.

  The cache holds two streams a video, with the prompt and with the null prompt.
  """
  solver: str = "unipc"
  guidance: float = 4.5
  guided: ClassVar[bool] = True

  def text_kv(self, params, text, null_text):
    return super().text_kv(params, jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)]), null_text)

  def write(self, params, cache, text_kv, x0):
    return super().write(params, cache, text_kv, jnp.concatenate([x0, x0]))

  def step(self, params, cache, text_kv, key, x0, timesteps=None):
    if timesteps is not None:
      raise errors.UserError("a causal teacher cannot start from a source video: expected a distilled student")

    def guided(x, t):
      timesteps = jnp.broadcast_to(t, (2 * x.shape[0], x.shape[1]))
      return _extend(self.denoiser, params, jnp.concatenate([x, x]), timesteps, text_kv, cache)[0]

    def x0_fn(x, t):
      return guidance.classifier_free(*jnp.split(guided(x, t), 2), self.guidance)

    noise = jax.random.normal(key, x0.shape)
    x0 = solvers.solve(
        self.solver, x0_fn, noise, np.asarray(self.timesteps, np.float32), self.denoiser.schedule)
    return self.write(params, cache, text_kv, x0), x0


def _extend(denoiser: denoiser_lib.Denoiser, params: Any, x_t: jax.Array, timesteps: jax.Array,
            text_kv: kv_cache.TextKV, cache: kv_cache.KVCache) -> tuple[jax.Array, kv_cache.ChunkKV]:
  """x_0 of the chunk at x_t, and its keys and values."""
  output, kv = denoiser.module.apply({"params": params}, x_t, timesteps, text_kv, cache, method="extend")
  return denoiser.output_to_x0(output, x_t, timesteps), kv
