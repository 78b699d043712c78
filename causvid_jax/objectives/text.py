"""How the digit world's text encoder is trained: each position must know its neighbours.

Cross-attention reads one position at a time, so the embedding of "seven" itself has to say that the seven is
red and moves left. A linear head (`text_encoder.ContextHead`) therefore reads the surrounding tokens off each
embedding, as in the skip-gram model (arXiv 1301.3781); it is thrown away after training.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

OFFSETS = tuple(range(-4, 5))


def context_loss(logits: jax.Array, ids: jax.Array, mask: jax.Array,
                 offsets: Sequence[int] = OFFSETS) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of the tokens around each position, averaged over all pairs of tokens inside the prompts.

  Args:
    logits: [B, T, O, V]; entry [b, t, o] predicts ids[b, t + offsets[o]].
    ids: token ids int32 [B, T].
    mask: [B, T], nonzero on the tokens of the prompt.
    offsets: O distances; 0 is the token itself.

  Returns:
    The loss in nats, float32, and the metrics `loss` and `accuracy`.
  """
  positions = np.arange(ids.shape[1])[:, None] + np.asarray(offsets)  # [T, O]
  inside = (positions >= 0) & (positions < ids.shape[1])
  positions = np.where(inside, positions, 0)
  mask = mask.astype(bool)
  targets = ids[:, positions]
  counted = (mask[:, :, None] & mask[:, positions] & inside).astype(jnp.float32)
  logits = logits.astype(jnp.float32)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats = jax.nn.logsumexp(logits, axis=-1) - target_logits
  hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
  total = jnp.sum(counted)
  loss = jnp.sum(nats * counted) / total
  return loss, {"loss": loss, "accuracy": jnp.sum(hits * counted) / total}
