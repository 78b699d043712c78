"""The server: who may talk to it, which sessions there are, and how it starts and stops.

It listens on the loopback interface unless told otherwise, answers only under names of its own (so that no other
site's page can reach it through a visitor's browser), and asks for a token if it has one. A slow client is never queued
for: its session makes no chunk while it is ahead of what the client acknowledged, and the turns go to the others.
"""

import asyncio
from collections.abc import Coroutine, Sequence
import hmac
import importlib.resources
import ipaddress
import pathlib
import secrets
import signal
import tempfile
from typing import Any
import urllib.parse

import aiohttp
from aiohttp import web
import numpy as np

from causvid_jax import errors
from causvid_jax.data import digit_world
from causvid_jax.sampling import stream
from causvid_jax.serving import connection
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import metrics as metrics_lib
from causvid_jax.serving import recording
from causvid_jax.serving import scheduler as scheduler_lib
from causvid_jax.serving import sessions

_PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), **{
    f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("page", "stream", "sources", "charts")}}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
                               " img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none';"
                               " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
_SECRET = ("/ws", "/stream", "/metrics")  # what the token opens; the page itself holds no secret
_HEARTBEAT = 20.0  # seconds between pings; a client that answers none is gone
_DRAIN_SECONDS = 5.0


class Server:
  """Sessions of one model, and the web application that serves them.

  Attributes:
    pipe, limits: as given.
    metrics: what was done so far.
    scheduler: of the device.
    sessions: by id: those that run, and those that ended while their recordings may be downloaded.
  """

  def __init__(self, pipe: Any, limits: limits_lib.Limits = limits_lib.Limits(), *, host: str = "127.0.0.1",
               token: str = "", origins: Sequence[str] = ()):
    """See `serve`."""
    self.pipe, self.limits, self.metrics = pipe, limits, metrics_lib.Metrics()
    self.scheduler = scheduler_lib.Scheduler(pipe, self.metrics, self.end)
    self.sessions: dict[str, sessions.Session] = {}
    self._host, self._token, self._origins = host, token, frozenset(origin.rstrip("/") for origin in origins)
    self._owners: dict[sessions.Session, connection.Connection] = {}
    self._connections: set[connection.Connection] = set()
    self._leaving: dict[sessions.Session, asyncio.TimerHandle] = {}
    self._tasks: set[asyncio.Task] = set()
    self._warm, self._draining = asyncio.Event(), False

  def application(self) -> web.Application:
    """The application; it runs the scheduler while it runs."""
    app = web.Application(middlewares=[self._guard])
    app.cleanup_ctx.append(self._run)
    app.on_shutdown.append(self._drain)
    for path in _PAGE:
      app.router.add_get(path, self._page)
    app.router.add_get("/ws", self._socket)
    app.router.add_get(r"/stream/{id:[A-Za-z0-9_-]{22}}.mp4", self._download)
    app.router.add_get("/healthz", self._health)
    app.router.add_get("/metrics", self._metrics)
    return app

  # Sessions.

  def describe(self) -> dict[str, Any]:
    """What the page needs to know at first."""
    height, width = self.pipe.frame_size
    return {"ready": self._warm.is_set(), "fps": self.pipe.fps, "width": width, "height": height,
            "policies": stream.POLICIES, "ahead": self.limits.ahead, "prompt": self.limits.prompt,
            "upload": self.limits.upload, "digit_world": (height, width) == (digit_world.SIZE, digit_world.SIZE)}

  async def warm(self) -> None:
    """Returns when the model is compiled."""
    await self._warm.wait()

  def start(self, options: dict[str, Any], image: np.ndarray | None, owner: connection.Connection) -> sessions.Session:
    """A new session; raises Refused if there are too many."""
    active = len(self.scheduler.sessions)
    if active >= self.limits.sessions or self._draining:
      raise limits_lib.Refused("busy", f"busy: {active} of {self.limits.sessions} streams run; try again in a while")
    name = secrets.token_urlsafe(16)
    record = recording.Recording(self._folder / f"{name}.mp4", self.pipe.fps, self.pipe.frame_size,
                                 round(60 * self.limits.minutes * self.pipe.fps))
    capacity = self.limits.source_chunks * self.scheduler.chunk_pixels[1]
    session = sessions.Session(name, options, image, capacity, self.limits.ahead, record)
    self.sessions[session.id], self._owners[session] = session, owner
    self.scheduler.sessions.append(session)
    self.metrics.count("sessions")
    return session

  def take_over(self, name: str, received: int, owner: connection.Connection) -> sessions.Session:
    """The session of that id for another connection that has `received` chunks; raises Refused if either is gone."""
    session = self.sessions.get(name)
    if session is None:
      raise limits_lib.Refused("unknown_session", "that session is gone: start a new one")
    session.check_received(received)
    if (before := self._owners.get(session)) is not None:
      before.session, session.send = None, None
      before.abort()
    if timer := self._leaving.pop(session, None):
      timer.cancel()
    self._owners[session] = owner
    return session

  def leave(self, session: sessions.Session) -> None:
    """Its connection is lost: the session waits for another, for a while."""
    session.send = None
    self._owners.pop(session, None)
    self._leaving[session] = asyncio.get_running_loop().call_later(
        self.limits.resume_seconds, self.forget, session)

  def end(self, session: sessions.Session, reason: str) -> None:
    """The session makes no more chunks; its recording stays while its client does."""
    if session.ended:
      return
    session.ended = reason
    self.scheduler.sessions.remove(session)
    self.scheduler.on_device(session.free)
    self._spawn(session.close_recording(self.scheduler.on_codec))
    if owner := self._owners.get(session):
      self._spawn(owner.send_json(type="state", state="ended", reason=reason))

  def forget(self, session: sessions.Session) -> None:
    """Frees all that the session holds; its client hears nothing of it."""
    self._owners.pop(session, None)
    self.sessions.pop(session.id, None)
    self.end(session, "gone")
    if timer := self._leaving.pop(session, None):
      timer.cancel()
    session.record.path.unlink(missing_ok=True)

  def _spawn(self, work: Coroutine) -> None:
    task = asyncio.create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  # Life.

  async def _run(self, app: web.Application):
    """Around the application's life."""
    del app
    with tempfile.TemporaryDirectory(prefix="causvid_serve_") as folder:
      self._folder = pathlib.Path(folder)
      self.work = asyncio.create_task(self._work())
      yield
      await asyncio.gather(*self._tasks, return_exceptions=True)
      self.scheduler.close()

  async def _work(self) -> None:
    """Compiles the model, and makes chunks."""
    await self.scheduler.warm()
    self._warm.set()
    for client in self._connections:
      self._spawn(client.send_json(type="ready"))
    await self.scheduler.run()

  async def _drain(self, app: web.Application) -> None:
    """Finishes the chunk being made, sends what was made, and says goodbye."""
    del app
    self._draining = True
    self.scheduler.stop()
    await asyncio.wait([self.work])
    await self.scheduler.drain(_DRAIN_SECONDS)
    code = aiohttp.WSCloseCode.GOING_AWAY
    await asyncio.gather(*(client.close(code, "the server is going away") for client in self._connections),
                         return_exceptions=True)
    for session in list(self.sessions.values()):
      self.forget(session)

  # Requests.

  @web.middleware
  async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
    """Refuses requests under a foreign name or without the token."""
    if not self._own_name(request):
      return self._refuse("bad_host", 403, "this server does not go by that name")
    if self._token and request.path.startswith(_SECRET) and not self._has_token(request):
      return self._refuse("bad_token", 401, "the token is missing or wrong")
    response = await handler(request)
    if not response.prepared:
      response.headers.update(_HEADERS)
    return response

  def _own_name(self, request: web.Request) -> bool:
    """Whether the Host header is ours: a server on loopback is reached by a foreign name only through a trick."""
    name = urllib.parse.urlsplit(f"//{request.host}")
    if not _is_loopback(self._host) or f"{request.scheme}://{request.host}" in self._origins:
      return True
    known = {urllib.parse.urlsplit(origin).netloc for origin in self._origins}
    return name.netloc in known or _is_loopback(name.hostname or "")

  def _own_origin(self, request: web.Request) -> bool:
    """Whether the page that opens a socket is ours; programs other than browsers send no origin."""
    origin = request.headers.get("Origin")
    return origin is None or origin in self._origins or urllib.parse.urlsplit(origin).netloc == request.host

  def _has_token(self, request: web.Request) -> bool:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.query.get("token", "")
    return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

  def _refuse(self, reason: str, status: int, message: str) -> web.Response:
    self.metrics.refuse(reason)
    return web.Response(status=status, text=message + "\n")

  async def _page(self, request: web.Request) -> web.Response:
    name, kind = _PAGE[request.path]
    text = importlib.resources.files("causvid_jax.serving").joinpath("page", name).read_text("utf-8")
    return web.Response(text=text, content_type=kind)

  async def _socket(self, request: web.Request) -> web.StreamResponse:
    if not self._own_origin(request):
      return self._refuse("bad_origin", 403, "that page may not use this server")
    if len(self._connections) >= self.limits.connections or self._draining:
      return self._refuse("busy", 503, "busy: too many connections")
    # Without compression: JPEGs do not shrink, and what a client sends cannot grow.
    socket = web.WebSocketResponse(timeout=2.0, heartbeat=_HEARTBEAT, compress=False, max_msg_size=self.limits.upload)
    await socket.prepare(request)
    client = connection.Connection(self, socket, request.transport)
    self._connections.add(client)
    try:
      await client.run()
    finally:
      self._connections.discard(client)
      if client.session is not None and not self._draining:
        self.leave(client.session)
    return socket

  async def _download(self, request: web.Request) -> web.StreamResponse:
    session = self.sessions.get(request.match_info["id"])
    if session is None:
      return self._refuse("unknown_session", 404, "no such stream")
    return web.FileResponse(session.record.path, headers={
        "Content-Disposition": 'attachment; filename="causvid.mp4"', "Content-Type": "video/mp4", **_HEADERS})

  async def _health(self, request: web.Request) -> web.Response:
    del request
    status = "draining" if self._draining else "ok" if self._warm.is_set() else "compiling"
    return web.json_response({"status": status}, status=200 if status == "ok" else 503)

  async def _metrics(self, request: web.Request) -> web.Response:
    del request
    running = self.scheduler.sessions
    states = {"detached": sum(s.send is None for s in running), "paused": sum(s.paused for s in running),
              "all": len(running)}
    gauges = {f'sessions{{state="{state}"}}': number for state, number in states.items()}
    return web.Response(text=self.metrics.text({**gauges, "connections": len(self._connections)}))


async def serve(server: Server, host: str, port: int, address: str = "") -> None:
  """Serves until SIGTERM or SIGINT, then drains.

  Args:
    server: whose `host` is this one.
    host: the interface to listen on.
    port: 0 takes any free one.
    address: appended to the address that is printed, such as a token.

  Raises:
    UserError: the port is taken or the interface is not ours.
  """
  runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=_DRAIN_SECONDS)
  await runner.setup()
  stop = asyncio.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    asyncio.get_running_loop().add_signal_handler(number, stop.set)
  stopped = asyncio.create_task(stop.wait())
  try:
    try:
      await web.TCPSite(runner, host, port).start()
    except OSError as error:
      raise errors.UserError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    print(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}/{address}", flush=True)
    await asyncio.wait([stopped, server.work], return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
      await server.work  # it ends by itself only when the model fails
  finally:
    stopped.cancel()
    await runner.cleanup()


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
