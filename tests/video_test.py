"""Video files: round trip, identical bytes, failures that leave nothing behind; and the contact sheet."""

import os
import pathlib
import tempfile
import wave

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from causvid_jax import errors
from causvid_jax.data import video


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


class VideoFileTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / "clip.mp4"

  def files(self):
    return sorted(os.listdir(self.folder))

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

  def test_pieces_make_the_same_file_as_the_whole_and_two_writes_agree(self):
    frames = make_frames(33)
    video.write_video(self.path, frames, 8)
    with video.VideoWriter(self.folder / "pieces.mp4", 8) as writer:
      for piece in np.split(frames, [9, 21]):
        writer.write(piece)
    data = self.path.read_bytes()
    self.assertEqual(data, (self.folder / "pieces.mp4").read_bytes())
    for stamp in (b"x264", b"Lavf", b"Lavc"):
      self.assertNotIn(stamp, data)

  def test_odd_sizes_gain_a_copy_of_the_last_row_and_column(self):
    frames = make_frames(3, 33, 47)
    video.write_video(self.path, frames, 8)
    back, _ = video.read_video(self.path)
    self.assertEqual(back.shape, (3, 34, 48, 3))
    self.assertGreater(psnr(frames, back[:, :33, :47]), 33)
    self.assertGreater(psnr(frames[:, -1], back[:, 33, :47]), 28)

  def test_size_scales_the_frames(self):
    with video.VideoWriter(self.path, 8, size=(96, 128)) as writer:
      writer.write(make_frames(3))
    back, _ = video.read_video(self.path)
    self.assertEqual(back.shape, (3, 96, 128, 3))
    self.assertGreater(psnr(make_frames(3), back.reshape(3, 48, 2, 64, 2, 3).mean(axis=(2, 4))), 30)

  def test_failure_leaves_nothing_and_spares_the_file_before(self):
    for before in (None, b"the file before"):
      if before:
        self.path.write_bytes(before)
      with self.assertRaisesRegex(RuntimeError, "in the middle"):
        with video.VideoWriter(self.path, 8) as writer:
          self.assertFalse(before is None and self.path.exists())
          writer.write(make_frames(2))
          raise RuntimeError("in the middle")
      self.assertEqual(self.files(), ["clip.mp4"] if before else [])
    self.assertEqual(self.path.read_bytes(), before)

  def test_a_video_without_frames_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "clip.mp4: expected at least one frame"):
      with video.VideoWriter(self.path, 8):
        pass
    self.assertEqual(self.files(), [])

  def test_wrong_arrays_are_refused(self):
    with self.assertRaisesRegex(ValueError, "expected uint8"):
      video.write_video(self.path, make_frames().astype(np.float32), 8)
    self.assertEqual(self.files(), [])

  @parameterized.parameters("missing/clip.mp4", "file/clip.mp4", "folder", "")
  def test_unwritable_paths_are_refused_at_once(self, name):
    (self.folder / "file").write_text("")
    (self.folder / "folder").mkdir()
    with self.assertRaises(errors.UserError) as caught:
      video.VideoWriter(self.folder / name, 8)
    self.assertRegex(str(caught.exception), rf"^[^\n]*{name}: [^\n]+$")
    self.assertEqual(self.files(), ["file", "folder"])

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
