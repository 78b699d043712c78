"""Stage: the digit world's text encoder, on captions drawn from the grammar."""

import functools

import numpy as np

from causvid_jax import weights
from causvid_jax.data import captions
from causvid_jax.data import tokenizer as tokenizer_lib
from causvid_jax.models import text_encoder
from causvid_jax.objectives import text as objective
from causvid_jax.training import state as state_lib
from causvid_jax.training.stages import base
from causvid_jax.weights import store


class Text(base.Stage):
  """Trains the encoder to carry each token's neighbourhood; the linear head that reads it off is not exported."""

  def __init__(self, config):
    super().__init__(config)
    self.module = text_encoder.UMT5Encoder(base.preset(text_encoder.PRESETS, config.model))
    self.head = text_encoder.ContextHead(self.module.config.vocab_size, objective.OFFSETS)
    self.tokenizer = tokenizer_lib.Tokenizer.from_file(store.resolve(config.tokenizer) / "tokenizer.json")

  @functools.cached_property
  def source(self):
    return range(self.config.clips)

  def transform(self, example, rng):
    del example  # Captions are drawn, not stored.
    ids, mask = self.tokenizer([captions.describe(captions.sample_things(rng))], self.config.text_tokens)
    return {"ids": ids[0], "mask": mask[0]}

  def init(self, key, pretrained):
    params = {
        "encoder": base.initial_params(self.module, key),
        "head": self.head.init(key, np.zeros((1, 1, self.module.config.dim), np.float32))["params"],
    }
    return state_lib.create(params, self.optimizer)

  def step(self, state, frozen, batch, key, phase):
    def loss(params, batch, key):
      del key
      embeddings = self.module.apply({"params": params["encoder"]}, batch["ids"], batch["mask"])
      logits = self.head.apply({"params": params["head"]}, embeddings)
      return objective.context_loss(logits, batch["ids"], batch["mask"])

    grads, metrics = state_lib.gradients(loss, state.params, batch, key, self.config.microbatches)
    state, more = state_lib.update(state, grads, self.optimizer)
    return state, metrics | more

  def export(self, state, folder):
    weights.save(folder, self.module, state.params["encoder"])
