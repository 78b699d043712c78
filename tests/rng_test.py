"""The random streams: distinct, reproducible in another process, and the same inside a compiled program."""

from absl.testing import absltest
import jax
import numpy as np

from causvid_jax.training import rng


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


class RngTest(absltest.TestCase):

  def test_every_seed_stream_and_step_has_its_own_key(self):
    keys = {bits(rng.stream_key(seed, stream, step))
            for seed in (0, 1, 2**31 - 1) for stream in ("init", "step", "data", "") for step in range(5)}
    self.assertLen(keys, 3 * 4 * 5)

  def test_is_a_constant_of_its_arguments(self):
    # Pinned: a change of these would break the resumption of every run made before it.
    self.assertEqual(bits(rng.stream_key(0, "init")), (517294207, 118925294))
    self.assertEqual(bits(rng.stream_key(42, "step", 1000)), (2044796474, 3218535179))

  def test_traced_steps_give_the_same_keys(self):
    traced = jax.jit(lambda step: rng.stream_key(7, "step", step))
    for step in (0, 1, 123456):
      self.assertEqual(bits(traced(step)), bits(rng.stream_key(7, "step", step)))

  def test_neighbouring_steps_are_uncorrelated(self):
    draws = np.stack([jax.random.normal(rng.stream_key(0, "step", step), (5000,)) for step in range(4)])
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(4), atol=0.06)


if __name__ == "__main__":
  absltest.main()
