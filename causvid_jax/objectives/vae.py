"""The VAE's objective: reconstruction plus a light pull of the latents towards a standard normal."""

import jax
import jax.numpy as jnp


def gaussian_kl(mean: jax.Array, log_var: jax.Array) -> jax.Array:
  """Mean over elements of KL(N(mean, exp(log_var)) || N(0, 1)) (Kingma and Welling 2014, appendix B)."""
  return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var)


def vae_loss(vae, params, video: jax.Array, key: jax.Array, kl_weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """L1 + L2 reconstruction of `video` [B, F, H, W, 3] in [-1, 1] from sampled latents, plus `kl_weight` times the KL.

  `vae` has normalisation constants 0 and 1: those of the finished model are measured after training. Returns the loss
  and metrics, `psnr` in dB for pixels in [0, 1].
  """
  mean, log_var = vae.apply({"params": params}, video, method="moments")
  log_var = jnp.clip(log_var, -20.0, 10.0)
  z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
  error = vae.apply({"params": params}, z, method="decode") - video
  square = jnp.mean(jnp.square(error))
  kl = gaussian_kl(mean, log_var)
  loss = jnp.mean(jnp.abs(error)) + square + kl_weight * kl
  return loss, {"loss": loss, "kl": kl, "psnr": -10.0 * jnp.log10(square / 4.0)}
