"""Where each tool keeps the components of a text-to-video model: folders in, folders out."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from causvid_jax import errors
from causvid_jax.weights import files
from causvid_jax.weights import formats
from causvid_jax.weights import store

LAYOUTS = ("causvid_jax", "wan", "diffusers", "causvid")

_KINDS = tuple(formats.FORMATS)
_WAN_TRANSFORMER = "diffusion_pytorch_model"
_WAN_FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
              "tokenizer": "google/umt5-xxl"}

# How Wan 2.1 is sampled at 480p, and the students of CausVid and of Self-Forcing, which publishes an average.
_CLIP = {"negative_prompt": "", "fps": 16, "clip_frames": 81, "frame_size": [480, 832], "independent_chunks": False,
         "chunk_frames": 3}
_NOISE = {"schedule": "flow_matching", "prediction": "flow", "shift": 8.0}
_TEACHER = {"kind": "teacher", **_NOISE, "num_steps": 50, "solver": "unipc", "guidance": 6.0}
_CAUSVID = {"kind": "student", **_NOISE, "steps": [1000, 757, 522], "chunk_frames": 3, "sink_frames": 3,
            "window_frames": 15}
_SAMPLERS = {None: _TEACHER, "generator": _CAUSVID, "generator_ema": {**_CAUSVID, "steps": 4, "shift": 5.0}}

_MODEL_INDEX = {
    "_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
_SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "use_flow_sigmas": True,
              "prediction_type": "flow_prediction"}


@dataclasses.dataclass(frozen=True)
class Model:
  """A component, or several and a tokenizer: a pipeline.

  Attributes:
    components: by kind.
    tokenizer: the folder of the tokenizer, None for a lone component.
    settings: what pipeline.json says beside the places of the components; {} for a lone component.
  """
  components: Mapping[str, formats.Component]
  tokenizer: pathlib.Path | None
  settings: Mapping[str, Any]

  @property
  def is_pipeline(self) -> bool:
    return bool(self.settings)

  def part_for(self, layout: str) -> "Model":
    """What one of `LAYOUTS` has room for: CausVid's holds a transformer only.

    Raises:
      UserError: when that is nothing.
    """
    if layout != "causvid":
      return self
    if "transformer" not in self.components:
      raise errors.UserError(f"CausVid's files hold a transformer: expected one, got a {', '.join(self.components)}")
    return Model({"transformer": self.components["transformer"]}, None, {})


def open_pipeline(path: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, Any]]:
  """Where a pipeline folder of any layout keeps its parts, and the settings of one of ours; {} for other paths."""
  if (path / "pipeline.json").exists():
    folder, settings = store.load_pipeline(path)
    places = {part: store.resolve(settings.pop(part), folder) for part in (*_KINDS, "tokenizer") if part in settings}
    return places, settings
  if (path / "model_index.json").exists() or (path / "transformer").is_dir():
    places = {part: path / part for part in (*_KINDS, "tokenizer")}
  else:
    places = {part: path / name for part, name in _WAN_FILES.items()}
    if any(path.glob(f"{_WAN_TRANSFORMER}*")):
      places["transformer"] = path
    if sum(place.exists() for place in places.values()) < 2:  # a lone component
      return {}, {}
  return {part: place for part, place in places.items() if place.exists()}, {}


def open_model(path: pathlib.Path, select: str | None = None, base: pathlib.Path | None = None) -> Model:
  """Opens a component or a pipeline of any layout.

  Args:
    path: a pipeline's folder, or a component's folder or file.
    select: which generator of a training checkpoint; see `formats.open_component`.
    base: a pipeline that lends what `path` lacks.

  Raises:
    UserError: when anything is damaged, or the base has no use.
  """
  places, settings = open_pipeline(path)
  if not places:
    component = formats.open_component(path, select)
    if base is None:
      return Model({component.kind: component}, None, {})
    components = {component.kind: component}
  else:
    components = {kind: formats.open_component(places[kind], select if kind == "transformer" else None)
                  for kind in _KINDS if kind in places}
  lent, base_settings = open_pipeline(base) if base else ({}, {})
  if base and not lent:
    raise errors.UserError(f"{base} is no pipeline: expected a folder with the components that {path} lacks")
  lent = {**lent, **places}
  if missing := [part for part in (*_KINDS, "tokenizer") if part not in {**lent, **components}]:
    raise errors.UserError(f"{base or path} has no {', '.join(missing)}: expected a whole pipeline, or one component,"
                           " or a base with the rest")
  components |= {kind: formats.open_component(lent[kind]) for kind in _KINDS if kind not in components}
  if not (lent["tokenizer"] / "tokenizer.json").exists():
    raise errors.UserError(f"{lent['tokenizer']} has no tokenizer.json")
  return Model(components, lent["tokenizer"], _settings(components["transformer"], settings or base_settings))


def write(folder: pathlib.Path, model: Model, layout: str, progress: files.Progress = lambda size: None) -> None:
  """Writes a model in one of `LAYOUTS`; tensors are read and written piece by piece.

  Raises:
    UserError: when the layout cannot hold it, or it cannot be written; then nothing is left under the folder's name.
  """
  exports = {kind: _plan(component, layout) for kind, component in model.components.items()}
  in_folders = model.is_pipeline and layout in ("causvid_jax", "diffusers")
  with store.replacing(folder) as partial:
    for kind, component in model.components.items():
      place = partial / kind if in_folders else partial
      place.mkdir(exist_ok=True)
      _write_component(place, component, exports[kind], layout, progress)
    if model.is_pipeline:
      shutil.copytree(model.tokenizer, partial / ("tokenizer" if in_folders else _WAN_FILES["tokenizer"]))
      _write_settings(partial, model, layout)


def _plan(component: formats.Component, layout: str) -> Any:
  """The tensors and the config.json of an export, before anything is written; None for our own layout."""
  if layout == "causvid_jax":
    return None
  return formats.export(component, "wan" if layout == "causvid" else layout)


def _write_component(folder: pathlib.Path, component: formats.Component, export: Any, layout: str,
                     progress: files.Progress) -> None:
  if layout == "causvid_jax":
    store.write_component(folder, component.module, component.tensors, progress)
    return
  tensors, description = export
  if layout == "causvid":
    files.write_torch(folder / "model.pt", tensors,
                      lambda state: {"generator": {f"model.{name}": value for name, value in state.items()}}, progress)
    return
  if layout == "wan" and component.kind in _WAN_FILES:
    files.write_torch(folder / _WAN_FILES[component.kind], tensors, progress=progress)
  else:
    files.write_shards(folder, "model" if component.kind == "text_encoder" else _WAN_TRANSFORMER, tensors, progress)
  if description:
    _write_json(folder / "config.json", description)


def _write_settings(folder: pathlib.Path, model: Model, layout: str) -> None:
  if layout == "causvid_jax":
    parts = (*_KINDS, "tokenizer")
    _write_json(folder / "pipeline.json", {**dict(zip(parts, parts)), **model.settings})
  elif layout == "diffusers" and model.settings["sampler"]["schedule"] == "flow_matching":
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json",
                {**_SCHEDULER, "flow_shift": model.settings["sampler"]["shift"]})


def _settings(transformer: formats.Component, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The content of pipeline.json: `settings` of a pipeline of ours, as far as they go for a transformer of others."""
  if transformer.format == formats.OURS and settings:
    return dict(settings)
  return {**_CLIP, **settings, "sampler": _SAMPLERS[transformer.generator]}


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")
