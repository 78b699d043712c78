"""Rules for the text encoder: Wan's `models_t5_umt5-xxl-enc-bf16.pth` and transformers' UMT5EncoderModel."""

from collections.abc import Mapping
import functools
from typing import Any

from causvid_jax import errors
from causvid_jax.models import text_encoder
from causvid_jax.weights import rules

_LINEAR = "o i -> i o"

_WAN = (
    rules.Rule("token_embedding.weight", "token_embed/embedding"),
    rules.Rule("blocks.{}.norm1.weight", "blocks/norm1/scale"),
    rules.Rule("blocks.{}.attn.q.weight", "blocks/attn/q/kernel", _LINEAR),
    rules.Rule("blocks.{}.attn.k.weight", "blocks/attn/k/kernel", _LINEAR),
    rules.Rule("blocks.{}.attn.v.weight", "blocks/attn/v/kernel", _LINEAR),
    rules.Rule("blocks.{}.attn.o.weight", "blocks/attn/o/kernel", _LINEAR),
    rules.Rule("blocks.{}.pos_embedding.embedding.weight", "blocks/attn/relative_bias"),
    rules.Rule("blocks.{}.norm2.weight", "blocks/norm2/scale"),
    rules.Rule("blocks.{}.ffn.gate.0.weight", "blocks/ffn/wi_0/kernel", _LINEAR),
    rules.Rule("blocks.{}.ffn.fc1.weight", "blocks/ffn/wi_1/kernel", _LINEAR),
    rules.Rule("blocks.{}.ffn.fc2.weight", "blocks/ffn/wo/kernel", _LINEAR),
    rules.Rule("norm.weight", "norm/scale"),
)

_DIFFUSERS = (
    rules.Rule("shared.weight", "token_embed/embedding"),
    rules.Rule("encoder.block.{}.layer.0.layer_norm.weight", "blocks/norm1/scale"),
    rules.Rule("encoder.block.{}.layer.0.SelfAttention.q.weight", "blocks/attn/q/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.0.SelfAttention.k.weight", "blocks/attn/k/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.0.SelfAttention.v.weight", "blocks/attn/v/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.0.SelfAttention.o.weight", "blocks/attn/o/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight", "blocks/attn/relative_bias"),
    rules.Rule("encoder.block.{}.layer.1.layer_norm.weight", "blocks/norm2/scale"),
    rules.Rule("encoder.block.{}.layer.1.DenseReluDense.wi_0.weight", "blocks/ffn/wi_0/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.1.DenseReluDense.wi_1.weight", "blocks/ffn/wi_1/kernel", _LINEAR),
    rules.Rule("encoder.block.{}.layer.1.DenseReluDense.wo.weight", "blocks/ffn/wo/kernel", _LINEAR),
    rules.Rule("encoder.final_layer_norm.weight", "norm/scale"),
)


def _config(table: tuple[rules.Rule, ...], shapes: rules.Shapes,
            description: Mapping[str, Any]) -> text_encoder.TextEncoderConfig:
  """Sizes from the shapes; the two that no shape tells from config.json, else as in UMT5."""
  theirs = {rule.ours: rule.theirs for rule in table}
  q, bias, wi = (theirs[f"blocks/{name}"] for name in ("attn/q/kernel", "attn/relative_bias", "ffn/wi_0/kernel"))
  wanted = [theirs["token_embed/embedding"], *(name.format(0) for name in (q, bias, wi))]
  if missing := [name for name in wanted if name not in shapes]:
    raise errors.UserError(f"{', '.join(missing)} missing: expected the whole encoder of UMT5")
  (vocab_size, dim), (inner, _), (num_buckets, num_heads), (ffn_dim, _) = (shapes[name] for name in wanted)
  num_layers = 1
  while any(rule.theirs.format(num_layers) in shapes for rule in table if "{}" in rule.theirs):
    num_layers += 1
  defaults = text_encoder.PRESETS["umt5_xxl"]
  return text_encoder.TextEncoderConfig(
      vocab_size=vocab_size, dim=dim, num_heads=num_heads, head_dim=inner // num_heads, ffn_dim=ffn_dim,
      num_layers=num_layers, num_buckets=num_buckets,
      max_distance=description.get("relative_attention_max_distance", defaults.max_distance),
      eps=description.get("layer_norm_epsilon", defaults.eps))


def _describe_for_wan(config: text_encoder.TextEncoderConfig) -> dict[str, Any]:
  defaults = text_encoder.PRESETS["umt5_xxl"]
  if (config.max_distance, config.eps) != (defaults.max_distance, defaults.eps):
    raise errors.UserError(
        f"Wan's text encoder files have no place for max_distance = {config.max_distance}, eps = {config.eps}:"
        f" expected {defaults.max_distance} and {defaults.eps} (the diffusers format keeps others)")
  return {}


def _describe_for_transformers(config: text_encoder.TextEncoderConfig) -> dict[str, Any]:
  """The config.json of UMT5EncoderModel."""
  return {
      "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": config.vocab_size,
      "d_model": config.dim, "d_kv": config.head_dim, "d_ff": config.ffn_dim, "num_layers": config.num_layers,
      "num_heads": config.num_heads, "relative_attention_num_buckets": config.num_buckets,
      "relative_attention_max_distance": config.max_distance, "layer_norm_epsilon": config.eps,
      "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1}


def _format(table: tuple[rules.Rule, ...], signature: str, description: Any,
            repeated: tuple[str, ...] = ()) -> rules.Format:
  return rules.Format(signature, functools.partial(_config, table),
                      lambda config: rules.Table(table, config.num_layers, repeated=repeated), description)


FORMATS = {
    "wan": _format(_WAN, "blocks.0.ffn.gate.0.weight", _describe_for_wan),
    "diffusers": _format(_DIFFUSERS, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", _describe_for_transformers,
                         repeated=("encoder.embed_tokens.weight",)),
}
