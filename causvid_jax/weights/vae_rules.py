"""Rules for the VAE: the names of Wan's `Wan2.1_VAE.pth` and of diffusers' AutoencoderKLWan.

Both number the layers of the encoder in one row. Wan does so in the decoder too, where diffusers names the stages, so
the rules of a size are laid out by a walk along the stages; what stands at each place is data.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import numpy as np

from causvid_jax import errors
from causvid_jax.models import vae
from causvid_jax.weights import rules

# What a layer holds: (their suffix, our suffix, from their axes to ours).
_BIAS = (".bias", "/bias", "o -> o")
_CONV = ((".weight", "/kernel", "o i t h w -> t h w i o"), _BIAS)
_IMAGE_CONV = ((".weight", "/kernel", "o i h w -> 1 h w i o"), _BIAS)
_NORM = ((".gamma", "/scale", "c 1 1 1 -> c"),)
_IMAGE_NORM = ((".gamma", "/scale", "c 1 1 -> c"),)

_KINDS = {"norm1": _NORM, "conv1/conv": _CONV, "norm2": _NORM, "conv2/conv": _CONV, "shortcut": _CONV}


@dataclasses.dataclass(frozen=True)
class _Names:
  """What a format calls the parts of the network.

  Attributes:
    block: the layers of a residual block, by our names.
    middle: block, attention, block.
    ends: of the encoder and the decoder alike: first convolution, last norm, last convolution.
    down: a layer of the encoder, "{layer}" its number.
    up_block: a block of the decoder, at "{layer}" of all layers, or "{block}" of a "{stage}".
    up: the upsampling after the blocks, likewise.
    to_moments: the 1x1x1 convolution after the encoder.
    from_latents: the one before the decoder.
  """
  block: Mapping[str, str]
  middle: tuple[str, str, str]
  ends: tuple[str, str, str]
  down: str
  up_block: str
  up: str
  to_moments: str
  from_latents: str


_WAN = _Names(
    block={"norm1": "residual.0", "conv1/conv": "residual.2", "norm2": "residual.3", "conv2/conv": "residual.6",
           "shortcut": "shortcut"},
    middle=("middle.0", "middle.1", "middle.2"), ends=("conv1", "head.0", "head.2"),
    down="downsamples.{layer}", up_block="upsamples.{layer}", up="upsamples.{layer}",
    to_moments="conv1", from_latents="conv2")

_DIFFUSERS = _Names(
    block={"norm1": "norm1", "conv1/conv": "conv1", "norm2": "norm2", "conv2/conv": "conv2",
           "shortcut": "conv_shortcut"},
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    ends=("conv_in", "norm_out", "conv_out"), down="down_blocks.{layer}",
    up_block="up_blocks.{stage}.resnets.{block}", up="up_blocks.{stage}.upsamplers.0",
    to_moments="quant_conv", from_latents="post_quant_conv")


def _layer(kind: tuple[tuple[str, str, str], ...], theirs: str, ours: str) -> list[rules.Rule]:
  return [rules.Rule(theirs + suffix, ours + our_suffix, pattern) for suffix, our_suffix, pattern in kind]


def _block(names: _Names, theirs: str, ours: str, shortcut: bool) -> Iterator[rules.Rule]:
  for our_name, name in names.block.items():
    if shortcut or our_name != "shortcut":
      yield from _layer(_KINDS[our_name], f"{theirs}.{name}", f"{ours}/{our_name}")


def _resample(theirs: str, ours: str, temporal: bool) -> Iterator[rules.Rule]:
  yield from _layer(_IMAGE_CONV, f"{theirs}.resample.1", f"{ours}/space")
  if temporal:
    yield from _layer(_CONV, f"{theirs}.time_conv", f"{ours}/time")


def _ends(names: _Names, half: str) -> Iterator[rules.Rule]:
  """The first, middle and last layers, which encoder and decoder share."""
  first, norm, last = names.ends
  block1, attention, block2 = (f"{half}.{name}" for name in names.middle)
  yield from _layer(_CONV, f"{half}.{first}", f"{half}/conv_in/conv")
  yield from _block(names, block1, f"{half}/middle/block1", shortcut=False)
  yield from _layer(_IMAGE_NORM, f"{attention}.norm", f"{half}/middle/attention/norm")
  yield from _layer(_IMAGE_CONV, f"{attention}.to_qkv", f"{half}/middle/attention/qkv")
  yield from _layer(_IMAGE_CONV, f"{attention}.proj", f"{half}/middle/attention/out")
  yield from _block(names, block2, f"{half}/middle/block2", shortcut=False)
  yield from _layer(_NORM, f"{half}.{norm}", f"{half}/norm_out")
  yield from _layer(_CONV, f"{half}.{last}", f"{half}/conv_out/conv")


def _encoder(names: _Names, config: vae.VAEConfig) -> Iterator[rules.Rule]:
  layer, width = 0, config.dim
  for stage, multiplier in enumerate(config.multipliers):
    for block in range(config.num_res_blocks):
      theirs, ours = f"encoder.{names.down.format(layer=layer)}", f"encoder/stage{stage}_block{block}"
      yield from _block(names, theirs, ours, shortcut=width != config.dim * multiplier)
      layer, width = layer + 1, config.dim * multiplier
    if stage < len(config.temporal_downsample):
      theirs, ours = f"encoder.{names.down.format(layer=layer)}", f"encoder/stage{stage}_down"
      yield from _resample(theirs, ours, config.temporal_downsample[stage])
      layer += 1


def _decoder(names: _Names, config: vae.VAEConfig) -> Iterator[rules.Rule]:
  layer, width = 0, config.dim * config.multipliers[-1]
  for stage, multiplier in enumerate(config.multipliers[::-1]):
    for block in range(config.num_res_blocks + 1):
      theirs = "decoder." + names.up_block.format(layer=layer, stage=stage, block=block)
      shortcut = width != config.dim * multiplier
      yield from _block(names, theirs, f"decoder/stage{stage}_block{block}", shortcut)
      layer, width = layer + 1, config.dim * multiplier
    if stage < len(config.temporal_downsample):
      theirs = "decoder." + names.up.format(layer=layer, stage=stage)
      yield from _resample(theirs, f"decoder/stage{stage}_up", config.temporal_downsample[::-1][stage])
      layer, width = layer + 1, width // 2  # upsampling halves the channels


def _table(names: _Names, config: vae.VAEConfig) -> rules.Table:
  return rules.Table((
      *_ends(names, "encoder"), *_encoder(names, config), *_layer(_CONV, names.to_moments, "to_moments"),
      *_layer(_CONV, names.from_latents, "from_latents"), *_ends(names, "decoder"), *_decoder(names, config)))


def _config(names: _Names, shapes: rules.Shapes, description: Mapping[str, Any]) -> vae.VAEConfig:
  """Sizes from a walk along the encoder; the latents' moments from config.json, else those published for Wan 2.1."""
  first, latents = f"encoder.{names.ends[0]}.weight", f"{names.from_latents}.weight"
  if missing := [name for name in (first, latents) if name not in shapes]:
    raise errors.UserError(f"{', '.join(missing)} missing: expected the whole VAE of Wan 2.1")
  dim, z_dim = shapes[first][0], shapes[latents][0]
  stages, temporal, layer = [[]], [], 0
  while True:
    name = f"encoder.{names.down.format(layer=layer)}"
    if conv := shapes.get(f"{name}.{names.block['conv1/conv']}.weight"):
      stages[-1].append(conv[0] // dim)
    elif f"{name}.resample.1.weight" in shapes:
      temporal.append(f"{name}.time_conv.weight" in shapes)
      stages.append([])
    else:
      break
    layer += 1
  if not all(stages) or any(other.startswith(f"{name}.") for other in shapes):
    raise errors.UserError(f"{name}: neither a residual block nor a resampling: expected the VAE of Wan 2.1")
  mean, std = _published_moments(z_dim)
  return vae.VAEConfig(
      dim=dim, z_dim=z_dim, multipliers=tuple(stage[-1] for stage in stages), num_res_blocks=len(stages[0]),
      temporal_downsample=tuple(temporal), latent_mean=tuple(description.get("latents_mean", mean)),
      latent_std=tuple(description.get("latents_std", std)))


def _published_moments(z_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """What Wan's own code normalises the latents by, whatever the weights: its files do not say."""
  published = vae.PRESETS["wan"]
  return (published.latent_mean, published.latent_std) if z_dim == published.z_dim else ((0.0,), (1.0,))


def _describe_for_wan(config: vae.VAEConfig) -> dict[str, Any]:
  if (config.latent_mean, config.latent_std) != _published_moments(config.z_dim):
    raise errors.UserError("Wan's VAE files have no place for this VAE's own latent mean and std, and its code applies"
                           " the published ones: expected those (the diffusers format keeps others)")
  return {}


def _describe_for_diffusers(config: vae.VAEConfig) -> dict[str, Any]:
  """The config.json of AutoencoderKLWan."""
  moment = lambda values: np.broadcast_to(values, config.z_dim).tolist()
  return {
      "_class_name": "AutoencoderKLWan", "base_dim": config.dim, "z_dim": config.z_dim,
      "dim_mult": list(config.multipliers), "num_res_blocks": config.num_res_blocks, "attn_scales": [],
      "temperal_downsample": list(config.temporal_downsample), "dropout": 0.0,
      "latents_mean": moment(config.latent_mean), "latents_std": moment(config.latent_std),
      "scale_factor_temporal": config.time_factor, "scale_factor_spatial": config.space_factor}


def _format(names: _Names, signature: str, description: Any) -> rules.Format:
  return rules.Format(signature, functools.partial(_config, names), functools.partial(_table, names), description)


# The signatures tell Wan 2.1's VAE from that of Wan 2.2, whose stages are nested one deeper.
FORMATS = {
    "wan": _format(_WAN, "encoder.downsamples.0.residual.2.weight", _describe_for_wan),
    "diffusers": _format(_DIFFUSERS, "encoder.down_blocks.0.conv1.weight", _describe_for_diffusers),
}
