"""The networks of Wan 2.1 in Flax Linen: transformer, VAE and text encoder, attention and caches."""
