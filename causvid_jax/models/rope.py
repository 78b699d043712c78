"""Three-dimensional rotary position embedding (RoPE) with frame positions that never run out.

Of the D/2 pairs of adjacent elements of a head, the last two thirds (rounded down, each) turn with the row
and the column of a token and the rest with its frame, each axis with its own ladder of frequencies 10000^(-2i
/ D_axis), as in Wan 2.1. An endless stream needs angles at frame ten million, where float32 holds no fraction
of a turn; so a position is split into its four bytes, and the angle of every byte, reduced modulo 2 pi in
float64 on the host, comes from a table of 256 rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 10_000.0
_BYTES = 4

Rotation = tuple[jax.Array, jax.Array]


@functools.lru_cache
def _byte_angles(pairs: int) -> np.ndarray:
  """Angles in (-pi, pi] of every byte value at every byte place, for `pairs` frequencies: [4, 256, pairs]."""
  frequencies = _BASE ** (-np.arange(pairs) / max(pairs, 1))
  positions = np.arange(256)[None, :] * 256.0 ** np.arange(_BYTES)[:, None]
  angles = np.mod(positions[..., None] * frequencies, 2 * np.pi)
  return np.where(angles > np.pi, angles - 2 * np.pi, angles).astype(np.float32)


def _angles(positions: jax.Array, pairs: int) -> jax.Array:
  """Angles of non-negative int32 positions [...], up to whole turns: float32 [..., pairs]."""
  tables = jnp.asarray(_byte_angles(pairs))
  return sum(tables[place][(positions >> (8 * place)) & 255] for place in range(_BYTES))


def rotations(frames: jax.Array, height: int, width: int, head_dim: int) -> Rotation:
  """Cosines and sines for every token of the given frames.

  Args:
    frames: non-negative int32 frame positions [...]; any int32 is exact to about 1e-6.
    height: rows of tokens in a frame.
    width: columns of tokens in a frame.
    head_dim: D, an even number.

  Returns:
    (cos, sin), each float32 [..., height * width, D/2]. With height = width = 1 only the frame turns, with
    frames = 0 only row and column do; one after the other equals both at once.
  """
  side = head_dim // 2 // 3
  time = _angles(jnp.asarray(frames, jnp.int32), head_dim // 2 - 2 * side)[..., None, None, :]
  rows = _angles(jnp.arange(height), side)[:, None]
  columns = _angles(jnp.arange(width), side)
  grid = (*time.shape[:-3], height, width)
  axes = [jnp.broadcast_to(axis, (*grid, axis.shape[-1])) for axis in (time, rows, columns)]
  angles = jnp.concatenate(axes, axis=-1).reshape(*time.shape[:-3], height * width, head_dim // 2)
  return jnp.cos(angles), jnp.sin(angles)


def apply(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Turns x [..., T, N, D] by a rotation [..., T, D/2] (leading axes broadcast), in float32."""
  cos, sin = (r[..., None, :] for r in rotation)
  even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)
