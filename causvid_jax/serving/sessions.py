"""A client's stream: what it wishes, how far it may run ahead, and what waits for a lost connection.

Nothing here queues without bound. A session makes no chunk while it is `ahead` of what its client acknowledged, so a
slow client pauses its own stream; frames of a source video beyond a few chunks are dropped when they arrive.
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from causvid_jax.serving import images
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import protocol
from causvid_jax.serving import recording

Send = Callable[[bytes], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Frames uint8 [F, H, W, 3], the seconds that the device took, and the prompt they were made under."""
  frames: np.ndarray
  seconds: float
  prompt: str


class Source:
  """Frames of a source video on their way to the device: an iterator of uint8 [1, H, W, 3] that never waits.

  Attributes:
    ended: whether no more frames follow.
  """

  def __init__(self, capacity: int):
    self.ended = False
    self._frames = collections.deque()
    self._capacity = capacity

  def put(self, frame: np.ndarray) -> None:
    """Appends a frame uint8 [H, W, 3], unless there is no room or the video has ended."""
    if self.room > 0:
      self._frames.append(frame)

  def __len__(self) -> int:
    return len(self._frames)

  @property
  def room(self) -> int:
    """Frames that may be put."""
    return 0 if self.ended else self._capacity - len(self._frames)

  def __iter__(self) -> "Source":
    return self

  def __next__(self) -> np.ndarray:
    if not self._frames:
      raise StopIteration
    return self._frames.popleft()[None]


class Session:
  """One stream. `make` and `free` run on the device's thread, all else on the event loop's.

  Attributes:
    id: a secret that continues the session and downloads its recording.
    paused: by its client.
    ended: why the session makes no more chunks, or None.
    source: of a source video, or None.
    unacknowledged: (number, message) of chunks that the client may not have; at most `ahead`.
    send: to the client; None while there is no connection.
    record: of the whole stream.
  """

  def __init__(self, name: str, options: Mapping[str, Any], image: np.ndarray | None, capacity: int, ahead: int,
               record: recording.Recording):
    """`options` are the fields of a start message; `image` is uint8 [H, W, 3]; `capacity` is that of the source."""
    self.id, self.record = name, record
    self.paused, self.ended = False, None
    self.source = Source(capacity) if options["source"] == "video" else None
    self.unacknowledged: collections.deque[tuple[int, bytes]] = collections.deque()
    self.send: Send | None = None
    self._options, self._image, self._ahead = options, image, ahead
    self._wishes: dict[str, Any] = {}
    self._made = self._acknowledged = self._sent = self._frames = 0
    self._stream = None
    self._publishing = asyncio.Lock()

  def ready(self, chunk_pixels: tuple[int, int]) -> bool:
    """Whether the next chunk may be made; `chunk_pixels` are the frames of a first and of a later chunk."""
    if self.ended or self.paused or self.send is None or self._made - self._acknowledged >= self._ahead:
      return False
    return self.source is None or self.source.ended or len(self.source) >= chunk_pixels[self._made > 0]

  def steer(self, wishes: Mapping[str, Any]) -> None:
    """Wishes, fields of a steer message, for the next chunk."""
    self._wishes.update(wishes)

  def take_wishes(self) -> dict[str, Any]:
    """The wishes since the last chunk; the chunk that is made now counts as made."""
    wishes, self._wishes = self._wishes, {}
    self._made += 1
    return wishes

  def acknowledge(self, number: int) -> None:
    """Raises Refused for a chunk that was never sent."""
    if number > self._sent:
      raise limits_lib.Refused("bad_value", f"an ack of chunk {number}: expected at most {self._sent}, the last sent")
    self._acknowledged = max(self._acknowledged, number)
    while self.unacknowledged and self.unacknowledged[0][0] <= number:
      self.unacknowledged.popleft()

  def check_received(self, received: int) -> None:
    """Raises Refused if what a client with `received` chunks lacks is gone."""
    if not self._acknowledged <= received <= self._sent:
      raise limits_lib.Refused("bad_value", f"chunk {received} of a lost connection: expected {self._acknowledged} to"
                               f" {self._sent}")

  async def attach(self, send: Send, received: int) -> None:
    """Connects a client that has `received` chunks, once it has the others."""
    async with self._publishing:
      for number, message in list(self.unacknowledged):
        if number > received:
          await send(message)
      self.send = send

  def make(self, pipe: Any, wishes: Mapping[str, Any]) -> Chunk | None:
    """The next chunk, or None at the end of a source video; raises UserError."""
    options = self._options
    if self._stream is None:
      self._stream = pipe.stream(
          wishes.get("prompt", options["prompt"]), options["seed"], image=self._image, video=self.source,
          policy=options["policy"], strength=options["strength"], blend_chunks=options["blend"])
      self._image = None
    for field, attribute in (("policy", "policy"), ("strength", "strength"), ("blend", "blend_chunks"),
                             ("prompt", "prompt")):
      if field in wishes:
        setattr(self._stream, attribute, wishes[field])
    frames = next(self._stream, None)
    return None if frames is None else Chunk(np.asarray(frames), self._stream.seconds["chunk"], self._stream.prompt)

  def free(self) -> None:
    """Frees the device's memory."""
    if self._stream is not None:
      self._stream.close()
      self._stream = None

  async def publish(self, chunk: Chunk | None, run: Callable[..., Awaitable[Any]]) -> None:
    """Encodes, records and sends a chunk, after those before; None only waits for them.

    `run` calls a function on another thread.
    """
    async with self._publishing:
      if chunk is None:
        return
      parts = await run(lambda: [images.encode(frame) for frame in chunk.frames])
      await run(self.record.write, chunk.frames)
      number = self._sent + 1
      message = protocol.pack(
          {"type": "chunk", "chunk": number, "frame": self._frames, "frames": len(parts),
           "seconds": round(chunk.seconds, 5), "prompt": chunk.prompt}, parts)
      self._sent, self._frames = number, self._frames + len(parts)
      if not self.ended:
        self.unacknowledged.append((number, message))
        if self.send is not None:
          await self.send(message)

  async def close_recording(self, run: Callable[..., Awaitable[Any]]) -> None:
    """Ends the recording after what is being written to it."""
    async with self._publishing:
      await run(self.record.close)
