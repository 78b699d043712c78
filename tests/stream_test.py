"""Streams: equal to the scan, saved and resumed, steered by prompts, images and videos, endless in constant memory."""

import functools
import itertools
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.sampling import schedule
from causvid_jax.sampling import stream as stream_lib
import tiny

PROMPTS = ["a red seven moving left", "a blue two moving up"]
SEED = 3


def take(stream, count=None):
  return list(itertools.islice(stream, count))


def source(count, height=64, width=64):
  """Frames of a moving gradient."""
  y, x = np.mgrid[:height, :width]
  frames = [np.stack([x * 2 + 5 * i, y * 2 + 9 * i, 3 * x + y - 7 * i], axis=-1) for i in range(count)]
  return (np.sin(np.stack(frames) / 25) * 120 + 128).astype(np.uint8)


def saved(stream):
  return stream_lib.to_bytes(stream.state)


def same_state(a, b):
  return stream_lib.to_bytes(a) == stream_lib.to_bytes(b)


class StreamTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.compile_fast(cls, cls.folder)
    tiny.build(cls.folder)
    cls.pipe = pipeline.Pipeline.from_checkpoint(cls.folder / "student")
    sampler, shape = cls.pipe.sampler, cls.pipe._frame_shape
    # Programs of the tests' own, to rebuild what a stream should hold.
    cls.start = staticmethod(functools.partial(jax.jit(sampler.start, static_argnames="frame_shape"), frame_shape=shape))
    cls.write, cls.step = staticmethod(jax.jit(sampler.write)), staticmethod(jax.jit(sampler.step))
    vae, vae_params = cls.pipe.vae, cls.pipe._components["vae"].params
    apply = lambda x, method: vae.apply({"params": vae_params}, x, method=method)
    cls.encode = staticmethod(jax.jit(lambda video: apply(jnp.float32(video) / 127.5 - 1, "encode")))
    cls.decode = staticmethod(jax.jit(lambda z: (jnp.clip(apply(z, "decode"), -1, 1) + 1) * 127.5))
    cls.texts, cls.null_text = cls.pipe.embed(PROMPTS)

  def rebuild(self, text, *chunks):
    """A cache written from clean latents under a prompt's embeddings [1, T, D], and the prompt's keys and values."""
    cache, text_kv = self.start(self.pipe.params, text, self.null_text)
    for latents in chunks:
      cache = self.write(self.pipe.params, cache, text_kv, latents)
    return cache, text_kv

  def next_chunk(self, cache, text_kv, chunk, estimate=None, timesteps=None):
    """The cache and the latents after a step with the noise of a stream's chunk."""
    estimate = jnp.zeros((1, 3, *self.pipe._frame_shape)) if estimate is None else estimate
    return self.step(self.pipe.params, cache, text_kv, jax.random.fold_in(jax.random.key(SEED), chunk), estimate, timesteps)

  def assert_holds(self, stream, cache, latents):
    """The stream's cache and its last chunk, up to what another compilation may round otherwise."""
    self.assertEqual(int(stream.state.cache.frames), int(cache.frames))
    chex.assert_trees_all_close(stream.state.cache, cache, atol=1e-5)
    np.testing.assert_allclose(stream.state.window[:, -3:], latents, atol=1e-5)

  # Text to video.

  def test_equals_the_scan(self):
    latents = self.pipe.latents(PROMPTS[:1], 4, SEED)
    stream = self.pipe.stream(PROMPTS[0], SEED)
    for i in range(4):
      frames = next(stream)
      self.assertEqual((frames.shape, frames.dtype), ((12 if i else 9, 64, 64, 3), np.uint8))
      held = stream.state.window if i else stream.state.sink
      np.testing.assert_allclose(held, latents[:, 3 * i:3 * i + 3], atol=0)
    self.assertEqual(stream.frames, 45)
    self.assertBetween(stream.seconds["first_frames"], stream.seconds["chunk"], stream.seconds["total"])

  def test_a_batch_is_its_videos(self):
    both = take(self.pipe.stream(PROMPTS, SEED), 3)
    self.assertEqual([chunk.shape for chunk in both], [(2, n, 64, 64, 3) for n in (9, 12, 12)])
    alone = np.concatenate(take(self.pipe.stream(PROMPTS[0], SEED), 3))
    both = np.concatenate(both, axis=1).astype(int)
    self.assertLessEqual(np.abs(both[0] - alone).max(), 1)
    # The noise of the second is its own, whatever the first shows.
    other = np.concatenate(take(self.pipe.stream(PROMPTS[1:] * 2, SEED), 3), axis=1).astype(int)
    self.assertLessEqual(np.abs(both[1] - other[1]).max(), 1)
    self.assertGreater(np.abs(other[0] - other[1]).mean(), 1)

  def test_prompts_of_a_batch(self):
    stream = self.pipe.stream(PROMPTS, SEED, policy="keep")
    take(stream, 2)
    stream.prompt = PROMPTS[1]
    self.assertEqual(stream.prompt, PROMPTS[1:] * 2)
    next(stream)
    np.testing.assert_allclose(stream.state.text[0], stream.state.text[1], atol=1e-6)
    with self.assertRaisesRegex(errors.UserError, "3 prompts for a stream of 2 videos"):
      stream.prompt = [PROMPTS[0]] * 3

  def test_closed_streams_stop(self):
    stream = self.pipe.stream(PROMPTS[0], SEED)
    next(stream)
    stream.close()
    self.assertEqual(take(stream), [])
    self.assertEqual(stream.frames, 9)
    self.assertEqual(stream.prompt, PROMPTS[0])
    with self.assertRaisesRegex(errors.UserError, "the stream is closed"):
      stream.prompt = PROMPTS[1]

  # Saving.

  @parameterized.parameters(
      ("keep", 0, False), ("keep", 2, True), ("recompute", 0, False), ("recompute", 2, True), ("flush", 0, True),
      ("flush", 2, False))
  def test_resumed_equals_uninterrupted_bit_for_bit(self, policy, blend_chunks, with_video):
    frames = source(69)
    options = {"policy": policy, "blend_chunks": blend_chunks, "schedule": [(21, PROMPTS[1])]}
    video = lambda first: iter([frames[first:]]) if with_video else None
    stream = self.pipe.stream(PROMPTS[0], SEED, video=video(0), **options)
    states, chunks = [], []
    for _ in range(6):
      states.append(saved(stream))
      chunks.append(next(stream))
    for done in (0, 2, 3, 4):  # before the first chunk; before the change; within the blending; after it
      first = sum(map(len, chunks[:done]))
      resumed = self.pipe.stream(PROMPTS[0], video=video(first), state=states[done], **options)
      self.assertEqual(resumed.frames, first)
      for expected in chunks[done:]:
        np.testing.assert_array_equal(next(resumed), expected)
      self.assertEqual(resumed.prompt, PROMPTS[1])
      self.assertTrue(same_state(resumed.state, stream.state))

  def test_another_prompt_on_resuming_is_a_change(self):
    stream = self.pipe.stream(PROMPTS[0], SEED)
    take(stream, 2)
    resumed = self.pipe.stream(PROMPTS[1], state=saved(stream))
    stream.prompt = PROMPTS[1]
    np.testing.assert_array_equal(next(resumed), next(stream))
    self.assertTrue(same_state(resumed.state, stream.state))

  def test_states_that_do_not_fit(self):
    stream = self.pipe.stream(PROMPTS[0], SEED)
    next(stream)
    content = saved(stream)
    for junk in (b"", b"junk", content[:-9], content[:100], b"\x80", b"\x01", content[:-9] + bytes(9)):
      with self.assertRaisesRegex(errors.UserError, "no state of a stream"):
        self.pipe.stream(PROMPTS[0], state=junk)
    with self.assertRaisesRegex(errors.UserError, "another model, batch, sink or window"):
      self.pipe.stream(PROMPTS, state=content)
    with self.assertRaisesRegex(errors.UserError, "2 prompts for a stream of 1 videos"):
      self.pipe.stream(PROMPTS, state=stream.state)
    other = pipeline.Pipeline.from_checkpoint(self.folder / "student", sink_frames=0, window_frames=6)
    with self.assertRaisesRegex(errors.UserError, "with 3 sink frames, expected .* with 0"):
      other.stream(PROMPTS[0], state=content)

  # Prompts.

  def before_a_change(self):
    """A stream of four chunks that has evicted one, as bytes, its latents and its cache."""
    stream = self.pipe.stream(PROMPTS[0], SEED)
    take(stream, 4)
    # A copy: the next chunk takes the buffers of the cache.
    return saved(stream), stream.state.sink, stream.state.window, jax.tree.map(jnp.array, stream.state.cache)

  def changed(self, content, policy):
    stream = self.pipe.stream(PROMPTS[0], state=content, policy=policy)
    stream.prompt = PROMPTS[1]
    return stream, next(stream)

  def test_keep_changes_nothing_but_the_text(self):
    content, _, _, cache = self.before_a_change()
    stream, _ = self.changed(content, "keep")
    _, text_kv = self.rebuild(self.texts[1:])
    self.assert_holds(stream, *self.next_chunk(cache, text_kv, 4))
    self.assertEqual(int(stream.state.cache.frames), 15)

  def test_recompute_writes_the_same_latents_under_the_new_prompt(self):
    content, sink, window, kept = self.before_a_change()
    stream, frames = self.changed(content, "recompute")
    cache, text_kv = self.rebuild(self.texts[1:], sink, window)
    self.assertGreater(float(jnp.abs(cache.v - kept.v).max()), 1e-3)
    self.assert_holds(stream, *self.next_chunk(cache, text_kv, 4))
    self.assertTrue(np.any(frames != self.changed(content, "keep")[1]))

  def test_flush_leaves_the_sinks(self):
    content, sink, _, _ = self.before_a_change()
    stream, frames = self.changed(content, "flush")
    cache, text_kv = self.rebuild(self.texts[1:], sink)
    self.assertEqual(int(cache.frames), 3)
    self.assert_holds(stream, *self.next_chunk(cache, text_kv, 4))
    self.assertEqual(int(stream.state.cache.frames), 6)
    self.assertTrue(np.any(frames != self.changed(content, "recompute")[1]))

  def test_the_same_prompt_changes_nothing(self):
    content, *_ = self.before_a_change()
    stream = self.pipe.stream(PROMPTS[0], state=content, policy="flush")
    stream.prompt = PROMPTS[0]
    expected = self.pipe.stream(PROMPTS[0], state=content)
    np.testing.assert_array_equal(next(stream), next(expected))

  @parameterized.parameters(*stream_lib.POLICIES)
  def test_blending_moves_linearly_and_arrives_exactly(self, policy):
    stream = self.pipe.stream(PROMPTS[0], SEED, blend_chunks=3, policy=policy)
    next(stream)
    before = stream.state.text
    stream.prompt = PROMPTS[1]
    for i in range(1, 6):
      next(stream)
      after = stream.state.target
      np.testing.assert_allclose(stream.state.text, before + (after - before) * min(i / 4, 1), atol=1e-6)
      moving = {"keep": 3 * i + 3, "recompute": min(3 * i + 3, 9), "flush": 6}  # the sinks, the window, and this chunk
      arrived = {"keep": 18, "recompute": 12, "flush": 9}
      self.assertEqual(int(stream.state.cache.frames), (moving if i < 5 else arrived)[policy])
    np.testing.assert_array_equal(stream.state.text, stream.state.target)
    np.testing.assert_allclose(stream.state.target, self.texts[1:], atol=1e-6)

  @parameterized.parameters((0, 0), (1, 1), (9, 1), (10, 2), (21, 2), (22, 3))
  def test_a_schedule_counts_from_the_first_chunk_at_its_frame_or_later(self, frame, chunk):
    stream = self.pipe.stream(PROMPTS[0], SEED, schedule=[(frame, PROMPTS[1])])
    shown = []
    for _ in range(4):
      next(stream)
      shown.append(stream.prompt)
      np.testing.assert_array_equal(stream.state.text, stream.state.target)
    self.assertEqual(shown, [PROMPTS[0]] * chunk + [PROMPTS[1]] * (4 - chunk))

  def test_refresh_forgets_what_was_evicted(self):
    plain, fresh = (self.pipe.stream(PROMPTS[0], SEED, refresh=refresh) for refresh in (False, True))
    for _ in range(3):  # nothing has left the cache: a fresh one is the same
      self.assertLessEqual(np.abs(next(plain).astype(int) - next(fresh)).max(), 1)
    sink, window = fresh.state.sink, fresh.state.window
    next(plain), next(fresh)
    cache, text_kv = self.rebuild(self.texts[:1], sink, window)
    self.assert_holds(fresh, *self.next_chunk(cache, text_kv, 3))
    self.assertTrue(np.any(np.asarray(plain.state.window) != np.asarray(fresh.state.window)))

  # Images and videos.

  def test_an_image_is_the_first_chunk(self):
    image = source(1, 96, 80)[0]
    stream = self.pipe.stream(PROMPTS[0], SEED, image=image)
    first = next(stream)
    still = np.repeat(stream._image[None, None], 9, axis=1)
    self.assertEqual(still.shape, (1, 9, 64, 64, 3))
    latents = self.encode(still)
    np.testing.assert_allclose(first, self.decode(latents)[0], atol=1)
    np.testing.assert_allclose(stream.state.sink, latents, atol=1e-5)
    cache, text_kv = self.rebuild(self.texts[:1], stream.state.sink)
    chex.assert_trees_all_close(stream.state.cache, cache, atol=1e-5)
    second = next(stream)
    self.assert_holds(stream, *self.next_chunk(cache, text_kv, 1))
    other = take(self.pipe.stream(PROMPTS[0], SEED, image=255 - image), 2)
    self.assertTrue(np.any(other[1] != second))

  def test_strength_near_zero_returns_the_video(self):
    frames = source(33)
    expected = self.decode(self.encode(frames[None]))[0]
    for one_step in (False, True):
      made = self.pipe(PROMPTS[0], 33, SEED, video=[frames], strength=1e-7, one_step=one_step)
      np.testing.assert_allclose(made, expected, atol=1)

  def test_full_strength_ignores_the_video(self):
    from_text = self.pipe(PROMPTS[0], 33, SEED)
    np.testing.assert_array_equal(self.pipe(PROMPTS[0], 33, SEED, video=[source(33)], strength=1.0), from_text)
    self.assertTrue(np.any(self.pipe(PROMPTS[0], 33, SEED, video=[source(33)], strength=0.8) != from_text))

  @parameterized.parameters((0.8, False), (0.8, True), (0.5, False))
  def test_a_video_is_noised_to_its_strength_and_denoised_under_the_cache(self, strength, one_step):
    frames = source(21)
    stream = self.pipe.stream(PROMPTS[0], SEED, video=[frames], strength=strength, one_step=one_step)
    first = take(stream, 1)
    cache, text_kv = self.rebuild(self.texts[:1], stream.state.sink)
    latents = self.encode(frames[None])
    next(stream)
    rest = [t for t in self.pipe.sampler.timesteps if t < 1000 * strength and not (one_step and t)]
    self.assertEqual(rest[-1], 0.0)
    self.assertLen(rest, 2 if (strength, one_step) == (0.8, False) else 1)
    self.assert_holds(stream, *self.next_chunk(cache, text_kv, 1, latents[:, 3:], jnp.float32([1000 * strength, *rest])))
    self.assertLen(first[0], 9)

  def test_the_end_of_the_video_cuts_the_last_chunk(self):
    for count, lengths in ((1, [1]), (9, [9]), (10, [9, 1]), (25, [9, 12, 4]), (33, [9, 12, 12])):
      stream = self.pipe.stream(PROMPTS[0], SEED, video=[source(count)])
      self.assertEqual([len(chunk) for chunk in stream], lengths)
      self.assertEqual(stream.frames, count)
      self.assertEqual(take(stream), [])
    self.assertLen(self.pipe(PROMPTS[0], 100, SEED, video=[source(25)]), 25)
    for empty in ([], [source(3)[:0]]):
      with self.assertRaisesRegex(errors.UserError, "the source video has no frames"):
        self.pipe(PROMPTS[0], 100, SEED, video=empty)

  def test_pieces_of_any_number_and_size(self):
    frames = source(21)
    expected = np.concatenate(take(self.pipe.stream(PROMPTS[0], SEED, video=[frames])))
    for cuts in (range(1, 21), [2, 2, 19], [20]):
      made = np.concatenate(take(self.pipe.stream(PROMPTS[0], SEED, video=iter(np.split(frames, cuts)))))
      np.testing.assert_array_equal(made, expected)
    wide = np.pad(frames, [(0, 0), (0, 0), (16, 16), (0, 0)])  # the middle is what fits
    made = np.concatenate(take(self.pipe.stream(PROMPTS[0], SEED, video=[wide[:10], frames[10:]])))
    np.testing.assert_array_equal(made, expected)

  def test_a_video_for_a_batch(self):
    frames = source(9)
    both, = take(self.pipe.stream(PROMPTS[:1] * 2, SEED, video=[frames], strength=1e-7))
    alone, = take(self.pipe.stream(PROMPTS[0], SEED, video=[frames], strength=1e-7))
    for video in both:
      self.assertLessEqual(np.abs(video.astype(int) - alone).max(), 1)

  # Endless.

  def test_constant_memory(self):
    stream = self.pipe.stream(PROMPTS[0], SEED, video=itertools.repeat(source(5)), one_step=True, refresh=True)
    layout = lambda: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), stream.state)
    take(stream, 5)
    before, programs = layout(), stream._engine._step._cache_size()
    take(stream, 45)
    self.assertEqual(jax.tree.leaves(layout()), jax.tree.leaves(before))
    self.assertEqual(stream._engine._step._cache_size(), programs)
    self.assertEqual(stream.frames, 9 + 49 * 12)

  def test_sink_and_window_are_options(self):
    other = pipeline.Pipeline.from_checkpoint(self.folder / "student", sink_frames=0, window_frames=6)
    ours, theirs = self.pipe.stream(PROMPTS[0], SEED), other.stream(PROMPTS[0], SEED)
    for i in range(4):
      a, b = next(ours).astype(int), next(theirs).astype(int)
      if i < 3:  # both still remember everything
        self.assertLessEqual(np.abs(a - b).max(), 1)
    self.assertGreater(np.abs(a - b).max(), 1)
    self.assertEqual((theirs.state.cache.sink, theirs.state.cache.slots, theirs.state.sink.shape[1]), (0, 6, 0))
    self.assertEqual(theirs.state.window.shape[1], 6)
    small = pipeline.Pipeline.from_checkpoint(self.folder / "student", window_frames=2)
    with self.assertRaisesRegex(errors.UserError, "the window of 2 frames must hold a chunk of 3 frames"):
      next(small.stream(PROMPTS[0], SEED))

  # Errors and calls.

  @parameterized.parameters(
      ({"policy": "forget"}, "policy 'forget': expected one of keep, recompute, flush"),
      ({"blend_chunks": -1}, "blend_chunks -1: expected at least 0"),
      ({"strength": 0.0}, "strength 0.0: expected more than 0 and at most 1"),
      ({"strength": 1.5}, "strength 1.5: expected"), ({"strength": float("nan")}, "strength nan: expected"))
  def test_wrong_options_cost_nothing(self, options, message):
    frames = source(21)
    stream = self.pipe.stream(PROMPTS[0], SEED, video=[frames], **options)
    with self.assertRaisesRegex(errors.UserError, message):
      next(stream)
    (name, _), = options.items()
    setattr(stream, name, {"policy": "keep", "blend_chunks": 0, "strength": 0.9}[name])
    expected = take(self.pipe.stream(PROMPTS[0], SEED, video=[frames]))
    for made, chunk in zip(stream, expected, strict=True):
      np.testing.assert_array_equal(made, chunk)

  def test_wrong_sources(self):
    image = source(1)[0]
    with self.assertRaisesRegex(errors.UserError, "begins with an image or follows a video, not both"):
      self.pipe.stream(PROMPTS[0], image=image, video=[image[None]])
    for wrong in (image / 255, image[..., 0]):
      with self.assertRaisesRegex(errors.UserError, "expected uint8"):
        self.pipe.stream(PROMPTS[0], image=wrong)
    with self.assertRaisesRegex(errors.UserError, "expected uint8"):
      next(self.pipe.stream(PROMPTS[0], video=[image]))
    teacher = pipeline.Pipeline.from_checkpoint(self.folder / "teacher")
    with self.assertRaisesRegex(errors.UserError, "image: this checkpoint is bidirectional and makes clips from text only"):
      teacher(PROMPTS[0], image=image)
    causal = pipeline.Pipeline.from_checkpoint(self.folder / "causal_teacher")
    with self.assertRaisesRegex(errors.UserError, "a causal teacher cannot start from a source video"):
      next(causal.stream(PROMPTS[0], video=[source(9)]))

  def test_callbacks(self):
    seen = []
    video = self.pipe(PROMPTS[0], 20, SEED, callback=lambda i, frames: seen.append((i, frames.shape)))
    self.assertEqual(seen, [(0, (1, 9, 64, 64, 3)), (1, (1, 12, 64, 64, 3))])
    self.assertLen(video, 20)
    stream = self.pipe.stream(PROMPTS[0], SEED)
    take(stream, 2)
    resumed = self.pipe(PROMPTS[0], 15, state=saved(stream))
    np.testing.assert_array_equal(resumed, np.concatenate(take(stream, 2))[:15])


