"""One client's socket: reads its messages one at a time, refuses what is wrong with them, and carries out the rest."""

import asyncio
import json
from typing import Any

import aiohttp
from aiohttp import web
import numpy as np

from causvid_jax.data import video
from causvid_jax.serving import images
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import protocol
from causvid_jax.serving import sessions

IDLE, TAKEN_OVER = 4000, 4001  # close codes of our own; the page does not come back after them
_GONE = (ConnectionError, RuntimeError)  # aiohttp's, for a socket that closed while we wrote


class Connection:
  """Reads until the socket closes; `server` is the `server.Server` whose sessions it starts.

  Attributes:
    session: of this connection, or None.
  """

  def __init__(self, server: Any, socket: web.WebSocketResponse, transport: asyncio.Transport):
    self.session: sessions.Session | None = None
    self._server, self._socket, self._transport = server, socket, transport
    self._image: np.ndarray | None = None

  async def run(self) -> None:
    limits, mistakes = self._server.limits, 0
    await self.send_json(type="hello", **self._server.describe())
    while mistakes < limits.refusals:
      try:
        async with asyncio.timeout(limits.idle_seconds):
          message = await self._socket.receive()
      except TimeoutError:
        await self.close(IDLE, "nothing heard for too long")
        return
      try:
        if message.type is aiohttp.WSMsgType.TEXT:
          await self._on_text(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
          await self._on_binary(message.data)
        else:
          if message.type is aiohttp.WSMsgType.ERROR:
            self._server.metrics.refuse("bad_frame")
          return
      except limits_lib.Refused as error:
        mistakes += 1
        self._server.metrics.refuse(error.code)
        kind = "busy" if error.code == "busy" else "error"
        await self.send_json(type=kind, code=error.code, message=str(error))
    await self.close(aiohttp.WSCloseCode.POLICY_VIOLATION, "too many mistakes")

  async def send_json(self, **fields: Any) -> None:
    try:
      await self._socket.send_str(json.dumps(fields))
    except _GONE:  # the reader notices
      pass

  async def send_chunk(self, message: bytes) -> None:
    """Waits while the client's side is full; raises ConnectionError when it is gone."""
    try:
      await self._socket.send_bytes(message)
    except _GONE as error:
      raise ConnectionError from error

  async def close(self, code: int, reason: str) -> None:
    await self._socket.close(code=code, message=reason.encode())

  def abort(self) -> None:
    """Drops a connection that may be dead without waiting for it."""
    self._transport.abort()

  async def _on_text(self, text: str) -> None:
    kind, fields = protocol.parse_text(text, self._server.limits)
    await getattr(self, f"_{kind}")(**fields)

  async def _on_binary(self, message: bytes) -> None:
    kind, parts = protocol.parse_binary(message)
    source = self._current().source if kind == "frames" else None
    if kind == "frames":
      if source is None:
        raise limits_lib.Refused("no_source", "frames for a stream that follows no video")
      self._server.metrics.count("source_frames_dropped", max(len(parts) - source.room, 0))
      parts = parts[:source.room]
    frames = await self._server.scheduler.on_codec(self._decode, parts)
    if kind == "image":
      self._image = frames[0]
      await self.send_json(type="image")
    else:
      for frame in frames:
        source.put(frame)
      self._server.scheduler.wake()

  def _decode(self, parts: list[bytes]) -> list[np.ndarray]:
    height, width = self._server.pipe.frame_size
    return [video.fit(images.decode(part, self._server.limits)[None], height, width)[0] for part in parts]

  def _current(self) -> sessions.Session:
    if self.session is None or self.session.ended:
      raise limits_lib.Refused("no_session", "no stream runs on this connection: start one")
    return self.session

  # The client's messages.

  async def _start(self, **options: Any) -> None:
    if options["source"] == "image" and self._image is None:
      raise limits_lib.Refused("no_image", "a start from an image: expected one to be uploaded before")
    await self._server.warm()
    if self.session is not None:
      self._server.forget(self.session)
      self.session = None
    image = self._image if options["source"] == "image" else None
    self.session = session = self._server.start(options, image, self)
    await self._started(session, resumed=False)
    await session.attach(self.send_chunk, 0)
    self._server.scheduler.wake()

  async def _reconnect(self, session: str, chunk: int) -> None:
    if self.session is not None:
      raise limits_lib.Refused("bad_value", "this connection has a stream already")
    found = self._server.take_over(session, chunk, self)
    self.session = found
    await self._started(found, resumed=True)
    await found.attach(self.send_chunk, chunk)
    if found.ended:
      await self.send_json(type="state", state="ended", reason=found.ended)
    self._server.scheduler.wake()

  async def _started(self, session: sessions.Session, resumed: bool) -> None:
    await self.send_json(type="started", session=session.id, resumed=resumed,
                         source_frames=session.source.room if session.source is not None else 0)

  async def _steer(self, **wishes: Any) -> None:
    self._current().steer(wishes)

  async def _ack(self, chunk: int) -> None:
    if self.session is not None:  # one that just ended by itself still gets the last
      self.session.acknowledge(chunk)
      self._server.scheduler.wake()

  async def _pause(self) -> None:
    self._current().paused = True
    await self.send_json(type="state", state="paused", reason="")

  async def _resume(self) -> None:
    self._current().paused = False
    await self.send_json(type="state", state="running", reason="")
    self._server.scheduler.wake()

  async def _stop(self) -> None:
    self._server.end(self._current(), "stopped")

  async def _source_end(self) -> None:
    source = self._current().source
    if source is None:
      raise limits_lib.Refused("no_source", "source_end for a stream that follows no video")
    source.ended = True
    self._server.scheduler.wake()
