"""The VAE against diffusers' AutoencoderKLWan, whole and streamed, and its rules for both formats."""

import dataclasses
import functools
import math
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from diffusers import AutoencoderKLWan
from diffusers.loaders import single_file_utils
import jax
import jax.numpy as jnp
import numpy as np
import torch

from causvid_jax import errors
from causvid_jax.models import vae
from causvid_jax.weights import rules
from causvid_jax.weights import tensors
from causvid_jax.weights import vae_rules
import parity
import tiny

WAN, DIFFUSERS = vae_rules.FORMATS["wan"], vae_rules.FORMATS["diffusers"]
TOLERANCE = 1e-4
FRAMES, HEIGHT, WIDTH = 13, 24, 40
# The published layout at an odd size, and another: time halved at other stages, an odd width (3 * 6 / 2) to upsample.
SIZES = {
    "published_layout": dict(
        base_dim=6, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True],
        latents_mean=[0.3, -0.7, 0.1, 0.5], latents_std=[1.5, 0.4, 2.0, 0.9]),
    "other_layout": dict(
        base_dim=6, z_dim=16, dim_mult=[1, 3, 2, 4], num_res_blocks=1, temperal_downsample=[True, False, True]),
}


@functools.cache
def make_theirs(size):
  module = parity.randomize(AutoencoderKLWan(**SIZES[size]), 0)
  with torch.no_grad():  # below 1: their decoder clips, ours leaves that to the caller
    module.decoder.conv_out.weight.mul_(0.1)
    module.decoder.conv_out.bias.mul_(0.1)
  return module


@functools.cache
def make_ours(size):
  theirs = make_theirs(size)
  return parity.to_ours(DIFFUSERS, vae.WanVAE, theirs.state_dict(), theirs.config)


@functools.cache
def make_inputs(size):
  """Video and (normalised) latents, channels last."""
  rng = np.random.default_rng(1)
  video = rng.uniform(-1, 1, (2, FRAMES, HEIGHT, WIDTH, 3))
  latents = rng.normal(size=(2, 1 + (FRAMES - 1) // 4, HEIGHT // 8, WIDTH // 8, SIZES[size]["z_dim"]))
  return video.astype(np.float32), latents.astype(np.float32)


def run_theirs(module, x, method):
  """Their `encode` (the mean, normalised) or `decode` with channels last, and their constants."""
  mean, std = (torch.tensor(x)[:, None, None, None] for x in (module.config.latents_mean, module.config.latents_std))
  x = torch.from_numpy(x).movedim(-1, 1)
  with torch.no_grad():
    if method == "encode":
      y = (module.encode(x).latent_dist.mode() - mean) / std
    else:
      y = module.decode(x * std + mean).sample
  return y.movedim(1, -1).numpy()


@functools.cache
def expected(size, method):
  return run_theirs(make_theirs(size), make_inputs(size)[method == "decode"], method)


@functools.partial(jax.jit, static_argnames=("size", "method"))
def run_piece(state, params, x, size, method):
  return make_ours(size)[0].apply({"params": params, **state}, x, method=method, mutable=["stream"])


class ParityTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    tiny.compile_fast(cls, pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())))

  @parameterized.product(size=tuple(SIZES), method=("encode", "decode"))
  def test_whole_clip(self, size, method):
    module, params = make_ours(size)
    x = make_inputs(size)[method == "decode"]
    ours = jax.jit(functools.partial(module.apply, method=method))({"params": params}, x)
    error = parity.error(ours, expected(size, method))
    print(f"VAE {size}, {method}, whole clip: relative error {error:.1e}")
    self.assertLess(error, TOLERANCE)
    if method == "decode":
      self.assertBetween(np.abs(expected(size, method)).max(), 0.1, 0.99)  # nothing was clipped

  @parameterized.parameters(("encode", (1, 8, 4)), ("encode", (5, 8)), ("decode", (1, 2, 1)), ("decode", (3, 1)))
  def test_streamed(self, method, pieces):
    size = "published_layout"
    params, x = make_ours(size)[1], make_inputs(size)[method == "decode"]
    state, parts = {}, []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
      part, state = run_piece(state, params, piece, size, method)
      parts.append(part)
    error = parity.error(jnp.concatenate(parts, axis=1), expected(size, method))
    print(f"VAE {method} in pieces of {pieces}: relative error {error:.1e}")
    self.assertLess(error, TOLERANCE)

  @parameterized.parameters("encode", "decode")
  def test_bfloat16(self, method):
    size = "other_layout"
    module, params = make_ours(size)
    module = vae.WanVAE(dataclasses.replace(module.config, dtype="bfloat16"))
    x = make_inputs(size)[method == "decode"]
    error = parity.error(jax.jit(functools.partial(module.apply, method=method))({"params": params}, x),
                         expected(size, method))
    print(f"VAE {method}, bfloat16: relative error {error:.1e}")
    self.assertBetween(error, 1e-4, 0.05)

  @parameterized.parameters(*SIZES)
  def test_config_from_shapes(self, size):
    theirs, config = SIZES[size], make_ours(size)[0].config
    self.assertEqual(
        (config.dim, config.z_dim, config.num_res_blocks, list(config.multipliers), list(config.temporal_downsample)),
        tuple(theirs[k] for k in ("base_dim", "z_dim", "num_res_blocks", "dim_mult", "temperal_downsample")))
    described = AutoencoderKLWan.from_config(DIFFUSERS.description(config)).config
    for key, value in make_theirs(size).config.items():
      if not key.startswith("_") and key != "decoder_base_dim":
        self.assertEqual(described[key], value, key)


