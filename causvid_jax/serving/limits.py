"""What a client may ask of the server, in one place."""

import dataclasses

from causvid_jax import errors


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of the server; beyond them a client is refused, or its own stream pauses.

  Attributes:
    sessions: streams that share the device, those that wait for a lost connection included.
    connections: open sockets.
    ahead: chunks that a session may be ahead of what its client acknowledged.
    source_chunks: chunks of a source video that may wait for the device.
    prompt: characters of a prompt.
    message: characters of a JSON message.
    upload: bytes of a binary message, an image for one.
    pixels: width times height of an image or of a source video.
    refusals: mistakes after which a connection is closed.
    resume_seconds: how long a session waits for a lost connection to come back.
    idle_seconds: how long a connection may say nothing.
    minutes: of a stream that are recorded for download.
  """
  sessions: int = 4
  connections: int = 64
  ahead: int = 2
  source_chunks: int = 3
  prompt: int = 500
  message: int = 16 << 10
  upload: int = 8 << 20
  pixels: int = 16 << 20
  refusals: int = 20
  resume_seconds: float = 60.0
  idle_seconds: float = 600.0
  minutes: float = 10.0


class Refused(errors.UserError):
  """A client's mistake: a word for programs, and one line for people."""

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code
