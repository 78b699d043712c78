"""Prompt cleaning against diffusers' Wan pipeline and token ids against transformers, on prompts that go wrong easily."""

import functools
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from diffusers.pipelines.wan import pipeline_wan
import numpy as np
import tokenizers
import transformers

from causvid_jax.data import tokenizer

CORPUS = (
    "A red fox runs through the snowy forest at dawn, cinematic lighting, shallow depth of field.",
    "Two cats & a dog fight on a stage; the crowd cheers <loudly>, 4k, 60 fps.",
    "Zwei Füchse spielen im Schnee. Un renard rouge court dans la forêt enneigée à l'aube.",
    "一只红色的狐狸在雪地里奔跑，电影般的光线。", "赤い狐が雪の森を走る。", "붉은 여우가 눈 덮인 숲을 달린다.",
    "Рыжая лиса бежит по заснеженному лесу на рассвете.", "ثعلب أحمر يركض في الغابة",
)
WORDS = "the quick brown fox jumps over a lazy dog near an old red barn while 雪 falls softly".split()
PROMPTS = (
    "", " ", "\n\t\u3000", "a", "A red fox runs through the snow.",
    "a 🦊 jumps over 👩‍👧‍👦 and 🏳️‍🌈, ❤️‍🔥!", "🙂" * 30,
    "fox &amp; hound", "&lt;b&gt;fox&lt;/b&gt; &amp;amp; &amp;quot;hound&amp;quot; &#129418; &nbsp; &copy &unknown;",
    "一只红色的狐狸，在雪地里奔跑。电影般的光线！", "赤い狐が　雪の森を走る。", "붉은 여우가 달린다", "ＦＵＬＬ　ＷＩＤＴＨ ｶﾞ",
    "  leading\ttabs\r\nand\u2028lines \u00a0 no-break\u2003em\u200bzero\u200d-width\ufeff  ", "a\x1cb\x85c\x0bd\x00e",
    "cafÃ© rÃ©sumÃ© â€œquotesâ€\x9d", "l’été “déjà” ﬁn ½ Å e\u0301", "\u202eright to left\u202c ثعلب أحمر",
    "</s> in the middle </s>", "a <pad> b <extra_id_0> c <unk> d", "&lt;/s&gt;", "▁under▁score ▁▁", "x" * 300,
    "unseen: ᚠᛇᚻ 𓀀 \U0001f9ff", " ".join(WORDS[i % len(WORDS)] for i in range(600)), "狐" * 600,
)
LENGTHS = (512, 77, 8)


def train() -> list[tuple[str, float]]:
  """Pieces and scores of a small Unigram vocabulary, UMT5's special tokens first."""
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  specials = ["<pad>", "</s>", "<unk>"]
  trainer = tokenizers.trainers.UnigramTrainer(
      vocab_size=330, special_tokens=specials, unk_token="<unk>", show_progress=False)
  backend.train_from_iterator(CORPUS, trainer)
  pieces = sorted(backend.get_vocab().items(), key=lambda item: item[1])
  return [(piece, 0.0 if piece in specials else -2.0 - 0.01 * index) for piece, index in pieces]


def make_with_bytes() -> transformers.PreTrainedTokenizerFast:
  """As sentencepiece writes UMT5: normalised by NFKC, unknown characters spelt in bytes."""
  pieces = train()
  pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=True))
  backend.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Nmt(), tokenizers.normalizers.NFKC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
      additional_special_tokens=["<extra_id_0>"])


def make_t5() -> transformers.PreTrainedTokenizerFast:
  """As transformers itself builds a T5 tokenizer from a vocabulary."""
  return transformers.T5TokenizerFast(vocab=train(), extra_ids=3)


@functools.cache
def make_folder(kind: str) -> tempfile.TemporaryDirectory:
  folder = tempfile.TemporaryDirectory()
  {"with_bytes": make_with_bytes, "t5": make_t5}[kind]().save_pretrained(folder.name)
  return folder


def load_ours(kind: str) -> tokenizer.Tokenizer:
  return tokenizer.Tokenizer.from_file(f"{make_folder(kind).name}/tokenizer.json")


class CleanTest(absltest.TestCase):

  def test_agrees_with_diffusers(self):
    for prompt in (*PROMPTS, *CORPUS):
      self.assertEqual(tokenizer.clean(prompt), pipeline_wan.prompt_clean(prompt), repr(prompt))


class TokenIdsTest(parameterized.TestCase):

  @parameterized.product(kind=("with_bytes", "t5"), length=LENGTHS)
  def test_agree_with_transformers(self, kind, length):
    theirs = transformers.AutoTokenizer.from_pretrained(make_folder(kind).name)(
        [pipeline_wan.prompt_clean(prompt) for prompt in PROMPTS], padding="max_length", max_length=length,
        truncation=True, add_special_tokens=True, return_attention_mask=True, return_tensors="np")
    with self.assertLogs("absl", "WARNING"):  # some are cut, at any length
      ids, mask = load_ours(kind)(PROMPTS, length)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, theirs["attention_mask"])

  def test_the_prompts_reach_what_they_are_for(self):
    with self.assertLogs("absl", "WARNING") as logs:
      ids, mask = load_ours("with_bytes")(PROMPTS, 512)
    self.assertLen(logs.output, 2)
    lengths = dict(zip(PROMPTS, mask.sum(1)))
    self.assertEqual([lengths[prompt] for prompt in ("", " ", "\n\t\u3000")], [1, 1, 1])
    self.assertEqual([lengths[prompt] for prompt in PROMPTS[-2:]], [512, 512])  # cut
    fox = ids[PROMPTS.index("🙂" * 30)]
    self.assertGreaterEqual(len(set(fox)), 6)  # four bytes of its own, after the word's mark
    self.assertEqual((ids == 1).sum(), len(PROMPTS) + 3)  # and the three written out


if __name__ == "__main__":
  absltest.main()
