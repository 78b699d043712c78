"""Makes a video from a prompt: `python -m causvid_jax.sample --prompt="a red seven moving left" --output=out.mp4`."""

from absl import flags
import tqdm

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.data import video

_PROMPT = flags.DEFINE_string("prompt", None, "What to show.", required=True)
_OUTPUT = flags.DEFINE_string("output", "out.mp4", "The MP4 file to write.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "digit_world", "A pipeline folder (a run's export), or the name of what ships: digit_world,"
    " digit_world/ode or digit_world/teacher.")
_NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames of the video (default: as long as a training clip).")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def main() -> None:
  pipe = pipeline.Pipeline.from_checkpoint(_CHECKPOINT.value)
  frames = pipe.clip_frames if _NUM_FRAMES.value is None else _NUM_FRAMES.value
  if frames < 1:
    raise errors.UserError(f"--num_frames={frames}: expected at least 1")
  with video.VideoWriter(_OUTPUT.value, pipe.fps) as writer:
    if not pipe.causal:
      writer.write(pipe(_PROMPT.value, frames, _SEED.value))
    else:
      left = frames
      with tqdm.tqdm(total=frames, desc="streaming", unit="frame") as bar:
        for chunk in pipe.stream(_PROMPT.value, _SEED.value):
          writer.write(chunk[:left])
          bar.update(min(left, len(chunk)))
          left -= len(chunk)
          if left <= 0:
            break
  print(f"{_OUTPUT.value}: {frames} frames at {pipe.fps} a second")


if __name__ == "__main__":
  errors.run(main)
