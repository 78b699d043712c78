"""Converts weights between tools: `python -m causvid_jax.convert --source=Wan2.1-T2V-1.3B --output=weights/wan_1_3b`.

What the source is, is detected: a file or folder of Wan 2.1, diffusers, CausVid, Self-Forcing or our own. Tensors keep
their types and are read and written piece by piece, so that the model need not fit in memory.
"""

import dataclasses
import pathlib

from absl import flags
import tqdm

from causvid_jax import errors
from causvid_jax.weights import formats
from causvid_jax.weights import layouts
from causvid_jax.weights import store

_SOURCE = flags.DEFINE_string(
    "source", None, "A component's file or folder, or a pipeline's folder, of any tool; or the name of what ships.",
    required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to make; it must not exist.", required=True)
_TO = flags.DEFINE_enum("to", "causvid_jax", layouts.LAYOUTS, "Whose files to write.")
_SELECT = flags.DEFINE_enum(
    "select", None, formats.GENERATORS,
    "Which network of a training checkpoint of CausVid or Self-Forcing (default: the averaged one, if it is there).")
_LORA = flags.DEFINE_multi_string("lora", [], "A LoRA's file to add to the transformer; may be repeated.")
_LORA_SCALE = flags.DEFINE_multi_float(
    "lora_scale", [1.0], "How much of it; one for all, or one for each --lora in turn.")
_BASE = flags.DEFINE_string(
    "base", None, "A pipeline, of any tool, whose VAE, text encoder and tokenizer complete a lone transformer.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "The type to write (default: each tensor keeps its own).")


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  if output.exists():
    raise errors.UserError(f"--output={output} exists: expected the name of a new folder")
  base = store.resolve(_BASE.value) if _BASE.value else None
  model = layouts.open_model(store.resolve(_SOURCE.value), _SELECT.value, base).part_for(_TO.value)
  components = dict(model.components)
  for path, scale in zip(_LORA.value, _lora_scales()):
    if "transformer" not in components:
      raise errors.UserError(f"--lora={path}: expected a transformer to add it to, got a {', '.join(components)}")
    components["transformer"] = formats.merge_lora(components["transformer"], pathlib.Path(path), scale)
  if _DTYPE.value:
    components = {kind: component.astype(_DTYPE.value) for kind, component in components.items()}
  size = sum(component.nbytes for component in components.values())
  with tqdm.tqdm(total=size, desc="converting", unit="B", unit_scale=True, delay=0.1) as bar:
    layouts.write(output, dataclasses.replace(model, components=components), _TO.value, bar.update)
  print(f"{output}: {', '.join(components)}, {size / 1e9:.2f} GB")


def _lora_scales() -> list[float]:
  loras, scales = _LORA.value, _LORA_SCALE.value
  if len(scales) not in (1, len(loras)):
    raise errors.UserError(
        f"{len(scales)} of --lora_scale for {len(loras)} of --lora: expected one for all, or one each")
  return scales * len(loras) if len(scales) == 1 else scales


if __name__ == "__main__":
  errors.run(main)