class ScheduleTest(parameterized.TestCase):

  def test_parse(self):
    self.assertEqual(schedule.parse("0: a red seven; 120:a blue two: up ;  240 :"),
                     [(0, "a red seven"), (120, "a blue two: up"), (240, "")])

  @parameterized.parameters("", "a red seven", "0: a;", "0: a; -3: b", "0: a; x: b", "0.5: a", "0: a; 9 b")
  def test_entries_that_are_none(self, text):
    with self.assertRaisesRegex(errors.UserError, r"schedule: '[^']*': expected FRAME: PROMPT"):
      schedule.parse(text)

  @parameterized.parameters("3: a", "0: a; 9: b; 9: c", "0: a; 9: b; 5: c")
  def test_frames_in_disorder(self, text):
    with self.assertRaisesRegex(errors.UserError, "schedule: frames [0-9, ]+: expected 0 first, then growing numbers"):
      schedule.parse(text)

  def test_files_of_prompts(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / "prompts.txt").write_text("a red seven\n\n  ein grüner Sechser \r\n")
    self.assertEqual(schedule.read_prompts(folder / "prompts.txt"), ["a red seven", "ein grüner Sechser"])
    (folder / "blank.txt").write_text("\n \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("blank.txt", "found none"), ("bytes.txt", "expected a text file"), ("none.txt", "No such file")):
      with self.assertRaisesRegex(errors.UserError, f"{name}: .*{message}|{message}.*{name}"):
        schedule.read_prompts(folder / name)


if __name__ == "__main__":
  absltest.main()
