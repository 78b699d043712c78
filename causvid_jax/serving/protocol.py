"""The messages on the socket.

Text messages are JSON objects with a `type`. Binary messages are a big-endian uint32, the length of a JSON header, the
header, and parts one after the other whose lengths the header gives as `sizes`.

From the client:
  start {prompt, seed, policy, strength, blend, source}: a new stream; `source` is text, image (the one uploaded last)
    or video (frames follow). A stream that this connection has is stopped.
  steer {prompt, policy, strength, blend}: any of them, from the next chunk on.
  ack {chunk}: chunks up to this number (from 1) have been played, or nearly: the server makes at most `ahead` beyond.
  pause {}, resume {}, stop {}.
  reconnect {session, chunk}: continue the session of a lost connection after chunk number `chunk`, the last received.
  source_end {}: the source video has no more frames.
  binary image {}: one part, a JPEG, PNG or WebP.
  binary frames {}: parts are frames of the source video, each a JPEG, PNG or WebP. The client keeps at most
    `source_frames` of them unconsumed; the server drops what is beyond.

From the server:
  hello {...}: the model and the limits; ready {}: once the model is compiled, if it was not at hello.
  image {}: the uploaded image is taken.
  started {session, resumed, source_frames}: after start and reconnect.
  state {state, reason}, busy {sessions, message}, error {code, message}.
  binary chunk {chunk, frame, frames, seconds, prompt}: parts are frames, each a JPEG; `frame` is the number of the
    first, `seconds` what the device took.
"""

from collections.abc import Callable, Sequence
import json
import math
import struct
from typing import Any

from causvid_jax.sampling import stream
from causvid_jax.serving import limits as limits_lib

SOURCES = ("text", "image", "video")

_LENGTH = struct.Struct(">I")
_MAX_HEADER = 4096
_MAX_PARTS = 64
_MAX_BLEND = 64


def parse_text(message: str, limits: limits_lib.Limits) -> tuple[str, dict[str, Any]]:
  """Type and fields of a client's text message; raises `Refused` unless every part of it is as expected."""
  if len(message) > limits.message:
    raise limits_lib.Refused("too_long", f"a message of {len(message)} characters: expected at most {limits.message}")
  fields = _object(message)
  kind = fields.pop("type", None)
  known = _text_messages(limits)
  checks = known.get(kind) if isinstance(kind, str) else None
  if checks is None:
    raise limits_lib.Refused("malformed", f"type {str(kind)[:40]!r}: expected one of {', '.join(known)}")
  if unknown := fields.keys() - checks.keys():
    raise limits_lib.Refused("malformed", f"{kind} has no field {min(unknown)[:40]!r}")
  if kind != "steer" and (missing := checks.keys() - fields.keys() - _DEFAULTS.keys()):
    raise limits_lib.Refused("malformed", f"{kind} lacks the field {min(missing)!r}")
  for name, value in fields.items():
    checks[name](name, value)
  return kind, {**_DEFAULTS, **fields} if kind == "start" else fields


def parse_binary(message: bytes) -> tuple[str, list[bytes]]:
  """Kind, "image" or "frames", and parts of a client's binary message; raises `Refused`."""
  if len(message) < _LENGTH.size:
    raise limits_lib.Refused("malformed", "a binary message without a header")
  end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
  if not _LENGTH.size < end <= min(len(message), _MAX_HEADER):
    raise limits_lib.Refused("malformed", "a binary message whose header has an impossible length")
  try:
    header = _object(message[_LENGTH.size:end].decode("utf-8"))
  except UnicodeDecodeError as error:
    raise limits_lib.Refused("malformed", "a binary message whose header is no text") from error
  kind, sizes = header.get("type"), header.get("sizes")
  if header.keys() != {"type", "sizes"} or kind not in ("image", "frames") or not isinstance(sizes, list):
    raise limits_lib.Refused("malformed", "a binary message: expected a header with type image or frames, and sizes")
  if not 0 < len(sizes) <= (1 if kind == "image" else _MAX_PARTS) or not all(
      type(size) is int and size > 0 for size in sizes) or end + sum(sizes) != len(message):
    raise limits_lib.Refused("malformed", f"sizes that do not add up to the {len(message) - end} bytes of {kind}")
  parts = []
  for size in sizes:
    parts.append(message[end:end + size])
    end += size
  return kind, parts


def pack(header: dict[str, Any], parts: Sequence[bytes]) -> bytes:
  """A binary message."""
  text = json.dumps({**header, "sizes": [len(part) for part in parts]}).encode()
  return b"".join([_LENGTH.pack(len(text)), text, *parts])


def unpack(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
  """What `pack` packed; for messages that are trusted."""
  end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
  header, parts = json.loads(message[_LENGTH.size:end]), []
  for size in header.pop("sizes"):
    parts.append(message[end:end + size])
    end += size
  return header, parts


_DEFAULTS = {"seed": 0, "policy": "recompute", "strength": 0.9, "blend": 0, "source": "text"}


def _text_messages(limits: limits_lib.Limits) -> dict[str, dict[str, Callable[[str, Any], None]]]:
  steer = {"prompt": _text(limits.prompt), "policy": _choice(stream.POLICIES), "strength": _fraction,
           "blend": _integer(_MAX_BLEND)}
  start = {**steer, "seed": _integer(2**31 - 1), "source": _choice(SOURCES)}
  return {"start": start, "steer": steer, "ack": {"chunk": _integer(2**53)}, "pause": {}, "resume": {}, "stop": {},
          "reconnect": {"session": _text(64), "chunk": _integer(2**53)}, "source_end": {}}


def _object(text: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise limits_lib.Refused("malformed", "a message that is no JSON") from error
  if not isinstance(found, dict):
    raise limits_lib.Refused("malformed", "a message that is no JSON object")
  return found


def _text(length: int) -> Callable[[str, Any], None]:
  def check(name, value):
    if not isinstance(value, str) or len(value) > length:
      size = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
      raise limits_lib.Refused("bad_value", f"{name} is {size}: expected a text of at most {length} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
      raise limits_lib.Refused("bad_value", f"{name} is no valid Unicode")
  return check


def _choice(names: Sequence[str]) -> Callable[[str, Any], None]:
  def check(name, value):
    if value not in names:
      raise limits_lib.Refused("bad_value", f"{name} {str(value)[:40]!r}: expected one of {', '.join(names)}")
  return check


def _integer(most: int) -> Callable[[str, Any], None]:
  def check(name, value):
    if type(value) is not int or not 0 <= value <= most:
      raise limits_lib.Refused("bad_value", f"{name} {str(value)[:40]}: expected an integer from 0 to {most}")
  return check


def _fraction(name: str, value: Any) -> None:
  if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= 1:
    raise limits_lib.Refused("bad_value", f"{name} {str(value)[:40]}: expected more than 0 and at most 1")