class ExportTest(parameterized.TestCase):

  def test_what_diffusers_loads_gives_our_output(self):
    module = vae.WanVAE(vae.VAEConfig(dim=6, z_dim=4, num_res_blocks=1, latent_mean=(0.2,), latent_std=(1.7,)))
    params = tiny.randomized(module, 3)
    state = parity.to_theirs(DIFFUSERS, module, params)
    theirs = AutoencoderKLWan.from_config(DIFFUSERS.description(module.config)).eval()
    theirs.load_state_dict(parity.to_torch(state), strict=True)
    self.assertEqual(theirs.config.latents_mean, [0.2] * 4)
    video = make_inputs("published_layout")[0][:, :5]
    ours = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, video)
    self.assertLess(parity.error(ours, run_theirs(theirs, video, "encode")), TOLERANCE)

  @parameterized.parameters("wan", "diffusers")
  def test_there_and_back_is_the_identity(self, name):
    module, params = make_ours("published_layout")
    state = parity.to_theirs(vae_rules.FORMATS[name], module, params)
    description = vae_rules.FORMATS["diffusers"].description(module.config)
    again, params_again = parity.to_ours(vae_rules.FORMATS[name], vae.WanVAE, state, description)
    self.assertEqual(again.config, module.config)
    jax.tree.map(np.testing.assert_array_equal, params_again, params)

  def test_wan_names_are_those_that_diffusers_converts(self):
    module, params = make_ours("published_layout")
    state = parity.to_torch(parity.to_theirs(WAN, module, params))
    converted = single_file_utils.convert_wan_vae_to_diffusers(state)
    original = make_theirs("published_layout").state_dict()
    self.assertEqual(converted.keys(), original.keys())
    for name, tensor in original.items():
      np.testing.assert_array_equal(converted[name], tensor, name)


