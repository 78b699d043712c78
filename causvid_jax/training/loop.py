"""The training loop: the same for every stage, killed and resumed at any step."""

import contextlib
import pathlib
import time

from absl import logging
from flax import linen as nn
import jax
import ml_collections
import numpy as np

from causvid_jax import errors
from causvid_jax.data import pipelines
from causvid_jax.parallel import mesh as mesh_lib
from causvid_jax.training import checkpoints as checkpoints_lib
from causvid_jax.training import metrics as metrics_lib
from causvid_jax.training import rng
from causvid_jax.training import stages


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, restart: bool = False) -> None:
  """Trains `config.stage` in `workdir` until `config.num_steps`, from its newest checkpoint if there is one.

  Leaves `checkpoints/`, `metrics.jsonl`, `tensorboard/` and, at the end, `export/` (finished weights) in `workdir`.
  Every random number and every batch is a function of the seed and the step, so a run that is killed and started again
  ends with the same bits.

  Raises:
    UserError: on a config or a workdir that does not fit, and when updates stay non-finite.
  """
  stage = stages.create(config)  # a config that does not fit leaves no workdir behind
  mesh = mesh_lib.create_mesh(config.mesh.fsdp)
  if config.batch_size % (mesh.size * config.microbatches):
    raise errors.UserError(f"batch_size = {config.batch_size}: expected a multiple of {mesh.size} devices x"
                           f" {config.microbatches} microbatches")
  init_key = rng.stream_key(config.seed, "init")
  pretrained = stage.pretrained()
  shardings = mesh_lib.state_shardings(mesh, stage.init, init_key, pretrained)

  checkpoints_lib.claim(workdir, config.to_json_best_effort(sort_keys=True, indent=2), restart)
  iterator = pipelines.batches(stage.source, config.batch_size, config.seed, stage.transform)
  everywhere, by_example = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
  state = jax.jit(lambda *args: nn.unbox(stage.init(*args)), out_shardings=shardings)(init_key, pretrained)
  del pretrained
  frozen = jax.device_put(stage.frozen, everywhere)
  step_fn = jax.jit(stage.step, static_argnames="phase", donate_argnums=0, out_shardings=(shardings, everywhere))

  checkpoints = checkpoints_lib.Checkpoints(workdir, config.keep_checkpoints)
  first = 0
  if checkpoints.latest_step() is not None:
    state, first = checkpoints.restore(state, iterator)
    logging.info("continuing %s at step %d", workdir, first)

  writer = metrics_lib.MetricWriter(workdir, first, config.num_steps, config.stage)
  with contextlib.closing(checkpoints), writer:  # a run that fails still finishes the save under way
    collected, since = [], time.monotonic()
    for step in range(first, config.num_steps):
      batch = jax.device_put(next(iterator), by_example)
      state, metrics = step_fn(state, frozen, batch, rng.stream_key(config.seed, "step", step), phase=stage.phase(step))
      collected.append(metrics)
      done = step + 1
      if done % config.log_every == 0 or done == config.num_steps:
        means = _means(collected)
        _stop_if_diverged(collected, config, done)
        writer.scalars(done, means | {"steps_per_second": len(collected) / (time.monotonic() - since)})
        collected, since = [], time.monotonic()
      if config.preview_every and done % config.preview_every == 0:
        writer.samples(done, stage.preview(state), config.clip.fps)
      if done % config.checkpoint_every == 0 or done == config.num_steps:
        checkpoints.save(done, state, iterator)
      writer.advance()
  stage.export(state, workdir / "export")


def _means(collected: list[dict[str, jax.Array]]) -> dict[str, float]:
  """Mean of each metric over the steps that reported it."""
  names = dict.fromkeys(name for metrics in collected for name in metrics)
  return {name: float(np.mean([metrics[name] for metrics in collected if name in metrics])) for name in names}


def _stop_if_diverged(collected: list[dict[str, jax.Array]], config: ml_collections.ConfigDict, step: int) -> None:
  if max(int(metrics["skipped"]) for metrics in collected) >= config.optimizer.max_skipped:
    raise errors.UserError(f"training diverged by step {step}: updates stay non-finite (lower optimizer.learning_rate);"
                           " the last checkpoint is intact")
