"""The VAE: streams against whole clips, causality, normalisation, published size, and the one that ships."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import errors
from causvid_jax import weights
from causvid_jax.data import digit_world
from causvid_jax.data import latents as latents_lib
from causvid_jax.models import vae
from causvid_jax.sampling import codec
from causvid_jax.weights import store
import tiny

CONFIG = vae.PRESETS["test"]
VAE = vae.WanVAE(CONFIG)


@functools.cache
def make_params():
  return tiny.randomized(VAE, 0)


@functools.partial(jax.jit, static_argnames="method")
def _apply(params, state, x, method):
  return VAE.apply({"params": params, **state}, x, method=method, mutable=["stream"])


def run(x, method):
  """A whole clip."""
  return _run(make_params(), x, method)


@functools.partial(jax.jit, static_argnames="method")
def _run(params, x, method):
  return VAE.apply({"params": params}, x, method=method)


def run_piece(state, x, method):
  """A piece of a stream, and the state after it."""
  return _apply(make_params(), state, x, method)


def make_video(frames=17, size=16, batch=2):
  return jax.random.uniform(jax.random.key(1), (batch, frames, size, size, 3), minval=-1.0)


def make_latents(frames=5, size=2, batch=2):
  return jax.random.normal(jax.random.key(2), (batch, frames, size, size, CONFIG.z_dim))


def run_stream(x, sizes, method):
  """Codes `x` in pieces of `sizes` frames; also the states after each."""
  state, parts, states, first = {}, [], [], 0
  for size in sizes:
    part, state = run_piece(state, x[:, first:first + size], method)
    parts.append(part)
    states.append(state)
    first += size
  assert first == x.shape[1]
  return jnp.concatenate(parts, axis=1), states


class StreamTest(parameterized.TestCase):

  @parameterized.parameters(([1, 4, 4, 4, 4],), ([5, 4, 8],), ([9, 8],))
  def test_encoding_in_pieces_equals_the_whole_clip(self, sizes):
    video = make_video()
    streamed, _ = run_stream(video, sizes, "encode")
    np.testing.assert_allclose(streamed, run(video, "encode"), atol=1e-5)

  @parameterized.parameters(([1, 1, 1, 1, 1],), ([2, 3],), ([3, 1, 1],))
  def test_decoding_in_pieces_equals_the_whole_clip(self, sizes):
    latents = make_latents()
    streamed, _ = run_stream(latents, sizes, "decode")
    np.testing.assert_allclose(streamed, run(latents, "decode"), atol=3e-5)

  @parameterized.parameters((make_video, "encode", 1, 4), (make_latents, "decode", 1, 1))
  def test_the_state_is_a_scan_carry(self, make, method, first, size):
    x = make()
    _, states = run_stream(x, [first] + [size] * ((x.shape[1] - first) // size), method)
    self.assertNotEmpty(jax.tree.leaves(states[0]))
    for state in states[1:]:
      chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    start, state = run_piece({}, x[:, :first], method)
    pieces = jnp.moveaxis(x[:, first:].reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    last, parts = jax.jit(lambda state, xs: jax.lax.scan(
        lambda state, piece: run_piece(state, piece, method)[::-1], state, xs))(state, pieces)
    scanned = jnp.concatenate([start, *parts], axis=1)
    np.testing.assert_allclose(scanned, run(x, method), atol=3e-5)
    chex.assert_trees_all_close(last, states[-1], atol=3e-5)

  def test_a_piece_needs_its_past(self):
    # Without the state the second piece would be another clip's beginning: what the tests above compare is not blind.
    latents = make_latents()
    fresh, _ = run_piece({}, latents[:, -1:], "decode")
    self.assertGreater(float(jnp.abs(fresh[:, -1] - run(latents, "decode")[:, -1]).max()), 1e-2)


class CausalityTest(parameterized.TestCase):

  @parameterized.parameters(0, 1, 4, 5, 8, 12, 13, 16)
  def test_a_pixel_frame_reaches_no_earlier_latent(self, frame):
    video = make_video()
    before, after = run(video, "encode"), run(video.at[:, frame].multiply(-1.0), "encode")
    own = (frame + 3) // 4  # frame 0 is a latent frame of its own, and each four after it are one
    np.testing.assert_array_equal(after[:, :own], before[:, :own])
    self.assertGreater(float(jnp.abs(after[:, own] - before[:, own]).max()), 1e-4)

  @parameterized.parameters(0, 1, 2, 3, 4)
  def test_a_latent_reaches_no_earlier_pixel_frame(self, frame):
    latents = make_latents()
    before, after = run(latents, "decode"), run(latents.at[:, frame].multiply(-1.0), "decode")
    first = max(0, 4 * frame - 3)
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    self.assertGreater(float(jnp.abs(after[:, first] - before[:, first]).max()), 1e-4)

  def test_clips_of_a_batch_are_independent(self):
    video = make_video()
    np.testing.assert_array_equal(run(video.at[0].set(0.0), "encode")[1], run(video, "encode")[1])


class ShapeTest(parameterized.TestCase):

  @parameterized.parameters((1, 1), (5, 2), (9, 3), (33, 9), (81, 21))
  def test_a_clip_of_1_plus_4n_frames_has_1_plus_n_latents(self, pixel, latent):
    encode, decode_ = (functools.partial(VAE.apply, {"params": make_params()}, method=m) for m in ("encode", "decode"))
    video = jax.ShapeDtypeStruct((2, pixel, 32, 48, 3), jnp.float32)
    latents = jax.eval_shape(encode, video)
    self.assertEqual(latents.shape, (2, latent, 4, 6, CONFIG.z_dim))
    self.assertEqual(jax.eval_shape(decode_, latents), video)
    self.assertEqual(CONFIG.latent_shape(pixel, 32, 48), latents.shape[1:])
    self.assertEqual(CONFIG.pixel_frames(latent), pixel)

  def test_the_first_latent_of_a_stream_is_one_frame_and_each_later_one_four(self):
    _, states = run_stream(make_latents(), [1] * 5, "decode")
    first = jax.eval_shape(lambda z: run_piece({}, z, "decode")[0], make_latents(1))
    later = jax.eval_shape(lambda z: run_piece(states[0], z, "decode")[0], make_latents(1))
    self.assertEqual((first.shape[1], later.shape[1]), (1, 4))


class NormalisationTest(absltest.TestCase):

  def test_encode_applies_the_moments_and_decode_inverts_them(self):
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 0.5, 1.0, 3.0)
    normed = vae.WanVAE(dataclasses.replace(CONFIG, latent_mean=mean, latent_std=std))
    video, latents = make_video(), make_latents()
    apply = jax.jit(normed.apply, static_argnames="method")
    encoded = apply({"params": make_params()}, video, method="encode")
    np.testing.assert_allclose(encoded, (run(video, "encode") - np.array(mean)) / np.array(std), atol=1e-5)
    decoded = apply({"params": make_params()}, latents, method="decode")
    np.testing.assert_allclose(decoded, run(latents * np.array(std) + np.array(mean), "decode"), atol=3e-5)


def _conv(taps, inputs, outputs):
  return taps * inputs * outputs + outputs


def _block(inputs, outputs):
  """Norm, 3x3x3, norm, 3x3x3, and a 1x1x1 shortcut where the width changes."""
  shortcut = 0 if inputs == outputs else _conv(1, inputs, outputs)
  return inputs + _conv(27, inputs, outputs) + outputs + _conv(27, outputs, outputs) + shortcut


def _middle(width):
  attention = width + _conv(1, width, 3 * width) + _conv(1, width, width)
  return 2 * _block(width, width) + attention


class FullSizeTest(absltest.TestCase):

  def test_the_wan_preset_has_the_published_parameters(self):
    module = vae.WanVAE(vae.PRESETS["wan"])
    params = nn.unbox(jax.eval_shape(lambda: store.init(module, jax.random.key(0))))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    encoder = (
        _conv(27, 3, 96)
        + 2 * _block(96, 96) + _conv(9, 96, 96)
        + _block(96, 192) + _block(192, 192) + _conv(9, 192, 192) + _conv(3, 192, 192)
        + _block(192, 384) + _block(384, 384) + _conv(9, 384, 384) + _conv(3, 384, 384)
        + 2 * _block(384, 384)
        + _middle(384) + 384 + _conv(27, 384, 32))
    # Each upsampling halves the width: the blocks after it begin with half of what their stage holds.
    decoder = (
        _conv(27, 16, 384) + _middle(384)
        + 3 * _block(384, 384) + _conv(3, 384, 768) + _conv(9, 384, 192)
        + _block(192, 384) + 2 * _block(384, 384) + _conv(3, 384, 768) + _conv(9, 384, 192)
        + 3 * _block(192, 192) + _conv(9, 192, 96)
        + 3 * _block(96, 96)
        + 96 + _conv(27, 96, 3))
    self.assertEqual(count(params["encoder"]), encoder)
    self.assertEqual(count(params["decoder"]), decoder)
    self.assertEqual(count(params), encoder + decoder + _conv(1, 32, 32) + _conv(1, 16, 16))
    self.assertEqual(count(params), 126_892_531)
    self.assertLen(module.config.latent_mean, 16)
    self.assertLen(module.config.latent_std, 16)


class ClipCodingTest(absltest.TestCase):

  def test_independent_chunks_are_coded_each_on_its_own(self):
    coding = latents_lib.ClipCoding(17, 16, 16, chunk_frames=2, independent_chunks=True)
    video = make_video()
    latents = jax.jit(functools.partial(coding.encode, VAE))(make_params(), video)
    pieces = [run(video[:, first:first + 5], "encode") for first in (0, 5, 10)]  # two frames are left over
    np.testing.assert_allclose(latents, jnp.concatenate(pieces, axis=1), atol=1e-5)
    self.assertEqual(coding.latent_shape(CONFIG), latents.shape[1:])
    self.assertEqual([coding.latent_frames(CONFIG, n) for n in (1, 5, 6, 10, 11)], [2, 2, 4, 4, 6])

    frames = codec.StreamDecoder(VAE, make_params(), independent_chunks=True).clip(latents, chunk_frames=2)
    expected = [run(latents[:, first:first + 2], "decode") for first in (0, 2, 4)]
    expected = latents_lib.to_uint8(jnp.concatenate(expected, axis=1))
    self.assertEqual(frames.shape, (2, 15, 16, 16, 3))
    np.testing.assert_allclose(frames.astype(int), expected, atol=1)  # one where rounding tips

  def test_one_stream(self):
    coding = latents_lib.ClipCoding(17, 16, 16, chunk_frames=5)
    video = make_video()
    latents = jax.jit(functools.partial(coding.encode, VAE))(make_params(), video)
    np.testing.assert_allclose(latents, run(video, "encode"), atol=1e-5)
    self.assertEqual(coding.latent_shape(CONFIG), (5, 2, 2, CONFIG.z_dim))
    self.assertEqual([coding.latent_frames(CONFIG, n) for n in (1, 2, 5, 6, 141)], [1, 2, 2, 3, 36])

  def test_a_chunk_must_divide_the_clip(self):
    coding = latents_lib.ClipCoding(33, 64, 64, chunk_frames=4)
    with self.assertRaisesRegex(errors.UserError, r"chunk_frames = 4 does not divide .* 9 latent frames \(33 pixel"):
      coding.latent_shape(CONFIG)


class ShippedTest(absltest.TestCase):

  def test_reconstructs_held_out_clips(self):
    module, params = weights.load("digit_world/vae")
    code = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    decoder = codec.StreamDecoder(module, params)
    ratios, latents = [], []
    for seed in range(8):
      video = digit_world.clip(seed, "validation")["video"]
      latents.append(code(latents_lib.to_unit(video)[None]))
      error = decoder.clip(latents[-1], chunk_frames=3)[0].astype(np.float64) - video
      ratios.append(20 * np.log10(255 / np.sqrt(np.mean(error**2))))
    self.assertGreaterEqual(np.mean(ratios), 30.0, ratios)
    # The diffusion models need latents of zero mean and unit variance.
    latents = np.concatenate(latents)
    self.assertEqual(latents.shape, (8, 9, 8, 8, 16))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0.0, atol=0.25)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1.0, atol=0.25)


if __name__ == "__main__":
  absltest.main()
