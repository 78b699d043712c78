"""Makes videos on the command line: `python -m causvid_jax.sample --prompt="a red seven moving left" --output=out.mp4`.

With `--image` a video begins with a picture, with `--video` it follows another one, with `--schedule` its prompt
changes on the way, and with `--endless` it goes on until Ctrl-C. It is written as it is made.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import signal
import sys

from absl import flags
import numpy as np
import tqdm

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.data import video as video_lib
from causvid_jax.sampling import schedule as schedule_lib
from causvid_jax.sampling import stream as stream_lib

_PROMPT = flags.DEFINE_string("prompt", None, "What to show.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "A text file with a prompt a line, for many videos: the output's name gets _000, _001, ...")
_SCHEDULE = flags.DEFINE_string(
    "schedule", None, "Prompts that change, each at the first chunk that begins at its frame or later:"
    " '0: a red seven moving left; 120: a blue two moving up'.")
_OUTPUT = flags.DEFINE_string(
    "output", "out.mp4", "The file to write: .mp4, .gif, .webp, or .png for a file a frame, numbered where the name has"
    " %06d or else before the extension.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "digit_world", "A pipeline folder (a run's export, a converted or a downloaded model), or the name of"
    " what ships: digit_world, digit_world/ode or digit_world/teacher.")
_BASE = flags.DEFINE_string(
    "base", None, "A pipeline folder that lends what --checkpoint lacks, such as the VAE and the text encoder.")
_NUM_FRAMES = flags.DEFINE_integer(
    "num_frames", None, "Frames of the video (default: as long as --video, else a training clip).", lower_bound=1)
_ENDLESS = flags.DEFINE_boolean("endless", None, "Goes on until Ctrl-C or SIGTERM, which complete the file.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_IMAGE = flags.DEFINE_string("image", None, "An image that the video begins with.")
_VIDEO = flags.DEFINE_string("video", None, "A video to make anew.")
_SINK_FRAMES = flags.DEFINE_integer(
    "sink_frames", None, "First latent frames that are attended for ever (default: the checkpoint's).", lower_bound=0)
_WINDOW_FRAMES = flags.DEFINE_integer(
    "window_frames", None, "Last latent frames that are attended (default: the checkpoint's).", lower_bound=1)

# Options of the stream.
flags.DEFINE_enum(
    "policy", None, stream_lib.POLICIES, "What a prompt of --schedule does to the attended past: nothing, recompute it"
    " under the new prompt (default), or forget all but the sinks.")
flags.DEFINE_integer(
    "blend_chunks", None, "Chunks over which the embeddings move to a prompt of --schedule (default 0).", lower_bound=0)
flags.DEFINE_float(
    "strength", None, "How much of --video is made anew, more than 0 and at most 1 (default 0.9).", 0.0, 1.0)
flags.DEFINE_boolean(
    "one_step", None, "Denoises --video in one step, as in the paper, rather than in all that are left.")
flags.DEFINE_boolean("refresh", None, "Recomputes the attended past before every chunk, against drift.")

_STREAM_OPTIONS = ("policy", "blend_chunks", "strength", "one_step", "refresh")
_CAUSAL_ONLY = (*_STREAM_OPTIONS, "schedule", "endless", "image", "video", "sink_frames", "window_frames")
_NEEDS = {"policy": "schedule", "blend_chunks": "schedule", "strength": "video", "one_step": "video"}

flags.mark_flags_as_mutual_exclusive(["prompt", "prompts_file", "schedule"], required=True)
flags.mark_flags_as_mutual_exclusive(["image", "video"])
for _other in ("num_frames", "video", "prompts_file"):
  flags.mark_flags_as_mutual_exclusive(["endless", _other])


def main() -> None:
  for name, other in _NEEDS.items():
    if _given(name) and not _given(other):
      raise errors.UserError(f"--{name} has no use without --{other}")
  output = pathlib.Path(_OUTPUT.value)
  if _ENDLESS.value and output.suffix.lower() not in video_lib.ENDLESS_SUFFIXES:
    raise errors.UserError(f"--endless writes {' or '.join(video_lib.ENDLESS_SUFFIXES)}, not --output={output}")
  image = None if _IMAGE.value is None else video_lib.read_image(_IMAGE.value)
  videos = _videos(output)
  pipe = pipeline.Pipeline.from_checkpoint(
      _CHECKPOINT.value, base=_BASE.value, sink_frames=_SINK_FRAMES.value, window_frames=_WINDOW_FRAMES.value,
      keep_text_encoder=sum(len(schedule) for _, schedule in videos) > 1)
  if not pipe.causal and (unfit := [f"--{name}" for name in _CAUSAL_ONLY if _given(name)]):
    raise errors.UserError(f"{', '.join(unfit)}: {_CHECKPOINT.value} is bidirectional and makes clips from text only")
  with _interruptions() as interruptions:
    for path, schedule in videos:
      with video_lib.open_writer(path, pipe.fps) as writer:
        seconds = _stream(pipe, schedule, image, writer, interruptions) if pipe.causal else _clip(pipe, schedule, writer)
      print(f"{path}: {writer.frames} frames at {pipe.fps} a second, made at {writer.frames / seconds['total']:.1f} a"
            f" second, the first after {seconds['first_frames']:.2f} s")
      if interruptions:
        break
  if interruptions and not _ENDLESS.value:
    sys.exit(128 + interruptions[0])


def _videos(output: pathlib.Path) -> list[tuple[pathlib.Path, list[tuple[int, str]]]]:
  """The files to write, each with its schedule."""
  if _PROMPTS_FILE.value is None:
    schedule = [(0, _PROMPT.value)] if _SCHEDULE.value is None else schedule_lib.parse(_SCHEDULE.value)
    return [(output, schedule)]
  return [(output.with_name(f"{output.stem}_{i:03d}{output.suffix}"), [(0, prompt)])
          for i, prompt in enumerate(schedule_lib.read_prompts(_PROMPTS_FILE.value))]


def _clip(pipe: pipeline.Pipeline, schedule: list[tuple[int, str]], writer: video_lib.Writer) -> dict[str, float]:
  """Writes a clip of a bidirectional model; returns the seconds."""
  writer.write(pipe(schedule[0][1], _NUM_FRAMES.value, _SEED.value))
  return pipe.seconds


def _stream(pipe: pipeline.Pipeline, schedule: list[tuple[int, str]], image: np.ndarray | None,
            writer: video_lib.Writer, interruptions: list[int]) -> dict[str, float]:
  """Streams a causal model until the video is as long as asked for, or something interrupts; returns the seconds."""
  source, frames = None, _NUM_FRAMES.value
  if _VIDEO.value is not None:
    source = video_lib.read_frames(_VIDEO.value, pipe.fps)
  elif frames is None and not _ENDLESS.value:
    frames = pipe.clip_frames
  options = {name: flags.FLAGS[name].value for name in _STREAM_OPTIONS if _given(name)}
  stream = pipe.stream(schedule[0][1], _SEED.value, image=image, video=source, schedule=schedule[1:], **options)
  # The delay hides the bar until there are frames: what goes wrong before is one line.
  with tqdm.tqdm(total=frames, desc=writer.path.name, unit="frame", delay=1e-6) as bar:
    for chunk in stream:
      chunk = chunk[:frames and frames - writer.frames]
      writer.write(chunk)
      bar.update(len(chunk))
      if writer.frames == frames or interruptions:
        break
  return stream.seconds


def _given(name: str) -> bool:
  value = flags.FLAGS[name].value
  return value is not None and value is not False


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
  """Collects the first SIGINT or SIGTERM instead of dying of it, so that files are completed; the second one kills."""
  numbers: list[int] = []
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def collect(number, frame):
    del frame
    numbers.append(number)
    restore()

  for number in before:
    signal.signal(number, collect)
  try:
    yield numbers
  finally:
    restore()


if __name__ == "__main__":
  errors.run(main)
