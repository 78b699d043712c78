"""Tests of the ring cache: its slots and rotations, and the stream on it against whole-clip forwards."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax.models import kv_cache
from causvid_jax.models import transformer

CONFIG = transformer.PRESETS["test"]
BATCH, CHUNK, SIDE, TOKENS = 2, 2, 4, 4
TIME = CONFIG.head_dim // 2 - 2 * (CONFIG.head_dim // 6)
MODEL = transformer.WanTransformer(CONFIG)
EXTEND = jax.jit(functools.partial(MODEL.apply, method="extend"))
FORWARD = jax.jit(MODEL.apply, static_argnames="chunk_frames")
WRITE = jax.jit(kv_cache.write)


def _inputs(frames):
  rng = np.random.default_rng(0)
  text = rng.normal(size=(BATCH, CONFIG.text_tokens, CONFIG.text_dim))
  latents = rng.normal(size=(BATCH, frames, SIDE, SIDE, CONFIG.in_channels))
  timesteps = rng.uniform(high=1000.0, size=(BATCH, frames))
  return tuple(x.astype(np.float32) for x in (latents, timesteps, text))


@functools.cache
def _params():
  """Random values everywhere: the head is zero at initialisation."""
  rng = np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), *_inputs(CHUNK)))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.25, size=x.shape), jnp.float32), shapes)


@functools.cache
def _text_kv():
  return jax.jit(functools.partial(MODEL.apply, method="encode_text"))(_params(), _inputs(CHUNK)[2])


def _create(sink, window):
  return kv_cache.create(CONFIG, BATCH, TOKENS, sink, window)


def _stream(cache, latents, timesteps):
  """Extends and writes chunk by chunk: the flows, the chunks' keys and values, and the last cache."""
  flows, chunks = [], []
  for start in range(0, latents.shape[1], CHUNK):
    part = slice(start, start + CHUNK)
    flow, chunk = EXTEND(_params(), latents[:, part], timesteps[:, part], _text_kv(), cache)
    cache = WRITE(cache, chunk)
    flows.append(flow)
    chunks.append(chunk)
  return jnp.concatenate(flows, axis=1), chunks, cache


def _join(chunks):
  return jax.tree.map(lambda *x: np.concatenate(x, axis=2), *chunks)


def _frames(chunks, start, stop):
  return jax.tree.map(lambda x: np.asarray(x)[:, :, start:stop], chunks)


def _random_chunk(frames, seed=0):
  shape = (CONFIG.num_layers, BATCH, frames, TOKENS, CONFIG.num_heads, CONFIG.head_dim)
  k, v = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
  return kv_cache.ChunkKV(k=k, v=v)


def _turn(k, frame):
  """Turns the time pairs of one frame's keys [..., D] to a position, by complex numbers in float64."""
  k = np.array(k, np.float64)
  pairs = k[..., 0:2 * TIME:2] + 1j * k[..., 1:2 * TIME:2]
  pairs *= np.exp(1j * frame * 10_000.0 ** (-np.arange(TIME) / TIME))
  k[..., 0:2 * TIME:2], k[..., 1:2 * TIME:2] = pairs.real, pairs.imag
  return k


class RingTest(parameterized.TestCase):

  @parameterized.parameters((0, 4), (1, 5), (3, 4))
  def test_holds_the_sinks_before_the_last_frames(self, sink, window):
    cache, written = _create(sink, window), _random_chunk(22)
    for count in range(CHUNK, 23, CHUNK):
      cache = WRITE(cache, _frames(written, count - CHUNK, count))
      self.assertEqual(int(cache.filled), min(count, sink + window) * TOKENS)
      keys = kv_cache.read_keys(cache.k[1], kv_cache.sink_rotation(cache))
      evicted = max(0, count - sink - window)
      for frame in range(count):
        if frame >= sink and frame < sink + evicted:
          continue
        slot, position = (frame, frame + evicted) if frame < sink else (sink + (frame - sink) % window, frame)
        np.testing.assert_allclose(keys[:, slot], _turn(written.k[1, :, frame], position), atol=2e-5)
        np.testing.assert_array_equal(cache.v[:, :, slot], written.v[:, :, frame])

  def test_has_constant_size_and_writes_in_place(self):
    cache, chunk = _create(2, 4), _random_chunk(CHUNK)
    for _ in range(5):
      after = WRITE(cache, chunk)
      self.assertEqual(jax.tree.structure(after), jax.tree.structure(cache))
      self.assertEqual(jax.tree.map(jnp.shape, after), jax.tree.map(jnp.shape, cache))
      cache = after
    memory = jax.jit(kv_cache.write, donate_argnums=0).lower(cache, chunk).compile().memory_analysis()
    self.assertGreaterEqual(memory.alias_size_in_bytes, cache.k.nbytes + cache.v.nbytes)
    self.assertLess(memory.temp_size_in_bytes, cache.k.nbytes)

  def test_one_write_equals_many(self):
    chunks = _random_chunk(8)
    once, many = WRITE(_create(2, 8), chunks), _create(2, 8)
    for start in range(0, 8, CHUNK):
      many = WRITE(many, _frames(chunks, start, start + CHUNK))
    jax.tree.map(np.testing.assert_array_equal, once, many)

  def test_misuse_is_one_clear_error(self):
    latents, timesteps, _ = _inputs(CHUNK)
    with self.assertRaisesRegex(errors.UserError, "window of 1 frames must hold a chunk of 2 frames"):
      kv_cache.write(_create(3, 1), _random_chunk(CHUNK))
    for cache, message in (
        (kv_cache.create(CONFIG, 3, TOKENS, 1, 4), "made for a batch of 3, used with a batch of 2"),
        (kv_cache.create(CONFIG, BATCH, 9, 1, 4), "made for 9 tokens a frame, used with 4"),
        (_create(4, 1), "window of 1 frames must hold a chunk of 2 frames")):
      with self.assertRaisesRegex(errors.UserError, message):
        EXTEND(_params(), latents, timesteps, _text_kv(), cache)
    text_kv = jax.tree.map(lambda x: x[:, :1], _text_kv())
    with self.assertRaisesRegex(errors.UserError, "text keys: made for a batch of 1, used with a batch of 2"):
      EXTEND(_params(), latents, timesteps, text_kv, _create(1, 4))


