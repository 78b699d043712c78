"""A video that is steered while it is made: what a stream remembers between chunks, and how it takes new wishes.

Text to video, image to video, video to video and changed prompts are one loop over `CausalSampler.step` and `write`:
an image is a first chunk that is written instead of generated, a source video is the estimate that a step starts from,
and a new prompt rewrites what the cache holds, if the policy says so.
"""

from collections.abc import Callable, Iterator, Sequence
import time
from typing import Any

from flax import serialization
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.models import kv_cache
from causvid_jax.sampling import causal
from causvid_jax.sampling import codec

# What becomes of the window's keys and values, which were written under the old prompt: they stay; are written again
# under the new one; or are forgotten, all but the sinks'.
POLICIES = ("keep", "recompute", "flush")


class StreamState(struct.PyTreeNode):
  """All that the next chunk depends on.

  Attributes:
    cache: keys and values of the past.
    sink: clean latents of the sink frames [B, up to sink, H, W, C].
    window: clean latents of the window's frames, oldest first.
    text: embeddings that the cache's next chunk is made under [B, T, D].
    target: embeddings that `text` moves to.
    null_text: embeddings of the null prompt [1, T, D], [0, T, D] if nothing is guided.
    blend: chunks left until `text` is `target`.
    decoder: the VAE decoder's stream.
    encoder: the VAE encoder's, for a source video.
    key: of all noise.
    chunk: number of the next chunk.
    frames: pixel frames made.
    prompts: whose embeddings `target` is.
  """
  cache: kv_cache.KVCache
  sink: jax.Array
  window: jax.Array
  text: jax.Array
  target: jax.Array
  null_text: jax.Array
  blend: int
  decoder: Any
  encoder: Any
  key: jax.Array
  chunk: int
  frames: int
  prompts: tuple[str, ...] = struct.field(pytree_node=False)


class Engine:
  """The compiled programs that all streams of a model share.

  Attributes:
    sampler: of a causal model.
    frame_shape: of a latent frame, [H, W, C].
  """

  def __init__(self, sampler: causal.CausalSampler, frame_shape: tuple[int, int, int],
               embed: Callable[[Sequence[str]], tuple[jax.Array, jax.Array]], params: Callable[[], Any],
               encoder: codec.StreamEncoder, decoder: codec.StreamDecoder, jit: Callable[..., Any] = jax.jit):
    """`embed` gives the embeddings of prompts and of the null prompt; `params` the transformer's, after that."""
    self.sampler, self.frame_shape, self.embed = sampler, frame_shape, embed
    self.encoder, self.decoder = encoder, decoder
    self._params = params
    self._start = jit(sampler.start, static_argnames="frame_shape")
    self._text_kv = jit(sampler.text_kv)
    self._write = jit(sampler.write, donate_argnums=1)
    self._step = jit(sampler.step, donate_argnums=1)

  def initial_state(self, prompts: Sequence[str], seed: int) -> StreamState:
    text, null_text = self.embed(prompts)
    cache, _ = self._start(self._params(), text, null_text, frame_shape=self.frame_shape)
    none = jnp.zeros((len(prompts), 0, *self.frame_shape))
    return StreamState(
        cache=cache, sink=none, window=none, text=text, target=text, null_text=null_text, blend=0, decoder={}, encoder={},
        key=jax.random.key(seed), chunk=0, frames=0, prompts=tuple(prompts))

  def text_kv(self, state: StreamState) -> kv_cache.TextKV:
    return self._text_kv(self._params(), state.text, state.null_text)

  def write(self, cache: kv_cache.KVCache, text_kv: kv_cache.TextKV, latents: jax.Array) -> kv_cache.KVCache:
    """`CausalSampler.write`."""
    return self._write(self._params(), cache, text_kv, latents)

  def step(self, state: StreamState, text_kv: kv_cache.TextKV, estimate: jax.Array | None,
           timesteps: jax.Array | None) -> tuple[kv_cache.KVCache, jax.Array]:
    """`CausalSampler.step`; what `state.cache` held is gone."""
    if estimate is None:
      estimate = jnp.zeros((state.text.shape[0], self.sampler.chunk_frames, *self.frame_shape))
    return self._step(self._params(), state.cache, text_kv, jax.random.fold_in(state.key, state.chunk), estimate, timesteps)

  def remember(self, state: StreamState, latents: jax.Array) -> StreamState:
    """The state after clean latents that the cache already holds."""
    room = self.sampler.sink_frames - state.sink.shape[1]
    window = jnp.concatenate([state.window, latents[:, room:]], axis=1)
    return state.replace(sink=jnp.concatenate([state.sink, latents[:, :room]], axis=1),
                         window=window[:, max(window.shape[1] - self.sampler.window_frames, 0):])

  def rewrite(self, state: StreamState, text_kv: kv_cache.TextKV, keep_window: bool) -> StreamState:
    """The state with the cache written anew under `text_kv`: the sinks and, if asked for, the window."""
    cache, _ = self._start(self._params(), state.text, state.null_text, frame_shape=self.frame_shape)
    state = state if keep_window else state.replace(window=state.window[:, :0])
    for frames in (state.sink, state.window):
      for first in range(0, frames.shape[1], self.sampler.chunk_frames):
        cache = self.write(cache, text_kv, frames[:, first:first + self.sampler.chunk_frames])
    return state.replace(cache=cache)


