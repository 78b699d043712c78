"""Random streams: every random number of a run is a function of (seed, stream, step), so resuming is bit-exact."""

import zlib

import jax


def stream_key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
  """The key of a named stream at a step."""
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
  return jax.random.fold_in(key, step)
