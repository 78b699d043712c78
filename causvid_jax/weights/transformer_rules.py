"""The transformer in the names of Wan 2.1 (also of the CausVid and Self-Forcing generators) and of diffusers.

Both keep linear layers as [out, in], where a Flax kernel is [in, out], the patch embedding as a convolution, whose
kernel covers one token, and modulation tables with a first axis of 1. Facts: `wan/modules/model.py` of
Wan-Video/Wan2.1 and `WanTransformer3DModel` of diffusers.
"""

from collections.abc import Mapping
import functools
import re
from typing import Any

from causvid_jax import errors
from causvid_jax.models import transformer
from causvid_jax.weights import rules

HEAD_DIM = 128  # of every published Wan transformer; shapes do not tell it

_TABLE = "1 n c -> n c"


def _linear(theirs: str, ours: str, pattern: str = "o i -> i o") -> tuple[rules.Rule, ...]:
  return (rules.Rule(f"{theirs}.weight", f"{ours}/kernel", pattern), rules.Rule(f"{theirs}.bias", f"{ours}/bias"))


def _patch(theirs: str, ours: str) -> tuple[rules.Rule, ...]:
  return _linear(theirs, ours, "o c 1 h w -> (h w c) o")


def _attention(theirs: str, ours: str, projections: str) -> tuple[rules.Rule, ...]:
  """`projections`: their names of q, k, v and the output, in this order."""
  linear = [_linear(f"{theirs}.{a}", f"{ours}/{b}") for a, b in zip(projections.split(), "qkvo")]
  norms = [rules.Rule(f"{theirs}.{norm}.weight", f"{ours}/{norm}/scale") for norm in ("norm_q", "norm_k")]
  return (*sum(linear, ()), *norms)


# The rules of every layer and size, by format.
RULES: dict[str, tuple[rules.Rule, ...]] = {
    "wan": (
        *_patch("patch_embedding", "patch_embed"),
        *_linear("text_embedding.0", "text_embed/up"),
        *_linear("text_embedding.2", "text_embed/down"),
        *_linear("time_embedding.0", "time_embed/up"),
        *_linear("time_embedding.2", "time_embed/down"),
        *_linear("time_projection.1", "time_embed/project"),
        rules.Rule("blocks.{}.modulation", "blocks/modulation", _TABLE),
        *_attention("blocks.{}.self_attn", "blocks/self_attn", "q k v o"),
        rules.Rule("blocks.{}.norm3.weight", "blocks/norm3/scale"),
        rules.Rule("blocks.{}.norm3.bias", "blocks/norm3/bias"),
        *_attention("blocks.{}.cross_attn", "blocks/cross_attn", "q k v o"),
        *_linear("blocks.{}.ffn.0", "blocks/ffn/up"),
        *_linear("blocks.{}.ffn.2", "blocks/ffn/down"),
        rules.Rule("head.modulation", "head/modulation", _TABLE),
        *_linear("head.head", "head/out"),
    ),
    "diffusers": (
        *_patch("patch_embedding", "patch_embed"),
        *_linear("condition_embedder.text_embedder.linear_1", "text_embed/up"),
        *_linear("condition_embedder.text_embedder.linear_2", "text_embed/down"),
        *_linear("condition_embedder.time_embedder.linear_1", "time_embed/up"),
        *_linear("condition_embedder.time_embedder.linear_2", "time_embed/down"),
        *_linear("condition_embedder.time_proj", "time_embed/project"),
        rules.Rule("blocks.{}.scale_shift_table", "blocks/modulation", _TABLE),
        *_attention("blocks.{}.attn1", "blocks/self_attn", "to_q to_k to_v to_out.0"),
        rules.Rule("blocks.{}.norm2.weight", "blocks/norm3/scale"),
        rules.Rule("blocks.{}.norm2.bias", "blocks/norm3/bias"),
        *_attention("blocks.{}.attn2", "blocks/cross_attn", "to_q to_k to_v to_out.0"),
        *_linear("blocks.{}.ffn.net.0.proj", "blocks/ffn/up"),
        *_linear("blocks.{}.ffn.net.2", "blocks/ffn/down"),
        rules.Rule("scale_shift_table", "head/modulation", _TABLE),
        *_linear("proj_out", "head/out"),
    ),
}