class StreamTest(parameterized.TestCase):

  @parameterized.parameters((0, 6), (1, 5))
  def test_chunk_by_chunk_equals_the_block_causal_forward(self, sink, window):
    latents, timesteps, text = _inputs(6)
    expected = FORWARD(_params(), latents, timesteps, text, chunk_frames=CHUNK)
    flows, _, cache = _stream(_create(sink, window), latents, timesteps)
    np.testing.assert_allclose(flows, expected, atol=1e-5)
    self.assertEqual(int(cache.frames), 6)

  @parameterized.parameters((0, 6), (1, 5), (2, 4))
  def test_ring_equals_an_unbounded_cache_of_sinks_and_window(self, sink, window):
    latents, timesteps, _ = _inputs(20)
    flows, chunks, _ = _stream(_create(sink, window), latents, timesteps)
    chunks = _join(chunks)
    for start in range(0, 20, CHUNK):
      seen = _frames(chunks, 0, start)
      if start > sink + window:
        seen = _join([_frames(chunks, 0, sink), _frames(chunks, start - window, start)])
      # Without sinks and big enough never to evict; only distances count, so it may start at frame 0.
      reference = _create(0, sink + window)
      if start:
        reference = WRITE(reference, seen)
      part = slice(start, start + CHUNK)
      expected, _ = EXTEND(_params(), latents[:, part], timesteps[:, part], _text_kv(), reference)
      np.testing.assert_allclose(flows[:, part], expected, atol=1e-5)

  def test_evicted_frames_are_forgotten_and_kept_ones_are_not(self):
    latents, timesteps, _ = _inputs(10)
    _, chunks, _ = _stream(_create(2, 4), latents, timesteps)
    chunks = _join(chunks)

    def last(changed):
      frames = jax.tree.map(np.copy, chunks)
      frames.k[:, :, changed] += 1.0
      frames.v[:, :, changed] += 1.0
      cache = _create(2, 4)
      for start in range(0, 8, CHUNK):
        cache = WRITE(cache, _frames(frames, start, start + CHUNK))
      return EXTEND(_params(), latents[:, 8:], timesteps[:, 8:], _text_kv(), cache)[0]

    unchanged = last(9)
    for frame in range(8):
      difference = float(jnp.abs(last(frame) - unchanged).max())
      if frame in (2, 3):
        self.assertEqual(difference, 0.0)
      else:
        self.assertGreater(difference, 1e-4, msg=f"frame {frame}")

  def test_a_stream_may_be_at_any_absolute_frame(self):
    latents, timesteps, _ = _inputs(12)

    def run(offset):
      _, _, cache = _stream(_create(2, 4), latents[:, :2], timesteps[:, :2])
      cache = cache.replace(frames=cache.frames + offset)
      chunks = _random_chunk(4)
      return _stream(WRITE(cache, chunks), latents[:, 6:], timesteps[:, 6:])[0]

    expected = run(0)
    for offset in (1_000_000, 1_000_000_000):
      np.testing.assert_allclose(run(offset), expected, atol=1e-4)

  def test_extend_only_reads_the_cache(self):
    latents, timesteps, _ = _inputs(CHUNK)
    cache = WRITE(_create(2, 4), _random_chunk(CHUNK))
    before = jax.tree.map(np.array, cache)
    first = EXTEND(_params(), latents, timesteps, _text_kv(), cache)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    again = EXTEND(_params(), latents, timesteps, _text_kv(), cache)
    jax.tree.map(np.testing.assert_array_equal, again, first)


if __name__ == "__main__":
  absltest.main()
