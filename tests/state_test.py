"""Microbatched gradients, and the shared update: AdamW by hand, the non-finite guard and the average."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from causvid_jax.training import state as state_lib


def config(**changes):
  return ml_collections.ConfigDict(dict(
      learning_rate=0.1, warmup=3, final_lr_ratio=0.1, clip_norm=1.0, b1=0.8, b2=0.95, weight_decay=0.05,
      max_skipped=2) | changes)


def initial_params():
  return {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array([0.25])}


def gradient(*values):
  return {"w": jnp.array(values[:3]), "b": jnp.array(values[3:])}


def square_loss(params, batch, key):
  del key
  error = batch["x"] @ params["w"] + params["b"] - batch["y"]
  return jnp.mean(jnp.square(error)), {"error": jnp.mean(jnp.abs(error))}


def adamw_by_hand(params, grads, c, num_updates):
  """The parameters after each of `grads`: clip, Adam, decoupled decay; warm-up from 0, then cosine."""
  m, v, states = np.zeros_like(params), np.zeros_like(params), []
  for n, grad in enumerate(grads):
    grad = grad * min(1.0, c.clip_norm / np.linalg.norm(grad))
    m, v = c.b1 * m + (1 - c.b1) * grad, c.b2 * v + (1 - c.b2) * grad**2
    if n < c.warmup:
      rate = c.learning_rate * n / c.warmup
    else:
      cosine = 0.5 * (1 + np.cos(np.pi * (n - c.warmup) / (num_updates - c.warmup)))
      rate = c.learning_rate * (c.final_lr_ratio + (1 - c.final_lr_ratio) * cosine)
    step = (m / (1 - c.b1**(n + 1))) / (np.sqrt(v / (1 - c.b2**(n + 1))) + 1e-8)
    params = params - rate * (step + c.weight_decay * params)
    states.append(params)
  return states


class GradientsTest(parameterized.TestCase):

  @parameterized.parameters(2, 3, 6, 12)
  def test_microbatches_equal_the_full_batch(self, microbatches):
    x = jax.random.normal(jax.random.key(0), (12, 3))
    batch = {"x": x, "y": jnp.arange(12.0)}
    run = jax.jit(state_lib.gradients, static_argnums=(0, 4))
    full = run(square_loss, initial_params(), batch, jax.random.key(1), 1)
    parts = run(square_loss, initial_params(), batch, jax.random.key(1), microbatches)
    chex.assert_trees_all_close(parts, full, rtol=1e-5)
    error = x @ initial_params()["w"] + 0.25 - batch["y"]
    np.testing.assert_allclose(full[0]["w"], 2 * (error @ x) / 12, rtol=1e-5)

  def test_every_part_has_its_own_key_and_examples(self):
    def loss(params, batch, key):
      draw = jax.random.normal(key)
      spread = jnp.max(batch) - jnp.min(batch)
      return params * draw, {"square": draw**2, "sum": jnp.sum(batch), "spread": spread}
    grad, metrics = state_lib.gradients(loss, 1.0, jnp.arange(8.0), jax.random.key(0), 4)
    # A mean of four draws, not one draw four times.
    self.assertGreater(metrics["square"] - grad**2, 0.01)
    self.assertEqual(metrics["sum"], 7.0)
    # Parts take every fourth example, so that a batch sharded over devices stays so in each part.
    self.assertEqual(metrics["spread"], 4.0)


class UpdateTest(absltest.TestCase):

  def test_matches_adamw_by_hand(self):
    # Norms on both sides of the clip: Adam forgives a constant scale of the gradients, but not these.
    grads = [np.array(g) for g in (
        [30.0, -40.0, 5.0, 1.0], [0.1, 0.2, -0.1, 0.3], [9.0, 2.0, -7.0, 4.0], [0.3, -0.2, 0.1, 0.1],
        [-0.5, 0.1, 0.2, -0.6], [2.0, 2.0, 2.0, -2.0], [0.1, 0.1, 0.1, 0.1])]
    optimizer = state_lib.create_optimizer(config(), num_updates=7)
    state, expected = state_lib.create(initial_params(), optimizer), np.array([0.5, -1.0, 2.0, 0.25])
    update = jax.jit(lambda state, grads: state_lib.update(state, grads, optimizer))
    for grad, expected in zip(grads, adamw_by_hand(expected, grads, config(), 7)):
      state, metrics = update(state, gradient(*grad))
      np.testing.assert_allclose(np.append(state.params["w"], state.params["b"]), expected, rtol=1e-5)
      np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-6)
      self.assertEqual(metrics["skipped"], 0)
    self.assertIsNone(state.ema)

  def test_a_warmup_longer_than_the_run(self):
    optimizer = state_lib.create_optimizer(config(warmup=100, weight_decay=0.0), num_updates=5)
    state = state_lib.create({"w": jnp.zeros(1)}, optimizer)
    for _ in range(3):
      state, _ = state_lib.update(state, {"w": jnp.ones(1)}, optimizer)
    np.testing.assert_allclose(state.params["w"], -0.1 * (0 + 1 + 2) / 100, rtol=1e-5)

  def test_non_finite_updates_are_skipped_and_counted(self):
    optimizer = state_lib.create_optimizer(config(warmup=0), num_updates=100)
    update = jax.jit(lambda state, grads: state_lib.update(state, grads, optimizer))
    state, metrics = update(state_lib.create(initial_params(), optimizer), gradient(1.0, 2.0, 3.0, 4.0))
    self.assertGreater(jnp.max(jnp.abs(state.params["w"] - initial_params()["w"])), 0.05)
    before = state
    for count, bad in ((1, jnp.nan), (2, jnp.inf), (3, jnp.nan), (4, jnp.nan)):  # past `max_skipped` too
      state, metrics = update(state, gradient(1.0, bad, 3.0, 4.0))
      self.assertEqual(metrics["skipped"], count)
      chex.assert_trees_all_equal(state.params, before.params)
      chex.assert_trees_all_equal(state.opt_state.inner_state, before.opt_state.inner_state)
    # A finite one goes on as if nothing had been, and the count begins again.
    good = gradient(0.1, -0.2, 0.3, 0.4)
    state, metrics = update(state, good)
    self.assertEqual(metrics["skipped"], 0)
    chex.assert_trees_all_equal(state.params, update(before, good)[0].params)
    self.assertEqual(update(state, gradient(jnp.nan, 0.0, 0.0, 0.0))[1]["skipped"], 1)

  def test_average_in_closed_form(self):
    optimizer, decay = optax.apply_if_finite(optax.sgd(1.0), 0), 0.9
    state = state_lib.create({"w": jnp.float32(1.0)}, optimizer, with_ema=True)
    self.assertEqual(state.ema, {"w": 1.0})
    for _ in range(6):
      state, _ = state_lib.update(state, {"w": jnp.float32(-1.0)}, optimizer, decay)
    # The parameters are 2, 3, ..., 7 after the updates.
    expected = decay**6 + sum(0.1 * decay**(6 - n) * (1 + n) for n in range(1, 7))
    np.testing.assert_allclose(state.params["w"], 7.0, rtol=1e-6)
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)

  def test_the_average_is_a_copy(self):
    # A state whose average shared buffers with its parameters could not be donated.
    optimizer = state_lib.create_optimizer(config(), 10)
    state = state_lib.create(initial_params(), optimizer, with_ema=True)
    update = jax.jit(lambda state: state_lib.update(state, state.params, optimizer, 0.5)[0], donate_argnums=0)
    updated = update(state)
    self.assertTrue(state.params["w"].is_deleted())
    np.testing.assert_array_equal(updated.ema["w"], initial_params()["w"])


if __name__ == "__main__":
  absltest.main()