# What their config.json calls the attributes of our config.
_KEYS = {
    "wan": {
        "dim": "dim", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "in_dim": "in_channels", "out_dim": "out_channels",
        "num_heads": "num_heads", "num_layers": "num_layers", "eps": "eps", "text_len": "text_tokens"},
    "diffusers": {
        "attention_head_dim": "head_dim", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "in_channels": "in_channels",
        "out_channels": "out_channels", "num_attention_heads": "num_heads", "num_layers": "num_layers", "eps": "eps",
        "text_dim": "text_dim", "patch_size": "patch"},
}
_TEXT_TOKENS = 512  # what diffusers' pipelines assume, so that its config.json has no key for it

_CONSTANTS = {
    "wan": {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"},
    "diffusers": {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "added_kv_proj_dim": None,
        "cross_attn_norm": True, "image_dim": None, "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024},
}


def _config(name: str, shapes: rules.Shapes, config_json: Mapping[str, Any]) -> transformer.TransformerConfig:
  """The config that the shapes and, for heads, eps and text tokens, config.json tell; both must agree."""
  sizes = _sizes(name, shapes)
  keys = {**_KEYS[name], "text_len": "text_tokens"}
  told = {key: tuple(value) if isinstance(value := config_json[key], list) else value
          for key in keys if config_json.get(key) is not None}
  chosen = {"text_tokens": _TEXT_TOKENS, **{keys[key]: value for key, value in told.items()}}
  if "num_heads" not in chosen and sizes["dim"] % HEAD_DIM:
    raise errors.UserError(f"transformer: dim {sizes['dim']} does not split into heads of {HEAD_DIM}, as Wan's do: "
                           "expected a config.json beside the weights that tells the number of heads")
  try:
    config = transformer.TransformerConfig(
        **sizes, num_heads=int(chosen.get("num_heads", sizes["dim"] // HEAD_DIM)),
        text_tokens=int(chosen["text_tokens"]), eps=float(chosen.get("eps", 1e-6)))
    wrong = [f"{key} is {value}, the weights have {found}" for key, value in told.items()
             if (found := getattr(config, keys[key])) != value]
  except (TypeError, ValueError, ZeroDivisionError) as error:
    wrong = [str(error)]
  if wrong:
    raise errors.UserError(f"transformer: config.json does not describe these weights: {'; '.join(wrong)}")
  return config


def _sizes(name: str, shapes: rules.Shapes) -> dict[str, Any]:
  """The attributes of our config that the shapes tell."""
  theirs = {rule.ours: rule.theirs.format(0) for rule in RULES[name]}

  def shape(ours: str, rank: int) -> tuple[int, ...]:
    found = shapes.get(theirs[ours])
    if found is None or len(found) != rank:
      raise errors.UserError(f"transformer: {theirs[ours]} is {'missing' if found is None else found}, "
                             f"expected a tensor of {rank} axes")
    return found

  dim, in_channels, *patch = shape("patch_embed/kernel", 5)
  layers = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match]
  return {
      "dim": dim, "in_channels": in_channels, "patch": tuple(patch), "num_layers": max(layers, default=-1) + 1,
      "out_channels": shape("head/out/kernel", 2)[0] // (patch[1] * patch[2]),
      "ffn_dim": shape("blocks/ffn/up/kernel", 2)[0],
      "text_dim": shape("text_embed/up/kernel", 2)[1],
      "freq_dim": shape("time_embed/up/kernel", 2)[1],
  }


def _table(name: str, config: transformer.TransformerConfig) -> rules.Table:
  return rules.Table(RULES[name], config.num_layers, {"h": config.patch[1], "w": config.patch[2]})


def _description(name: str, config: transformer.TransformerConfig) -> dict[str, Any]:
  """A config.json for diffusers' WanTransformer3DModel or Wan's WanModel."""
  told = {key: getattr(config, field) for key, field in _KEYS[name].items()}
  if "text_len" not in told and config.text_tokens != _TEXT_TOKENS:
    told["text_len"] = config.text_tokens  # diffusers ignores it, we need it back
  return {**_CONSTANTS[name], **told}


FORMATS: dict[str, rules.Format] = {
    name: rules.Format(
        signature=signature, config=functools.partial(_config, name), table=functools.partial(_table, name),
        description=functools.partial(_description, name))
    for name, signature in (
        ("wan", "time_projection.1.weight"), ("diffusers", "condition_embedder.time_proj.weight"))
}
