"""Prompts to token ids, as the T5 family expects them: cleaned, closed by </s>, padded to one length.

One class serves every `tokenizer.json` of the Hugging Face `tokenizers` library: UMT5's for full-size models
and the word list of the digit world, which `build_digit_world` writes and which ships in `assets/tokenizer/`.
"""

import dataclasses
import html
import os
import pathlib
import re
from collections.abc import Sequence

from absl import logging
import ftfy
import numpy as np
import tokenizers

from causvid_jax import errors
from causvid_jax.data import captions

DIGIT_WORLD = pathlib.Path(__file__).parents[1] / "assets" / "tokenizer" / "tokenizer.json"

_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"


def clean(prompt: str) -> str:
  """Cleans a prompt as Wan 2.1 does: mends broken unicode, unescapes HTML twice, collapses white space."""
  return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Turns prompts into fixed-length ids; `backend` does the splitting, and `from_file` is how to get one."""

  backend: tokenizers.Tokenizer
  pad_id: int
  eos_id: int

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> "Tokenizer":
    """Loads any tokenizer.json that knows <pad> and </s>.

    Raises:
      UserError: when the file is missing, is no tokenizer.json, or lacks one of the two tokens.
    """
    path = os.fspath(path)
    try:
      backend = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
      raise errors.UserError(f"{path}: expected a readable tokenizer.json, got: {error}") from error
    backend.no_truncation()  # lengths are this class's business, whatever the file asks for
    backend.no_padding()
    pad_id, eos_id = backend.token_to_id(_PAD), backend.token_to_id(_EOS)
    if pad_id is None or eos_id is None:
      raise errors.UserError(f"{path}: expected a vocabulary with {_PAD} and {_EOS}")
    return cls(backend, pad_id, eos_id)

  @property
  def vocab_size(self) -> int:
    return self.backend.get_vocab_size()

  def __call__(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts, each closed by </s>; one that is too long is cut with a warning, and still closed.

    Returns:
      ids int32 [B, length], filled up with <pad>, and mask int32 [B, length], 1 up to and including </s>.
    """
    ids = np.full((len(prompts), length), self.pad_id, np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(map(clean, prompts)):
      # Without the file's own special tokens, which may include </s>: it must come once, after the cut.
      encoding = self.backend.encode(prompt, add_special_tokens=False)
      kept = encoding.ids[:length - 1]
      if len(kept) < len(encoding.ids):
        text = prompt[:encoding.offsets[len(kept) - 1][1]] if kept else ""
        logging.warning("The prompt is too long for %d tokens: cut its last %d of %d and kept %r.",
                        length, len(encoding.ids) - len(kept), len(encoding.ids), text)
      ids[row, :len(kept) + 1] = [*kept, self.eos_id]
      mask[row, :len(kept) + 1] = 1
    return ids, mask


def build_digit_world(path: str | os.PathLike) -> None:
  """Writes the digit world's tokenizer.json: one lower-case token for each word of the caption grammar."""
  words = [_PAD, _EOS, _UNKNOWN,
           "a", *captions.COLORS, *captions.DIGITS, "moving", *captions.DIRECTIONS, "and"]
  vocabulary = {word: index for index, word in enumerate(words)}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=_UNKNOWN))
  backend.normalizer = tokenizers.normalizers.Lowercase()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens([_PAD, _EOS, _UNKNOWN])
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  backend.save(os.fspath(path))
