"""Times streaming with the student against whole clips by the teacher, in one run.

`python -m causvid_jax.benchmark [--student=digit_world --teacher=digit_world/teacher --repeats=5]`
"""

import statistics

from absl import flags
import jax
import tqdm

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.evaluation import report

_STUDENT = flags.DEFINE_string("student", "digit_world", "Pipeline of the student.")
_TEACHER = flags.DEFINE_string("teacher", "digit_world/teacher", "Pipeline of the teacher.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed videos of each, in turn, after one that compiles.", lower_bound=1)
_PROMPT = flags.DEFINE_string("prompt", "a red seven moving left", "The prompt.")


def measure(student: pipeline.Pipeline, teacher: pipeline.Pipeline, prompt: str,
            repeats: int) -> dict[str, dict[str, float]]:
  """Medians over `repeats` clips of both, taken in turn: frames a second, and seconds until the first frames."""
  pipes = {"student": student, "teacher": teacher}
  seconds = {name: [] for name in pipes}
  for repeat in tqdm.trange(repeats + 1, desc="benchmark", unit="pair"):
    for name, pipe in pipes.items():
      pipe(prompt, seed=repeat)
      if repeat:
        seconds[name].append(dict(pipe.seconds))
  rows = {}
  for name, pipe in pipes.items():
    rows[name] = {
        "frames a second": pipe.clip_frames / statistics.median(s["total"] for s in seconds[name]),
        "first frames after (ms)": 1000 * statistics.median(s["first_frames"] for s in seconds[name])}
  rows["student is better by"] = {
      "frames a second": rows["student"]["frames a second"] / rows["teacher"]["frames a second"],
      "first frames after (ms)": rows["teacher"]["first frames after (ms)"] / rows["student"]["first frames after (ms)"]}
  return rows


def main() -> None:
  student, teacher = map(pipeline.Pipeline.from_checkpoint, (_STUDENT.value, _TEACHER.value))
  rows = measure(student, teacher, _PROMPT.value, _REPEATS.value)
  device = jax.devices()[0]
  print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, {student.clip_frames} frames a clip\n")
  print(report.table(rows))


if __name__ == "__main__":
  errors.run(main)
