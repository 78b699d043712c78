"""The tokenizer: ids by hand, Wan's cleaning, the cut of long prompts, and a Unigram file like UMT5's."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import tokenizers

from causvid_jax import errors
from causvid_jax.data import captions
from causvid_jax.data import tokenizer


class CleanTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("emoji", "a red 🦊 runs 👩‍👧", "a red 🦊 runs 👩‍👧"),
      ("entity", "fox &amp; hound", "fox & hound"),
      ("entity_twice", "fox &amp;amp; &amp;lt;hound&amp;gt;", "fox & <hound>"),
      ("cjk", "一只红色的七\u3000向左移动", "一只红色的七 向左移动"),
      ("mojibake", "cafÃ© rÃ©el", "café réel"),
      ("curly_quotes", "the fox\u2019s \u201cden\u201d", "the fox's \"den\""),
      ("fullwidth", "ＡＢＣ", "ABC"),
      ("white_space", "\t a  red\n\r\n seven\u00a0\u2003moving \u2009left \n", "a red seven moving left"),
      ("entity_space", "a&nbsp;red&#32;&#32;seven&nbsp;", "a red seven"),
      ("blank", " \n\t", ""),
  )
  def test_cleans_as_wan_does(self, prompt, expected):
    self.assertEqual(tokenizer.clean(prompt), expected)


class DigitWorldTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tokenizer = tokenizer.Tokenizer.from_file(tokenizer.DIGIT_WORLD)

  def test_shipped_file_is_the_one_the_grammar_makes(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "new" / "tokenizer.json"
    tokenizer.build_digit_world(path)
    self.assertEqual(path.read_text(), tokenizer.DIGIT_WORLD.read_text())
    self.assertEqual(self.tokenizer.vocab_size, 3 + 6 + 10 + 4 + len(["a", "moving", "and"]))

  def test_ids_by_hand(self):
    ids, mask = self.tokenizer(["a red seven moving left", "A cyan\tZERO &amp; and", ""], 8)
    np.testing.assert_array_equal(
        ids, [[3, 4, 17, 20, 21, 1, 0, 0], [3, 9, 10, 2, 25, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        mask, [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    self.assertEqual((ids.dtype, mask.dtype), (np.int32, np.int32))

  def test_every_caption_fits_24_tokens_without_unknowns(self):
    rng = np.random.default_rng(0)
    ids, mask = self.tokenizer([captions.describe(captions.sample_things(rng)) for _ in range(500)], 24)
    self.assertNotIn(2, ids)
    self.assertEqual(set(mask.sum(1)), {6, 12})

  def test_too_long_is_cut_closed_and_reported(self):
    with self.assertLogs("absl", "WARNING") as logs:
      ids, mask = self.tokenizer(["a red  seven moving left and a blue two moving up"], 8)
    np.testing.assert_array_equal(ids, [[3, 4, 17, 20, 21, 25, 3, 1]])
    np.testing.assert_array_equal(mask, np.ones((1, 8)))
    self.assertLen(logs.output, 1)
    self.assertIn("too long for 8 tokens: cut its last 4 of 11 and kept 'a red seven moving left and a'",
                  logs.output[0])

  def test_exact_fit_and_empty_prompts_are_not_reported(self):
    with self.assertNoLogs("absl", "WARNING"):
      ids, _ = self.tokenizer(["a red seven moving left", ""], 6)
    np.testing.assert_array_equal(ids, [[3, 4, 17, 20, 21, 1], [1, 0, 0, 0, 0, 0]])


class OtherFilesTest(absltest.TestCase):

  def _save(self, pieces: list[str], truncate: int | None = None) -> pathlib.Path:
    """A Unigram file shaped as UMT5's: word-start marks, and a post-processor that appends </s>."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if "</s>" in pieces:
      backend.post_processor = tokenizers.processors.TemplateProcessing(
          single="$A </s>", special_tokens=[("</s>", pieces.index("</s>"))])
    if truncate:
      backend.enable_truncation(truncate)
      backend.enable_padding(length=truncate)
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "tokenizer.json"
    backend.save(str(path))
    return path

  def test_unigram_closes_once_with_its_own_ids(self):
    path = self._save(["▁a", "▁red", "<unk>", "</s>", "▁fo", "x", "<pad>"], truncate=2)
    self.assertEqual(tokenizers.Tokenizer.from_file(str(path)).encode("a").ids, [0, 3])  # closed by the file
    ids, mask = tokenizer.Tokenizer.from_file(path)(["a red  fox", ""], 7)
    np.testing.assert_array_equal(ids, [[0, 1, 4, 5, 3, 6, 6], [3, 6, 6, 6, 6, 6, 6]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])

  def test_unigram_cut_keeps_the_close(self):
    path = self._save(["▁a", "▁red", "<unk>", "</s>", "▁fo", "x", "<pad>"])
    with self.assertLogs("absl", "WARNING") as logs:
      ids, _ = tokenizer.Tokenizer.from_file(path)(["a red fox"], 3)
    np.testing.assert_array_equal(ids, [[0, 1, 3]])
    self.assertIn("cut its last 2 of 4 and kept 'a red'", logs.output[0])

  def test_unusable_files_are_refused_in_one_line(self):
    broken = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "broken.json"
    broken.write_text('{"version": "1.0"}')
    for path, expected in (("/nowhere/tokenizer.json", "/nowhere/tokenizer.json: expected a readable"),
                           (broken, "broken.json: expected a readable"),
                           (self._save(["a", "b", "<unk>"]), "expected a vocabulary with <pad> and </s>")):
      with self.assertRaisesRegex(errors.UserError, expected):
        tokenizer.Tokenizer.from_file(path)


if __name__ == "__main__":
  absltest.main()