class Stream:
  """Chunks uint8 [B, F, H, W, 3] (for one prompt [F, H, W, 3]), endless or as long as the source video.

  A chunk is made when it is asked for: to pause is not to ask. Everything below may be set between chunks and counts
  from the next one.

  Attributes:
    prompt: what to show; as many as at the start.
    policy: what a new prompt does to the cache, one of `POLICIES`.
    blend_chunks: chunks over which the embeddings move to a new prompt.
    strength: how much of a source video is made anew, in (0, 1]: it is noised to t_1 = 1000 strength.
    one_step: whether a source video is denoised in one step, as in the paper, or in all of the student's below t_1.
    refresh: whether the cache is rewritten from clean latents before every chunk, so that it remembers no evicted frame.
    seconds: of work: until the `first_frames`, for the last `chunk`, and in `total`.
    frames: pixel frames made.
    state: to save and to resume from; None once closed.
  """

  def __init__(self, engine: Engine, prompt: str | Sequence[str], state: StreamState | None = None, *, seed: int = 0,
               image: np.ndarray | None = None, video: Iterator[np.ndarray] | None = None, policy: str = "recompute",
               blend_chunks: int = 0, strength: float = 0.9, one_step: bool = False, refresh: bool = False,
               schedule: Sequence[tuple[int, str]] = ()):
    """Begins a stream, or continues `state`.

    Args:
      engine: of the model.
      prompt: one, or one for each video of a batch; where it is not that of `state`, it changes as if set later.
      state: of an earlier stream; an image, a source video and a schedule go on from `state.frames`.
      seed: of all noise.
      image: uint8 [H, W, 3] that the first chunk shows, at rest.
      video: uint8 [n, H, W, 3] pieces, of any lengths, of a source video.
      policy, blend_chunks, strength, one_step, refresh: see the class.
      schedule: (pixel frame, prompt): the prompt counts from the first chunk that begins there or later.

    Raises:
      UserError: the state is of another number of videos.
    """
    start = time.perf_counter()
    self._engine, self._single = engine, isinstance(prompt, str)
    prompts = [prompt] if self._single else list(prompt)
    self.state = state or engine.initial_state(prompts, seed)
    self._prompts, self.frames = list(self.state.prompts), self.state.frames
    if len(prompts) != len(self._prompts):
      raise errors.UserError(f"{len(prompts)} prompts for a stream of {len(self._prompts)} videos")
    self._text_kv = None
    self._image, self._source = image, None if video is None else _Frames(iter(video))
    self._schedule = sorted(schedule, key=lambda entry: entry[0])
    self.policy, self.blend_chunks, self.strength = policy, blend_chunks, strength
    self.one_step, self.refresh = one_step, refresh
    self.prompt = self._scheduled(prompts)
    self.seconds = {"first_frames": 0.0, "chunk": 0.0, "total": time.perf_counter() - start}

  @property
  def prompt(self) -> str | list[str]:
    return self._prompts[0] if self._single else list(self._prompts)

  @prompt.setter
  def prompt(self, prompt: str | Sequence[str]) -> None:
    if self.state is None:
      raise errors.UserError("the stream is closed: it takes no new prompt")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if len(prompts) == 1:
      prompts *= len(self._prompts)
    if len(prompts) != len(self._prompts):
      raise errors.UserError(f"{len(prompts)} prompts for a stream of {len(self._prompts)} videos")
    if prompts != self._prompts:
      self._prompts = prompts
      target, _ = self._engine.embed(prompts)
      self.state = self.state.replace(prompts=tuple(prompts), target=target, blend=self.blend_chunks + 1)

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> np.ndarray:
    if self.state is None:
      raise StopIteration
    self._check_options()
    start = time.perf_counter()
    self.prompt = self._scheduled(self._prompts)
    frames = self._next()
    self.frames = self.state.frames
    self.seconds["chunk"] = time.perf_counter() - start
    self.seconds["total"] += self.seconds["chunk"]
    if not self.seconds["first_frames"]:
      self.seconds["first_frames"] = self.seconds["total"]
    return frames[0] if self._single else frames

  def close(self) -> None:
    """Frees what the stream remembers; it yields no more."""
    self.state = self._text_kv = None

  def _next(self) -> np.ndarray:
    engine, count = self._engine, None
    self._turn_to_prompt()
    state = self.state
    if self._image is not None and state.chunk == 0:
      latents, _ = engine.encoder({}, self._for_all(np.repeat(self._image[None], self._chunk_pixels(), axis=0)))
      cache = engine.write(state.cache, self._text_kv, latents)
    else:
      estimate = timesteps = None
      if self._source is not None:
        video, count = self._source.take(self._chunk_pixels())
        estimate, encoder = engine.encoder(state.encoder, self._for_all(video))
        state, timesteps = state.replace(encoder=encoder), self._timesteps()
      cache, latents = engine.step(state, self._text_kv, estimate, timesteps)
    frames, decoder = engine.decoder(state.decoder, latents)
    frames = frames[:, :count]
    self.state = engine.remember(state.replace(
        cache=cache, decoder=decoder, chunk=state.chunk + 1, frames=state.frames + frames.shape[1]), latents)
    return frames

  def _turn_to_prompt(self) -> None:
    """Moves the embeddings towards the prompt, and the cache with them as the policy says."""
    engine, state = self._engine, self.state
    if moves := state.blend > 0:
      text = state.target if state.blend == 1 else state.text + (state.target - state.text) / state.blend
      state = state.replace(text=text, blend=state.blend - 1)
    if moves or self._text_kv is None:
      self._text_kv = engine.text_kv(state)
    if state.chunk and (self.refresh or moves and self.policy != "keep"):
      state = engine.rewrite(state, self._text_kv, keep_window=self.refresh or self.policy == "recompute")
    self.state = state

  def _scheduled(self, prompt: str | Sequence[str]) -> str | Sequence[str]:
    """The prompt that the schedule asks for by now; `prompt` if it has nothing new."""
    while self._schedule and self._schedule[0][0] <= self.frames:
      prompt = self._schedule.pop(0)[1]
    return prompt

  def _check_options(self) -> None:
    if self.policy not in POLICIES:
      raise errors.UserError(f"policy {self.policy!r}: expected one of {', '.join(POLICIES)}")
    if self.blend_chunks < 0:
      raise errors.UserError(f"blend_chunks {self.blend_chunks}: expected at least 0")
    if not 0 < self.strength <= 1:
      raise errors.UserError(f"strength {self.strength}: expected more than 0 and at most 1")

  def _timesteps(self) -> jax.Array:
    """The passes over a source video: t_1, then the student's below it unless one step is asked for, then 0."""
    first = 1000.0 * self.strength
    rest = [] if self.one_step else [t for t in self._engine.sampler.timesteps if 0 < t < first]
    return jnp.asarray([first, *rest, 0.0], jnp.float32)

  def _for_all(self, video: np.ndarray) -> np.ndarray:
    """A source, [F, H, W, 3], for every video of the batch."""
    return np.repeat(video[None], len(self._prompts), axis=0)

  def _chunk_pixels(self) -> int:
    """Pixel frames of the next chunk."""
    return self._engine.decoder.chunk_pixels(self._engine.sampler.chunk_frames, first=self.state.chunk == 0)


