"""Records on disk and the grain pipeline over them: round trips, refusals, and exact resumption."""

import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from causvid_jax import errors
from causvid_jax.data import pipelines
from causvid_jax.data import records

SIGMAS = np.array([1.0, 0.75, 0.0], np.float32)
CAPTIONS = ("a red seven moving left", "", "ein grüner Kreis")


def make_examples():
  rng = np.random.default_rng(0)
  return [dict(latents=rng.normal(size=(3, 2, 4, 4, 5)).astype(np.float16), sigmas=SIGMAS,
               text=rng.normal(size=(6, 8)).astype(np.float32), caption=caption) for caption in CAPTIONS]


def write(folder, made_by=None, kind="trajectory"):
  with records.RecordWriter(folder, kind, made_by or {"seed": 0}) as writer:
    for example in make_examples():
      writer.write(**example)


class RecordsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "new" / "records"

  def test_round_trip(self):
    write(self.folder)
    source = records.RecordSource(self.folder, "trajectory")
    self.assertLen(source, 3)
    for index in (2, 0, 1):
      found, expected = source[index], make_examples()[index]
      self.assertEqual(found.keys(), expected.keys())
      self.assertEqual(found.pop("caption"), expected.pop("caption"))
      for name, array in expected.items():
        self.assertEqual(found[name].dtype, array.dtype, name)
        np.testing.assert_array_equal(found[name], array, name)

  def test_metadata_describes_the_records(self):
    write(self.folder, {"seed": 3, "shift": 8.0})
    self.assertEqual(records.RecordSource(self.folder, "trajectory").metadata, {
        "schema_version": records.SCHEMA_VERSION, "kind": "trajectory", "made_by": {"seed": 3, "shift": 8.0}, "count": 3,
        "arrays": {"latents": ["float16", [3, 2, 4, 4, 5]], "sigmas": ["float32", [3]], "text": ["float32", [6, 8]]}})

  def test_clean_latents_carry_their_level(self):
    with records.RecordWriter(self.folder, "latent", {}) as writer:
      writer.write(np.ones((2, 4, 4, 5), np.float16), 0.0, np.ones((6, 8), np.float32), "a")
    self.assertEqual(records.RecordSource(self.folder, "latent")[0]["sigmas"], 0.0)

  def test_what_was_left_unfinished_is_refused(self):
    with self.assertRaises(KeyboardInterrupt):
      with records.RecordWriter(self.folder, "trajectory", {"seed": 0}) as writer:
        writer.write(**make_examples()[0])
        raise KeyboardInterrupt
    self.assertFalse(records.finished(self.folder, {"seed": 0}))
    with self.assertRaisesRegex(errors.UserError, f"no finished trajectory records in {self.folder}: metadata.json"):
      records.RecordSource(self.folder, "trajectory")

  def test_writing_again_unfinishes_what_was_there(self):
    write(self.folder)
    with self.assertRaises(KeyboardInterrupt):
      with records.RecordWriter(self.folder, "trajectory", {"seed": 0}):
        raise KeyboardInterrupt
    self.assertFalse(records.finished(self.folder, {"seed": 0}))
    write(self.folder)
    self.assertLen(records.RecordSource(self.folder, "trajectory"), 3)

  def test_a_missing_folder_and_damaged_metadata(self):
    with self.assertRaisesRegex(errors.UserError, "no finished latent records in"):
      records.RecordSource(self.folder, "latent")
    write(self.folder)
    metadata = self.folder / "metadata.json"
    metadata.write_text(metadata.read_text()[:40])
    with self.assertRaisesRegex(errors.UserError, "metadata.json is missing or damaged"):
      records.RecordSource(self.folder, "trajectory")

  def test_another_kind_or_schema_is_refused(self):
    write(self.folder)
    with self.assertRaisesRegex(errors.UserError, "holds trajectory records of schema 1: expected latent records"):
      records.RecordSource(self.folder, "latent")
    metadata = self.folder / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"schema_version": 7}))
    with self.assertRaisesRegex(errors.UserError, "trajectory records of schema 7: expected .* of schema 1"):
      records.RecordSource(self.folder, "trajectory")

  def test_an_unwritable_folder(self):
    self.folder.parent.parent.mkdir(exist_ok=True)
    self.folder.parent.touch()
    with self.assertRaisesRegex(errors.UserError, f"cannot write records to {self.folder}: Not a directory"):
      records.RecordWriter(self.folder, "latent", {})

  def test_finished_asks_how_they_were_made(self):
    made_by = {"seed": 0, "shift": 8.0, "student_timesteps": [1000.0, 500.0, 0.0]}
    self.assertFalse(records.finished(self.folder, made_by))
    write(self.folder, made_by)
    self.assertTrue(records.finished(self.folder, made_by))
    self.assertFalse(records.finished(self.folder, made_by | {"shift": 5.0}))

  def test_sigmas_must_be_the_configs(self):
    write(self.folder)
    source = records.RecordSource(self.folder, "trajectory")
    records.require_sigmas(source, SIGMAS)
    records.require_sigmas(source, SIGMAS + np.float32(1e-6))
    for other in ([1.0, 0.7, 0.0], [1.0, 0.75, 0.5, 0.0], [1.0, 0.0]):
      with self.assertRaises(errors.UserError) as caught:
        records.require_sigmas(source, np.array(other, np.float32))
      self.assertIn("[1.0, 0.75, 0.0]", str(caught.exception))
      self.assertIn(str(other), str(caught.exception))


def make_batches(seed=0, size=10, batch_size=4):
  transform = lambda example, rng: {"index": np.int64(example), "noise": rng.random(3)}
  return pipelines.batches(range(size), batch_size, seed, transform)


def take(iterator, count):
  taken = [next(iterator) for _ in range(count)]
  return {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}


class PipelineTest(parameterized.TestCase):

  def test_every_example_once_an_epoch_in_a_new_order(self):
    batches = take(make_batches(), 5)  # two epochs of 2.5 batches
    self.assertEqual(batches["noise"].shape, (5, 4, 3))
    first, second = np.split(batches["index"].reshape(-1), 2)
    self.assertSameElements(first, range(10))
    self.assertSameElements(second, range(10))
    self.assertLen(set(first), 10)
    self.assertLen(set(second), 10)
    self.assertFalse(np.array_equal(first, second))
    self.assertFalse(np.array_equal(first, np.arange(10)))
    # The generator is another one for every example, also when the example comes again.
    self.assertLen(np.unique(batches["noise"]), 5 * 4 * 3)

  def test_a_function_of_the_seed(self):
    first, again, other = (take(make_batches(seed), 6) for seed in (0, 0, 1))
    for name in first:
      np.testing.assert_array_equal(first[name], again[name])
      self.assertFalse(np.array_equal(first[name], other[name]))

  @parameterized.parameters(0, 1, 3, 7)
  def test_resumes_exactly_from_a_state_of_json(self, done):
    iterator = make_batches()
    for _ in range(done):
      next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # as checkpoints keep it
    expected = take(iterator, 6)
    fresh = make_batches()
    fresh.set_state(state)
    iterator.set_state(state)  # in place, though it has run ahead
    for resumed in (fresh, iterator):
      found = take(resumed, 6)
      for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])

  def test_the_state_is_that_of_what_was_taken_not_of_what_was_read_ahead(self):
    iterator = make_batches()
    expected = take(make_batches(), 2)["index"][1]
    next(iterator)
    fresh = make_batches()
    fresh.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(fresh)["index"], expected)


if __name__ == "__main__":
  absltest.main()
