"""Train states, and the update that all objectives share: microbatched gradients -> AdamW -> EMA."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(struct.PyTreeNode):
  """One network in training; `ema` is None where no average is kept."""
  params: Any
  opt_state: optax.OptState
  ema: Any = None


def create_optimizer(config: ml_collections.ConfigDict, num_updates: int) -> optax.GradientTransformation:
  """AdamW with clipping, warm-up and a cosine decay to `final_lr_ratio`; updates that are not finite are skipped.

  None is ever let through; the loop stops a run after `max_skipped` in a row.
  """
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup, max(num_updates, config.warmup + 1),
      config.learning_rate * config.final_lr_ratio)
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay))
  return optax.apply_if_finite(optimizer, np.iinfo(np.int32).max)


def create(params: Any, optimizer: optax.GradientTransformation, with_ema: bool = False) -> TrainState:
  ema = jax.tree.map(jnp.array, params) if with_ema else None
  return TrainState(params, optimizer.init(params), ema)


def gradients(loss: Loss, params: Any, batch: Any, key: jax.Array, microbatches: int) -> tuple[Any, dict[str, jax.Array]]:
  """Mean gradient and metrics of `loss(params, batch, key)` over equal parts of the batch, one part in memory at a time."""
  def part(batch, key):
    return jax.grad(loss, has_aux=True)(params, batch, key)

  if microbatches == 1:
    return part(batch, key)
  parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
  keys = jax.random.split(key, microbatches)
  start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), keys[0]))
  total, _ = jax.lax.scan(lambda sum_, xs: (jax.tree.map(jnp.add, sum_, part(*xs)), None), start, (parts, keys))
  return jax.tree.map(lambda x: x / microbatches, total)


def update(state: TrainState, grads: Any, optimizer: optax.GradientTransformation,
           ema_decay: float = 0.0) -> tuple[TrainState, dict[str, jax.Array]]:
  """Applies one optimiser update, and moves the average if the state has one."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
  metrics = {"grad_norm": optax.tree.norm(grads), "skipped": opt_state.notfinite_count}
  return TrainState(params, opt_state, ema), metrics
