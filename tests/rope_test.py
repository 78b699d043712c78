"""Tests of the three-dimensional rotary embedding."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.models import rope

HEAD_DIM = 32  # 16 pairs: 6 of time, 5 of rows, 5 of columns.
TIME, SIDE = 6, 5


def _reference_angles(frame: int, row: int, column: int) -> np.ndarray:
  """The 16 angles of one token in float64."""
  axes = ((frame, TIME), (row, SIDE), (column, SIDE))
  return np.concatenate([position * 10_000.0 ** (-2 * np.arange(n) / (2 * n)) for position, n in axes])


ROTATIONS = jax.jit(rope.rotations, static_argnums=(1, 2, 3))
APPLY = jax.jit(rope.apply)


class RopeTest(parameterized.TestCase):

  @parameterized.parameters(0, 1, 255, 256, 1_023, 65_537, 10_000_003, 2**31 - 1)
  def test_matches_float64_at_any_frame(self, frame):
    cos, sin = ROTATIONS(jnp.array([frame], jnp.int32), 3, 4, HEAD_DIM)
    self.assertEqual(cos.shape, (1, 12, HEAD_DIM // 2))
    for row, column in ((0, 0), (2, 1), (1, 3)):
      expected = _reference_angles(frame, row, column)
      np.testing.assert_allclose(cos[0, 4 * row + column], np.cos(expected), atol=5e-6)
      np.testing.assert_allclose(sin[0, 4 * row + column], np.sin(expected), atol=5e-6)

  def test_apply_turns_adjacent_pairs(self):
    x = jax.random.normal(jax.random.key(0), (2, 1, 2, 3, HEAD_DIM))
    y = APPLY(x, ROTATIONS(jnp.array([7]), 1, 2, HEAD_DIM))
    for column in range(2):
      pairs = np.asarray(x[:, 0, column]).reshape(2, 3, -1, 2)
      turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * _reference_angles(7, 0, column))
      np.testing.assert_allclose(y[:, 0, column, :, 0::2], turned.real, atol=1e-5)
      np.testing.assert_allclose(y[:, 0, column, :, 1::2], turned.imag, atol=1e-5)

  def test_space_then_time_equals_both_at_once(self):
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 1, HEAD_DIM))
    frames = jnp.array([4, 500])
    in_space = APPLY(x, ROTATIONS(jnp.zeros(1, jnp.int32), 2, 3, HEAD_DIM))
    both = APPLY(in_space, rope.rotations(frames, 1, 1, HEAD_DIM))
    np.testing.assert_allclose(both, APPLY(x, rope.rotations(frames, 2, 3, HEAD_DIM)), atol=1e-5)

  def test_scores_depend_on_distance_only(self):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, HEAD_DIM))

    def score(q_frame, k_frame):
      turn = lambda x, frame: APPLY(x, ROTATIONS(jnp.array([frame]), 1, 1, HEAD_DIM))
      return float(jnp.sum(turn(q, q_frame) * turn(k, k_frame)))

    for offset in (1, 1_000, 10_000_003, 2_000_000_000):
      self.assertAlmostEqual(score(9 + offset, 2 + offset), score(9, 2), delta=1e-4)
    self.assertGreater(abs(score(9, 3) - score(9, 2)), 1e-2)

  def test_keeps_dtype_and_computes_in_float32(self):
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, HEAD_DIM)).astype(jnp.bfloat16)
    rotation = ROTATIONS(jnp.array([1_000_001]), 1, 1, HEAD_DIM)
    y = APPLY(x, rotation)
    self.assertEqual(y.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(y, APPLY(x.astype(jnp.float32), rotation).astype(jnp.bfloat16))


if __name__ == "__main__":
  absltest.main()