class _Frames:
  """Frames of a source video, taken in numbers of our choice."""

  def __init__(self, pieces: Iterator[np.ndarray]):
    self._pieces, self._rest = pieces, None

  def take(self, count: int) -> tuple[np.ndarray, int]:
    """The next `count` frames, the last repeated where the video ends, and how many are real; StopIteration after that."""
    parts = [] if self._rest is None else [self._rest]
    while sum(map(len, parts)) < count and (piece := next(self._pieces, None)) is not None:
      parts.append(piece)
    frames = np.concatenate(parts) if parts else np.zeros((0,))
    if not len(frames):
      raise StopIteration
    self._rest = frames[count:]
    frames = frames[:count]
    return np.pad(frames, ((0, count - len(frames)), (0, 0), (0, 0), (0, 0)), mode="edge"), len(frames)


def to_bytes(state: StreamState) -> bytes:
  """A state as bytes (msgpack)."""
  fields = serialization.to_state_dict(state.replace(key=jax.random.key_data(state.key)))
  return serialization.msgpack_serialize(
      {**jax.device_get(fields), "prompts": list(state.prompts), "sink_frames": state.cache.sink})


def from_bytes(engine: Engine, prompts: Sequence[str], content: bytes) -> StreamState:
  """The state that `to_bytes` wrote, for the same model and number of prompts.

  Raises:
    UserError: when it is none, or is of another model, batch, sink or window.
  """
  template = engine.initial_state(prompts, 0)
  try:
    found = serialization.msgpack_restore(content)
    sink, theirs = found.pop("sink_frames"), tuple(found.pop("prompts"))
    counts = {name: int(found.pop(name)) for name in ("blend", "chunk", "frames")}
    arrays = jax.tree.map(jnp.asarray, found)
    cache = serialization.from_state_dict(template.cache, arrays.pop("cache"))
    arrays["key"] = jax.random.wrap_key_data(arrays["key"])
    state = StreamState(**arrays, **counts, cache=cache, prompts=theirs)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(f"no state of a stream: {error}") from error
  layout = lambda state: (state.cache.k.shape, state.text.shape, state.window.shape[2:])
  if (sink, layout(state)) != (template.cache.sink, layout(template)):
    raise errors.UserError("the state is of another model, batch, sink or window: its cache is"
                           f" {state.cache.k.shape} with {sink} sink frames, expected {template.cache.k.shape} with"
                           f" {template.cache.sink}")
  return state
