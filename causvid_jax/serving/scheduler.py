"""Turns on the device: one thread makes one chunk at a time, for each session that may have one in turn."""

import asyncio
import collections
from collections.abc import Callable
import concurrent.futures
import itertools
from typing import Any

from absl import logging
import numpy as np

from causvid_jax import errors
from causvid_jax.serving import metrics as metrics_lib
from causvid_jax.serving import sessions

class Scheduler:
  """Round robin over sessions.

  Attributes:
    sessions: that may still make chunks, the one whose turn it is first.
    chunk_pixels: frames of a first and of a later chunk; None until the model is compiled.
  """

  def __init__(self, pipe: Any, metrics: metrics_lib.Metrics, ended: Callable[[sessions.Session, str], None]):
    """`ended` is called with a session that ends by itself, and why."""
    self.sessions: collections.deque[sessions.Session] = collections.deque()
    self.chunk_pixels: tuple[int, int] | None = None
    self._pipe, self._metrics, self._ended = pipe, metrics, ended
    self._device = concurrent.futures.ThreadPoolExecutor(1, "device")
    self._codecs = concurrent.futures.ThreadPoolExecutor(2, "codec")
    self._wake, self._stopping = asyncio.Event(), False
    self._publishing: set[asyncio.Task] = set()

  def wake(self) -> None:
    """To be called when a session may have become ready."""
    self._wake.set()

  def on_codec(self, function: Callable[..., Any], *args: Any) -> asyncio.Future:
    """Runs a function beside the event loop and the device."""
    return asyncio.get_running_loop().run_in_executor(self._codecs, function, *args)

  def on_device(self, function: Callable[..., Any], *args: Any) -> asyncio.Future:
    """Runs a function on the device's thread, after what it does now."""
    return asyncio.get_running_loop().run_in_executor(self._device, function, *args)

  async def warm(self) -> None:
    """Compiles the model."""
    self.chunk_pixels = await self.on_device(self._warm)

  async def run(self) -> None:
    """Makes chunks until `stop`."""
    while not self._stopping:
      self._wake.clear()
      session = self._next()
      if session is None:
        await self._wake.wait()
      else:
        await self._make(session)

  def stop(self) -> None:
    """Makes no chunk after the one being made, and lets `run` return."""
    self._stopping = True
    self.wake()

  async def drain(self, seconds: float) -> None:
    """Waits at most `seconds`, after `run` is over, until what was made is sent."""
    if self._publishing:
      await asyncio.wait(self._publishing, timeout=seconds)

  def close(self) -> None:
    """Lets the threads end."""
    self._device.shutdown(wait=False, cancel_futures=True)
    self._codecs.shutdown(wait=False)

  def _next(self) -> sessions.Session | None:
    """The first session that is ready."""
    return next((session for session in self.sessions if session.ready(self.chunk_pixels)), None)

  async def _make(self, session: sessions.Session) -> None:
    try:
      chunk = await self.on_device(session.make, self._pipe, session.take_wishes())
    except errors.UserError as error:
      self._ended(session, str(error))
      return
    except Exception:  # a stream that fails must not take the others along
      logging.exception("a stream failed")
      self._ended(session, "the server failed to make a chunk")
      return
    if chunk is not None:
      self._metrics.chunk(len(chunk.frames), chunk.seconds)
    if not session.ended:
      self.sessions.remove(session)  # to the end of the row, behind those that came meanwhile
      self.sessions.append(session)
      task = asyncio.create_task(self._publish(session, chunk))
      self._publishing.add(task)
      task.add_done_callback(self._publishing.discard)

  async def _publish(self, session: sessions.Session, chunk: sessions.Chunk | None) -> None:
    try:
      await session.publish(chunk, self.on_codec)
      if chunk is None:
        self._ended(session, "the source video is over")
    except ConnectionError:  # its reader notices too, and the client may come back
      pass
    except Exception:
      logging.exception("a chunk could not be sent")
      self._ended(session, "the server failed to send a chunk")

  def _warm(self) -> tuple[int, int]:
    """Compiles what streams need: the first chunks from text, another prompt, an image, a source video."""
    height, width = self._pipe.frame_size
    blank = np.zeros((1, height, width, 3), np.uint8)
    text = self._pipe.stream("")
    sizes = len(next(text)), len(next(text))
    text.prompt = "a"
    image = self._pipe.stream("", image=blank[0])
    video = self._pipe.stream("", video=itertools.repeat(blank))
    for stream in (text, image, video, video):
      if not self._stopping:
        next(stream)
    return sizes
