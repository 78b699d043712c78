"""The page in headless Chromium, with the model that ships: it plays, is steered, comes back, and shows what was asked.

With SCREENSHOTS=<folder> in the environment, the pictures for the README are taken into it.
"""

import asyncio
import base64
import io
import os
import pathlib
import shutil
import tempfile
import threading
import unittest
from unittest import mock

from absl.testing import absltest
from aiohttp import web
import av
import numpy as np
from PIL import Image

from causvid_jax import pipeline
from causvid_jax.evaluation import judge
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import server as server_lib

try:
  from playwright import sync_api
except ImportError:
  sync_api = None

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("SCREENSHOTS")

# Keeps every frame that the canvas shows, as PNG, with its number.
RECORD = """() => {
  const view = document.getElementById('view');
  window.frames_seen = [];
  new MutationObserver(() => window.frames_seen.push([Number(view.dataset.frame), view.toDataURL()]))
      .observe(view, {attributes: true, attributeFilter: ['data-frame']});
}"""


@unittest.skipIf(sync_api is None, "playwright is not installed: pip install playwright")
@unittest.skipIf(CHROMIUM is None, "there is no Chromium: apt-get install chromium")
class BrowserTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.loop, started = asyncio.new_event_loop(), threading.Event()
    pipe = pipeline.Pipeline.from_checkpoint("digit_world")
    cls.server = server_lib.Server(pipe, limits_lib.Limits(resume_seconds=10))

    async def serve():
      cls.runner = web.AppRunner(cls.server.application(), access_log=None)
      await cls.runner.setup()
      await web.TCPSite(cls.runner, "127.0.0.1", 0).start()
      await cls.server.warm()
      started.set()

    threading.Thread(target=cls.loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(serve(), cls.loop)
    started.wait()
    cls.addClassCleanup(lambda: asyncio.run_coroutine_threadsafe(cls.runner.cleanup(), cls.loop).result(30))
    cls.url = f"http://127.0.0.1:{cls.runner.addresses[0][1]}/"
    playwright = cls.enterClassContext(sync_api.sync_playwright())
    cls.browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"])
    cls.addClassCleanup(cls.browser.close)

  def open(self, **options):
    context = self.browser.new_context(**options)
    self.addCleanup(context.close)
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
    self.addCleanup(lambda: self.assertEqual(page.errors, []))
    page.goto(self.url)
    self.status(page, "Ready")
    page.evaluate(RECORD)
    return page

  def status(self, page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=text,
                           timeout=20_000)

  def say(self, page, prompt):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")

  def frames(self, page, count, start=0):
    """Waits until frame `start + count` was shown, and returns uint8 [count, 64, 64, 3] and where it skipped."""
    page.wait_for_function("n => window.frames_seen.some(([number]) => number >= n)", arg=start + count - 1,
                           timeout=40_000)
    seen = dict(page.evaluate("window.frames_seen"))
    numbers = range(start, start + count)
    self.assertContainsSubset(numbers, seen)  # none was skipped
    return np.stack([_decode(seen[number]) for number in numbers])

  def colors(self, video):
    return {reading.color for reading in judge.read(video)}

  def test_plays_and_turns_to_another_prompt(self):
    page = self.open()
    self.say(page, "a red seven moving left")
    video = self.frames(page, 21)
    self.assertEqual(self.colors(video[9:]), {"red"})
    self.assertGreater(np.abs(np.diff(video.astype(int), axis=0)).mean(), 0.1)
    self.status(page, "Live")
    self.say(page, "a blue two moving up")
    page.wait_for_function("() => document.querySelectorAll('#marks li').length == 2", timeout=20_000)
    turned = page.evaluate("document.getElementById('view').dataset.frame") or 0
    self.assertEqual(self.colors(self.frames(page, 12, int(turned) + 12)), {"blue"})
    self.assertIn("a blue two moving up", page.text_content("#marks li:first-child"))
    self.assertRegex(page.text_content("#latency"), r"^\d\.\d\d s$")
    self.assertAlmostEqual(float(page.text_content("#fps")), 8, delta=1)
    with page.expect_download() as download:
      page.click("#download")
    with av.open(download.value.path()) as container:
      self.assertGreaterEqual(sum(1 for _ in container.decode(video=0)), 30)

  def test_keyboard(self):
    page = self.open()
    page.focus("#prompt")
    page.keyboard.press("Enter")
    self.frames(page, 5)
    page.keyboard.press("Space")  # types a blank
    self.status(page, "Live")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    self.status(page, "Paused")
    shown = page.get_attribute("#view", "data-frame")
    page.wait_for_timeout(600)
    self.assertEqual(page.get_attribute("#view", "data-frame"), shown)
    page.keyboard.press("Space")
    self.frames(page, 5, int(shown) + 1)
    names = page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea, a, summary')]
        .filter(e => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel || e.labels?.length))
        .map(e => e.outerHTML)""")
    self.assertEqual(names, [])
    page.click("#stop")
    self.status(page, "Stopped")

  def test_an_image_begins_the_video(self):
    page = self.open()
    self.say(page, "a green five moving right")
    still = self.frames(page, 24)[-1]
    page.click("#stop")
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "still.png"
      Image.fromarray(still).save(path)
      page.check("[name=source][value=image]", force=True)
      page.set_input_files("#image-file", path)
      page.wait_for_function("() => document.getElementById('image-name').textContent.startsWith('still.png')")
    page.evaluate("window.frames_seen = []")
    page.fill("#prompt", "a green five moving left")
    page.click("#send")
    video = self.frames(page, 21)
    self.assertLess(np.abs(video[0].astype(int) - still).mean(), 6)
    self.assertEqual(self.colors(video), {"green"})

  def test_a_video_file_is_made_anew(self):
    page = self.open()
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "source.webm"
      _write_webm(path, frames=30)
      page.check("[name=source][value=video]", force=True)
      page.set_input_files("#video-file", path)
      page.fill("#prompt", "a yellow zero moving down")
      page.click("#send")
      video = self.frames(page, 30)
      self.status(page, "Ended: the source video is over")
    self.assertIn("yellow", self.colors(video[9:]))

  def test_the_camera(self):
    page = self.open(permissions=["camera"])
    page.check("[name=source][value=webcam]", force=True)
    self.say(page, "a cyan eight moving right")
    self.frames(page, 30)

  def test_a_lost_connection_comes_back(self):
    page = self.open()
    self.say(page, "a purple three moving left")
    self.frames(page, 12)
    session = page.evaluate("causvid.socket.session")
    for client in list(self.server._connections):
      self.loop.call_soon_threadsafe(client.abort)
    self.status(page, "Connection lost")
    self.status(page, "Live again")
    self.assertEqual(page.evaluate("causvid.socket.session"), session)
    self.assertEqual(self.colors(self.frames(page, 24, 12)), {"purple"})

  def test_restart_and_busy(self):
    page = self.open()
    self.say(page, "a red seven moving left")
    self.frames(page, 12)
    session = page.evaluate("causvid.socket.session")
    page.evaluate("window.frames_seen = []")
    page.click("#restart")
    self.frames(page, 30)
    self.status(page, "Live")
    self.assertNotIn(page.evaluate("causvid.socket.session"), (None, session))
    self.assertNotIn(session, self.server.sessions)
    with mock.patch.object(self.server, "limits", limits_lib.Limits(sessions=1)):
      other = self.open()
      self.say(other, "a blue two moving up")
      self.status(other, "The server is busy")

  def test_two_clients_at_once(self):
    pages = self.open(), self.open()
    self.say(pages[0], "a red seven moving left")
    self.say(pages[1], "a blue two moving up")
    for page, color in zip(pages, ("red", "blue")):
      self.assertEqual(self.colors(self.frames(page, 33)[9:]), {color})

  def test_fits_every_screen(self):
    for width, height in ((1280, 800), (820, 1180), (360, 640)):
      page = self.open(viewport={"width": width, "height": height})
      self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width)
      overlaps = page.evaluate("""() => {
        const boxes = [...document.querySelectorAll('.card, .screen')].filter(e => e.checkVisibility())
            .map(e => e.getBoundingClientRect());
        return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length;
      }""")
      self.assertEqual(overlaps, 0, width)

  @unittest.skipUnless(SCREENSHOTS, "SCREENSHOTS names no folder")
  def test_screenshots(self):
    for name, size in (("desktop", (1180, 1130)), ("phone", (390, 844))):
      for scheme in ("light", "dark"):
        page = self.open(viewport=dict(zip(("width", "height"), size)), color_scheme=scheme, is_mobile=name == "phone",
                         has_touch=name == "phone")
        for i, prompt in enumerate(("a red seven moving left", "a blue two moving up",
                                    "a yellow zero moving down")):
          self.say(page, prompt)
          page.wait_for_function("([n, prompt]) => document.querySelectorAll('#marks li').length == n && "
                                 "document.querySelector('#marks li').textContent.endsWith(prompt)",
                                 arg=[i + 1, prompt], timeout=20_000)
          page.wait_for_timeout(2500)
        page.evaluate("document.activeElement.blur()")
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.save(pathlib.Path(SCREENSHOTS) / f"{name}_{scheme}.png", optimize=True)
        page.click("#stop")


def _decode(url):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def _write_webm(path, frames):
  """A white disc that falls, at 8 frames a second."""
  with av.open(os.fspath(path), "w", format="webm") as container:
    stream = container.add_stream("libvpx", rate=8)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    y, x = np.mgrid[:64, :96]
    for i in range(frames):
      disc = (x - 48)**2 + (y - 12 - i)**2 < 100
      frame = np.repeat((255 * disc)[..., None].astype(np.uint8), 3, axis=2)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))


if __name__ == "__main__":
  absltest.main()