# Names and shapes in the published Wan2.1_VAE.pth, from the network that Wan's own code builds to read it.
PUBLISHED = {
    "encoder.conv1.weight": (96, 3, 3, 3, 3),
    "encoder.conv1.bias": (96,),
    "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
    "encoder.downsamples.0.residual.2.weight": (96, 96, 3, 3, 3),
    "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
    "encoder.downsamples.3.residual.2.weight": (192, 96, 3, 3, 3),
    "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
    "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
    "encoder.downsamples.8.resample.1.bias": (384,),
    "encoder.downsamples.8.time_conv.bias": (384,),
    "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
    "encoder.middle.0.residual.3.gamma": (384, 1, 1, 1),
    "encoder.middle.1.norm.gamma": (384, 1, 1),
    "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
    "encoder.middle.1.proj.bias": (384,),
    "encoder.head.0.gamma": (384, 1, 1, 1),
    "encoder.head.2.weight": (32, 384, 3, 3, 3),
    "conv1.weight": (32, 32, 1, 1, 1),
    "conv2.weight": (16, 16, 1, 1, 1),
    "decoder.conv1.weight": (384, 16, 3, 3, 3),
    "decoder.middle.2.residual.6.bias": (384,),
    "decoder.upsamples.2.residual.2.weight": (384, 384, 3, 3, 3),
    "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
    "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
    "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
    "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
    "decoder.upsamples.8.residual.2.weight": (192, 192, 3, 3, 3),
    "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
    "decoder.upsamples.14.residual.6.weight": (96, 96, 3, 3, 3),
    "decoder.head.0.gamma": (96, 1, 1, 1),
    "decoder.head.2.weight": (3, 96, 3, 3, 3),
}
PUBLISHED_SIZE = 126_892_531


def unread(shape):
  """A tensor of full size; only its shape may be asked for."""
  return tensors.Tensor(shape, np.dtype(np.float32), read=None)


class FullSizeTest(parameterized.TestCase):

  def test_wan_names_and_shapes(self):
    config = vae.PRESETS["wan"]
    expected_shapes = parity.shapes(vae.WanVAE(config))
    theirs = rules.to_theirs(WAN.table(config), {k: unread(v) for k, v in expected_shapes.items()}, "test")
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    self.assertEqual({name: shapes.get(name) for name in PUBLISHED}, PUBLISHED)
    self.assertEqual(sum(map(math.prod, shapes.values())), PUBLISHED_SIZE)
    self.assertNotIn("decoder.upsamples.11.time_conv.weight", shapes)  # the last upsampling is in space alone
    self.assertEqual(WAN.config(shapes, {}), config)  # the published mean and std among the rest
    ours = rules.to_ours(WAN.table(config), theirs, expected_shapes, "test")
    self.assertEqual({path: tensor.shape for path, tensor in ours.items()}, expected_shapes)

  def test_diffusers_names_and_shapes(self):
    config = vae.PRESETS["wan"]
    ours = {k: unread(v) for k, v in parity.shapes(vae.WanVAE(config)).items()}
    theirs = rules.to_theirs(DIFFUSERS.table(config), ours, "test")
    with torch.device("meta"):
      module = AutoencoderKLWan()  # its defaults are the published sizes
    self.assertEqual({name: tensor.shape for name, tensor in theirs.items()},
                     {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})

  @parameterized.parameters("wan", "diffusers")
  def test_signature_is_its_own(self, name):
    config = vae.PRESETS["test"]
    ours = {k: unread(v) for k, v in parity.shapes(vae.WanVAE(config)).items()}
    for other, form in vae_rules.FORMATS.items():
      names = rules.to_theirs(form.table(config), ours, "test")
      self.assertEqual(vae_rules.FORMATS[name].signature in names, name == other)


class ErrorsTest(absltest.TestCase):

  def test_wan_has_no_place_for_other_moments(self):
    with self.assertRaisesRegex(errors.UserError, "no place for this VAE's own latent mean and std"):
      WAN.description(vae.PRESETS["digit_world"])
    self.assertEqual(WAN.description(vae.PRESETS["wan"]), {})

  def test_incomplete_encoders_are_refused_by_name(self):
    state = parity.to_theirs(WAN, *make_ours("published_layout"))
    for gone, message in (("conv2.weight", "conv2.weight missing"),
                          ("encoder.downsamples.0.residual.2.weight", "downsamples.0: neither a residual block nor"),
                          ("encoder.downsamples.4.residual.2.weight", "downsamples.4: neither a residual block nor"),
                          ("decoder.upsamples.3.time_conv.bias", "decoder.upsamples.3.time_conv.bias missing")):
      with self.assertRaisesRegex(errors.UserError, message):
        parity.to_ours(WAN, vae.WanVAE, {k: v for k, v in state.items() if k != gone}, {})


if __name__ == "__main__":
  absltest.main()
