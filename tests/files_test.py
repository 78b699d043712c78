"""Files of tensors: identity in every format and type, little memory, refusals that name file and tensors."""

import contextlib
import errno
import json
import os
import pathlib
import pickle
import resource
import signal
import sys
import tempfile
import tracemalloc
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from safetensors import torch as safetensors_torch
import torch

from causvid_jax import errors
from causvid_jax.weights import files
from causvid_jax.weights import tensors

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "bool")


def draw(dtype, *shape, seed=0):
  """Random bits: subnormals, infinities and all."""
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  array = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, np.uint8).view(dtype)
  return array.reshape(shape)


def bits(array):
  return np.ascontiguousarray(array).tobytes()


class Evil:
  """Unpickled carelessly, makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


@contextlib.contextmanager
def full_disk(size):
  """Writing past `size` bytes of a file fails."""
  before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


class FilesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.arrays = {"a": draw("float32", 5, 3), "b.c": draw("bfloat16", 7, seed=1), "scalar": draw("float32", seed=2),
                   "odd": draw("float8_e4m3fn", 3, 1, 3, seed=3)}
    self.tensors = {name: tensors.of(array) for name, array in self.arrays.items()}

  def assert_same(self, found, expected):
    self.assertCountEqual(found, expected)
    for name, array in expected.items():
      self.assertEqual((found[name].shape, found[name].dtype), (array.shape, array.dtype), name)
      self.assertEqual(bits(found[name].read(())), bits(array), name)
      if array.ndim:
        self.assertEqual(bits(found[name].read((slice(1, 3),))), bits(array[1:3]), name)

  def assert_refused(self, pattern, path):
    with self.assertRaisesRegex(errors.UserError, pattern) as caught:
      files.open_tensors(path)
    self.assertNotIn("\n", str(caught.exception))
    self.assertIn(str(path), str(caught.exception))

  @parameterized.product(dtype=DTYPES, suffix=["safetensors", "pt"])
  def test_reading_inverts_writing_bit_for_bit(self, dtype, suffix):
    arrays = {"x": draw(dtype, 4, 3, 5), "y.z": draw(dtype), "row": draw(dtype, 3)}
    path = self.folder / f"weights.{suffix}"
    write = files.write_safetensors if suffix == "safetensors" else files.write_torch
    write(path, {name: tensors.of(array) for name, array in arrays.items()})
    self.assert_same(files.open_tensors(path), arrays)
    self.assertEqual(os.listdir(self.folder), [path.name])
    state = safetensors_torch.load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    for name, array in arrays.items():
      self.assertEqual(str(state[name].dtype), f"torch.{dtype}")
      self.assertEqual(tuple(state[name].shape), array.shape)
      self.assertEqual(bytes(state[name].reshape(-1).view(torch.uint8).numpy()), bits(array))

  def test_what_torch_writes(self):
    state = {"x": torch.randn(4, 3).bfloat16(), "transposed": torch.randn(4, 3).T, "half": torch.ones(2).half()}
    expected = {name: value.float().numpy() for name, value in state.items()}
    safetensors_torch.save_file({k: v.contiguous() for k, v in state.items()}, self.folder / "x.safetensors")
    torch.save(state, self.folder / "x.pt")
    torch.save(state, self.folder / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({name: torch.nn.Parameter(value) for name, value in state.items()}, self.folder / "x.pth")
    for name in ("x.safetensors", "x.pt", "old.bin", "x.pth"):
      found = files.open_tensors(self.folder / name)
      for key, value in expected.items():
        np.testing.assert_array_equal(found[key].read(()).astype(np.float32), value)
        self.assertEqual(found[key].dtype, {"x": "bfloat16", "half": "float16"}.get(key, "float32"))

  def test_nested_dictionaries_and_what_is_no_tensor(self):
    torch.save({"generator": {"model.a": torch.ones(2)}, "step": 3, "critic": {"b": torch.zeros(1)}, "name": "run"},
               self.folder / "x.pt")
    self.assertCountEqual(files.open_tensors(self.folder / "x.pt"), ["generator.model.a", "critic.b"])

  def test_shards(self):
    many = {f"layer{i}": draw("float32", 10, seed=i) for i in range(7)}
    files.write_shards(self.folder, "model", {n: tensors.of(a) for n, a in many.items()}, max_bytes=80)
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    index = self.folder / "model.safetensors.index.json"
    self.assertCountEqual(os.listdir(self.folder), [*names, index.name])
    self.assertEqual(json.loads(index.read_text())["metadata"], {"total_size": 280})
    for path in (index, self.folder / names[2], files.find(self.folder)):
      self.assert_same(files.open_tensors(path), many)
    index.unlink()
    self.assertEqual(files.find(self.folder), self.folder / names[0])
    self.assert_same(files.open_tensors(self.folder / names[0]), many)
    (self.folder / names[1]).unlink()
    with self.assertRaisesRegex(errors.UserError, f"{self.folder} lacks {names[1]} of 4 shards"):
      files.open_tensors(self.folder / names[0])

  def test_indexes_that_do_not_fit(self):
    files.write_safetensors(self.folder / "one.safetensors", {"a": self.tensors["a"], "b": self.tensors["odd"]})
    files.write_safetensors(self.folder / "two.safetensors", {"b": self.tensors["odd"]})
    index = self.folder / "m.safetensors.index.json"
    for content, pattern in (
        ({"weight_map": {"a": "one.safetensors"}}, "m.safetensors.index.json and its shards differ in b"),
        ({"weight_map": dict.fromkeys("abx", "one.safetensors")}, "differ in x"),
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "two.safetensors repeats .* b"),
        ({"weight_map": {"a": "none.safetensors"}}, "lacks none.safetensors of 1 shards"),
        ({"weight_map": {"a": 3}}, "index.json is missing or damaged"), ({}, "index.json is missing or damaged"),
        ([], "index.json is missing or damaged")):
      index.write_text(json.dumps(content))
      with self.assertRaisesRegex(errors.UserError, pattern):
        files.open_tensors(index)

  def test_a_folder_with_none_or_several(self):
    with self.assertRaisesRegex(errors.UserError, f"no weights in {self.folder}: expected a .safetensors"):
      files.find(self.folder)
    for name in ("x.pt", "a.safetensors"):
      (self.folder / name).touch()
      self.assertEqual(files.find(self.folder).name, name)
    (self.folder / "b.safetensors").touch()
    with self.assertRaisesRegex(errors.UserError, "holds a.safetensors, b.safetensors: expected the name of one"):
      files.find(self.folder)

  @parameterized.parameters("x.safetensors", "x.pt")
  def test_truncated_missing_and_overlong(self, name):
    path = self.folder / name
    (files.write_torch if name == "x.pt" else files.write_safetensors)(path, self.tensors)
    content = path.read_bytes()
    for kept in (0, 1, 7, 8, 40, len(content) // 2, len(content) - 30, len(content) - 1):
      path.write_bytes(content[:kept])
      self.assert_refused("damaged", path)
    path.unlink()
    self.assert_refused("is missing or damaged", path)
    path.write_bytes(b"\x80\x02" + content[2:])
    self.assert_refused("damaged", path)

  def test_unknown_files(self):
    path = self.folder / "x.gguf"
    path.touch()
    self.assert_refused(r"expected a folder, or a file of .safetensors, .pt, ", path)
    torch.save({"z": torch.ones(2, dtype=torch.complex64)}, self.folder / "z.pt")
    self.assert_refused(r"unknown types: z \(complex64\); expected float64, ", self.folder / "z.pt")

  @parameterized.parameters("zip", "old", 2, 4)
  def test_code_in_pickles_is_refused_and_does_not_run(self, kind):
    path, trace = self.folder / "evil.pt", self.folder / "trace"
    content = {"generator": {"a": torch.ones(2)}, "b": Evil(trace)}
    if isinstance(kind, int):
      path.write_bytes(pickle.dumps(content["b"], protocol=kind))
    else:
      torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    # torch knows no newer pickles, and gives up before it sees what is in them.
    self.assert_refused("is refused: it is damaged, or no file" if kind == 4 else
                        "is refused: it holds posix.system, and reading that may run code", path)
    self.assertFalse(trace.exists())
    pickle.loads(pickle.dumps(content["b"]))  # it would have
    self.assertTrue(trace.exists())

  def test_without_torch(self):
    files.write_torch(self.folder / "x.pt", self.tensors)
    files.write_safetensors(self.folder / "x.safetensors", self.tensors)
    with mock.patch.dict(sys.modules, {"torch": None}):
      self.assert_refused(r"needs torch: pip install 'causvid_jax\[convert\]'", self.folder / "x.pt")
      with self.assertRaisesRegex(errors.UserError, "causvid_jax.convert"):
        files.write_torch(self.folder / "y.pt", self.tensors)
      self.assert_same(files.open_tensors(self.folder / "x.safetensors"), self.arrays)
    self.assertCountEqual(os.listdir(self.folder), ["x.pt", "x.safetensors"])

  @parameterized.parameters(files.write_safetensors, files.write_torch)
  def test_full_disk(self, write):
    path = self.folder / "x"
    with full_disk(2**19), self.assertRaisesRegex(errors.UserError, f"cannot write {path}.*: File too large"):
      write(path, {"a": tensors.of(np.ones((64, 2**12), np.float32))})
    self.assertEqual(os.listdir(self.folder), [])

  def test_no_room_for_torchs_own_copy(self):
    with full_disk(1300), self.assertRaisesRegex(errors.UserError, f"cannot write {self.folder}/x.pt: "):
      files.write_torch(self.folder / "x.pt", {"a": tensors.of(np.ones(250, np.float32))})  # whose archive is larger
    self.assertEqual(os.listdir(self.folder), [])
    with mock.patch.object(torch, "save", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
      with self.assertRaisesRegex(errors.UserError, f"cannot write {self.folder}/x.pt: No space left on device"):
        files.write_torch(self.folder / "x.pt", self.tensors)
    self.assertEqual(os.listdir(self.folder), [])

  def test_an_interrupted_write_leaves_what_was_there(self):
    path = self.folder / "x.safetensors"
    files.write_safetensors(path, self.tensors)
    def interrupt(index):
      raise KeyboardInterrupt
    with self.assertRaises(KeyboardInterrupt):
      files.write_safetensors(path, {"a": tensors.Tensor((3,), np.dtype("float32"), interrupt)})
    self.assertEqual(os.listdir(self.folder), [path.name])
    self.assert_same(files.open_tensors(path), self.arrays)

  def test_weights_that_are_not_finite_are_named(self):
    good = np.ones((3, 2**20), np.float32)
    late = good.copy()
    late[-1, -1] = np.nan
    infinite = np.array([1, np.inf], "bfloat16")
    with self.assertLogs(level="WARNING") as logs:
      files.write_safetensors(self.folder / "x.safetensors", {
          "late": tensors.of(late), "good": tensors.of(good), "infinite": tensors.of(infinite),
          "cast": tensors.of(np.full(2, 1e6, np.float32)).astype("float16")})
    self.assertLen(logs.records, 1)
    self.assertEqual(logs.records[0].getMessage(), "NaN or infinite weights: late, cast, infinite")
    with self.assertNoLogs(level="WARNING"):
      files.write_safetensors(self.folder / "x.safetensors", {"good": tensors.of(good)})

  def test_little_memory(self):
    layers = [tensors.Tensor((2**19,), np.dtype("float32"), lambda index, i=i: np.full(2**19, i, np.float32)[index])
              for i in range(128)]  # 256 MiB together
    path = self.folder / "x.safetensors"
    written = []
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    with mock.patch.object(tensors, "_PIECE", 2**22):
      files.write_safetensors(path, {"stacked": tensors.stack(layers)}, progress=written.append)
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**25)
    self.assertEqual(sum(written), 2**28)
    tracemalloc.reset_peak()
    read = files.open_tensors(path)["stacked"]
    self.assertEqual([read.read((i, slice(5)))[0] for i in (0, 77, 127)], [0, 77, 127])
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**20)


if __name__ == "__main__":
  absltest.main()
