"""CausVid in JAX and Flax: distils a slow bidirectional video diffusion model into a fast causal one, and streams it."""
