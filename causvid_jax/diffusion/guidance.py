"""Classifier-free guidance (arXiv 2207.12598), in the one form that this library uses.

The trap: in DMD the CausVid authors write cond + w (cond - uncond), which is the usual form at scale w + 1.
Their w = 3.5 is a scale of 4.5 here; `scale_from_authors` converts.
"""

import jax


def classifier_free(cond: jax.Array, uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
  """Returns uncond + scale (cond - uncond): scale 1 is no guidance, 0 ignores the condition.

  The two predictions share a shape and a kind. At one x_t every kind is an affine function of every other
  (except at sigma = 0 or alpha = 0), so guidance of the flow, of x0 or of eps all give the same sample.
  """
  return uncond + scale * (cond - uncond)


def scale_from_authors(w: float) -> float:
  """Returns the `scale` of `classifier_free` that equals the authors' cond + w (cond - uncond)."""
  return w + 1.0
