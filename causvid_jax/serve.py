"""Streams to a browser: `python -m causvid_jax.serve --port=8000`, then open http://127.0.0.1:8000."""

import asyncio
import urllib.parse

from absl import flags

from causvid_jax import errors
from causvid_jax import pipeline
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import server as server_lib

_DEFAULTS = limits_lib.Limits()

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "digit_world", "A causal pipeline's folder (a run's export), or the name of one that ships.")
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "The interface to listen on. The default serves this machine only; with another, set --token.")
_PORT = flags.DEFINE_integer("port", 8000, "The port; 0 takes any free one.", 0, 65535)
_TOKEN = flags.DEFINE_string(
    "token", "", "A secret that clients must give, as ?token=... of the page's address or as a bearer token.")
_ORIGINS = flags.DEFINE_list(
    "origins", [], "Origins besides this server's own whose pages may use it, a proxy's for one, such as"
    " https://video.example.org.")
_MAX_SESSIONS = flags.DEFINE_integer("max_sessions", _DEFAULTS.sessions, "Streams that share the device.", 1)
_MAX_CONNECTIONS = flags.DEFINE_integer("max_connections", _DEFAULTS.connections, "Open sockets.", 1)
_AHEAD = flags.DEFINE_integer(
    "ahead", _DEFAULTS.ahead, "Chunks that a stream may be ahead of what its client has played; then it pauses.", 1)
_MAX_PROMPT = flags.DEFINE_integer("max_prompt", _DEFAULTS.prompt, "Characters of a prompt.", 1, 10_000)
_MAX_UPLOAD = flags.DEFINE_integer(
    "max_upload", _DEFAULTS.upload, "Bytes of a picture, or of a message with frames.", 1024)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", _DEFAULTS.pixels, "Width times height of a picture or frame.", 1)
_RESUME_SECONDS = flags.DEFINE_float(
    "resume_seconds", _DEFAULTS.resume_seconds, "How long a stream waits for a lost connection to come back.", 0.0)
_IDLE_SECONDS = flags.DEFINE_float(
    "idle_seconds", _DEFAULTS.idle_seconds, "How long a connection may say nothing, as when its stream is paused.", 1.0)
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", _DEFAULTS.minutes, "Minutes of a stream that are kept on disk for download; it may go on.", 0.1)


def main() -> None:
  pipe = pipeline.Pipeline.from_checkpoint(_CHECKPOINT.value)
  if not pipe.causal:
    raise errors.UserError(f"{_CHECKPOINT.value} is bidirectional and cannot stream: expected a causal checkpoint")
  limits = limits_lib.Limits(
      sessions=_MAX_SESSIONS.value, connections=_MAX_CONNECTIONS.value, ahead=_AHEAD.value, prompt=_MAX_PROMPT.value,
      upload=_MAX_UPLOAD.value, pixels=_MAX_PIXELS.value, resume_seconds=_RESUME_SECONDS.value,
      idle_seconds=_IDLE_SECONDS.value, minutes=_MAX_MINUTES.value)
  server = server_lib.Server(pipe, limits, host=_HOST.value, token=_TOKEN.value, origins=_ORIGINS.value)
  query = f"?{urllib.parse.urlencode({'token': _TOKEN.value})}" if _TOKEN.value else ""
  asyncio.run(server_lib.serve(server, _HOST.value, _PORT.value, query))


if __name__ == "__main__":
  errors.run(main)
