"""The server, mostly on a stub: what it refuses, how it shares the device, and that nothing grows or stays behind."""

import asyncio
import contextlib
import io
import json
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock
import zlib

from absl.testing import absltest
import aiohttp
from aiohttp import test_utils
import numpy as np
from PIL import Image

from causvid_jax.data import video
from causvid_jax.serving import images
from causvid_jax.serving import limits as limits_lib
from causvid_jax.serving import load
from causvid_jax.serving import protocol
from causvid_jax.serving import server as server_lib
import tiny

FIRST, LATER = 9, 12


class StubStream:
  """Grey frames, as bright as the seed; a source video or image comes out as it went in."""

  def __init__(self, pipe, prompt, seed, image, video, policy, strength, blend_chunks):
    self.pipe, self.prompt, self.seed, self.image, self.video = pipe, prompt, seed, image, video
    self.policy, self.strength, self.blend_chunks = policy, strength, blend_chunks
    self.seconds, self.chunks, self.closed, self.log = {"chunk": 0.01}, 0, False, []

  def __next__(self):
    if self.prompt == "fail":
      raise RuntimeError("the model failed")
    self.pipe.gate.wait()
    count = LATER if self.chunks else FIRST
    frames = np.full((count, 64, 64, 3), self.seed % 256, np.uint8)
    if self.image is not None and not self.chunks:
      frames[:] = self.image
    if self.video is not None:
      parts = [piece for _, piece in zip(range(count), self.video)]
      if not parts:
        raise StopIteration
      frames = np.concatenate(parts)
    self.chunks += 1
    self.pipe.turns.append(self.seed)
    self.log.append((self.prompt, self.policy, self.strength, self.blend_chunks))
    return frames

  def close(self):
    self.closed = True


class StubPipe:
  fps, frame_size, clip_frames, causal = 8, (64, 64), 33, True

  def __init__(self):
    self.streams, self.turns, self.gate = [], [], threading.Event()
    self.gate.set()

  def stream(self, prompt, seed=0, *, image=None, video=None, policy="recompute", strength=0.9, blend_chunks=0):
    self.streams.append(StubStream(self, prompt, seed, image, video, policy, strength, blend_chunks))
    return self.streams[-1]


def picture(color=(255, 0, 0), size=(64, 64), format="PNG", **options):
  buffer = io.BytesIO()
  Image.new("RGB", size, color).save(buffer, format, **options)
  return buffer.getvalue()


def png(width, height, data, *chunks):
  """A PNG with any header and compressed data."""
  def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
          + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


class Player:
  """A client; chunks and messages that it received."""

  def __init__(self, ws):
    self.ws, self.chunks, self.frames, self.messages = ws, [], [], []

  async def send(self, **fields):
    await self.ws.send_json(fields)

  async def next(self):
    """The next message: a dict, for a chunk with `frames` decoded; or None at the end."""
    message = await self.ws.receive(timeout=10)
    if message.type is aiohttp.WSMsgType.BINARY:
      header, parts = protocol.unpack(message.data)
      self.chunks.append(header)
      self.frames += [np.asarray(Image.open(io.BytesIO(part))) for part in parts]
      return header
    if message.type is aiohttp.WSMsgType.TEXT:
      self.messages.append(json.loads(message.data))
      return self.messages[-1]
    return None

  async def until(self, kind):
    while (message := await self.next()) is not None:
      if message["type"] == kind:
        return message
    raise AssertionError(f"the socket closed ({self.ws.close_code}) before {kind}")

  async def play(self, chunks):
    """Receives and acknowledges."""
    for _ in range(chunks):
      await self.send(type="ack", chunk=(await self.until("chunk"))["chunk"])

  async def silent(self, seconds=0.2):
    """Whether nothing comes for that long."""
    try:
      await asyncio.wait_for(self.ws._reader.read(), seconds)
      return False
    except TimeoutError:
      return True


class ServerTestCase(unittest.IsolatedAsyncioTestCase, absltest.TestCase):

  async def serve(self, pipe=None, **settings):
    """A server with a stub; `self.client` talks to it."""
    names = limits_lib.Limits.__dataclass_fields__
    limits = limits_lib.Limits(**{name: value for name, value in settings.items() if name in names})
    self.pipe = pipe or StubPipe()
    self.server = server_lib.Server(
        self.pipe, limits, **{name: value for name, value in settings.items() if name not in names})
    server = test_utils.TestServer(self.server.application())
    await server.start_server(access_log=None)
    self.client = test_utils.TestClient(server)
    await self.client.start_server()
    self.addAsyncCleanup(self.client.close)
    await self.server.warm()
    self.pipe.streams.clear()
    self.pipe.turns.clear()

  async def connect(self, **options):
    player = Player(await self.client.ws_connect("/ws", **options))
    self.assertEqual((await player.next())["type"], "hello")
    return player

  async def start(self, prompt="a red seven moving left", **fields):
    player = await self.connect()
    await player.send(type="start", prompt=prompt, **fields)
    player.session = (await player.until("started"))["session"]
    return player

  async def assert_alive(self):
    player = await self.start()
    await player.play(2)
    await player.send(type="stop")
    self.assertEqual((await player.until("state"))["reason"], "stopped")
    await player.ws.close()

  async def metric(self, name):
    text = await (await self.client.get("/metrics")).text()
    return float(re.search(rf"^causvid_{re.escape(name)} (\S+)$", text, re.M)[1])

  async def eventually(self, condition):
    for _ in range(300):
      if condition():
        return
      await asyncio.sleep(0.02)
    self.fail("it never came true")


class StreamTest(ServerTestCase):

  async def test_chunks_come_in_order_under_the_prompt(self):
    await self.serve()
    player = await self.start(seed=200, policy="keep", strength=0.5, blend=2)
    await player.play(3)
    await player.send(type="steer", prompt="a blue two moving up", policy="flush", strength=1, blend=0)
    await player.play(3)
    self.assertEqual([chunk["chunk"] for chunk in player.chunks], [1, 2, 3, 4, 5, 6])
    self.assertEqual([chunk["frame"] for chunk in player.chunks[:3]], [0, FIRST, FIRST + LATER])
    self.assertEqual(player.chunks[-1]["prompt"], "a blue two moving up")
    self.assertEqual(self.pipe.streams[0].log[0], ("a red seven moving left", "keep", 0.5, 2))
    self.assertEqual(self.pipe.streams[0].log[-1], ("a blue two moving up", "flush", 1, 0))
    np.testing.assert_allclose(player.frames[0], 200, atol=2)

  async def test_pause_resume_and_stop(self):
    await self.serve(ahead=1)
    player = await self.start()
    await player.until("chunk")
    await player.send(type="pause")
    self.assertEqual((await player.until("state"))["state"], "paused")
    await player.send(type="ack", chunk=1)
    await player.send(type="steer", prompt="x")
    await asyncio.sleep(0.1)
    self.assertLen(self.pipe.turns, 1)
    await player.send(type="resume")
    self.assertEqual((await player.until("chunk"))["prompt"], "x")
    await player.send(type="stop")
    await player.until("state")
    await self.eventually(lambda: self.pipe.streams[0].closed)
    self.assertEmpty(self.server.scheduler.sessions)

  async def test_image_first(self):
    await self.serve()
    player = await self.connect()
    await player.send(type="start", prompt="x", source="image")
    self.assertEqual((await player.until("error"))["code"], "no_image")
    await player.ws.send_bytes(protocol.pack({"type": "image"}, [picture((0, 255, 0), (200, 100), "JPEG")]))
    await player.until("image")
    await player.send(type="start", prompt="x", source="image")
    await player.until("chunk")
    np.testing.assert_allclose(player.frames[0][32, 32], [0, 255, 0], atol=4)

  async def test_video_in_video_out_to_its_end(self):
    await self.serve()
    player = await self.start(source="video")
    self.assertGreaterEqual(player.messages[-1]["source_frames"], LATER)
    for value in range(25):
      frame = picture((10 * value, 0, 0), format="WEBP", lossless=True)
      await player.ws.send_bytes(protocol.pack({"type": "frames"}, [frame]))
    await player.play(2)
    self.assertLen(player.frames, FIRST + LATER)
    await player.send(type="source_end")
    await player.play(1)
    self.assertEqual((await player.until("state"))["reason"], "the source video is over")
    self.assertLen(player.frames, 25)
    np.testing.assert_allclose([frame[32, 32, 0] for frame in player.frames], 10 * np.arange(25), atol=3)

  async def test_the_recording_is_playable_while_it_grows(self):
    most = FIRST + 4 * LATER
    await self.serve(minutes=most / 60 / 8, ahead=1)
    player = await self.start(seed=120)
    with tempfile.TemporaryDirectory() as folder:
      for chunk, frames in ((1, FIRST - 1), (3, FIRST + 2 * LATER - 1), (7, most)):
        while (await player.until("chunk"))["chunk"] < chunk:
          await player.send(type="ack", chunk=player.chunks[-1]["chunk"])
        if chunk == 7:
          await player.send(type="stop")
          await player.until("state")
          await self.eventually(lambda: self.server.sessions[player.session].record.closed)
        response = await self.client.get(f"/stream/{player.session}.mp4")
        self.assertEqual(response.content_type, "video/mp4")
        path = pathlib.Path(folder) / "stream.mp4"
        path.write_bytes(await response.read())
        found, fps = video.read_video(path)
        self.assertEqual((len(found), fps), (frames, 8))
        np.testing.assert_allclose(found.astype(int), 120, atol=4)
        await player.send(type="ack", chunk=min(chunk, 6))

  async def test_a_failing_stream_takes_no_other_along(self):
    await self.serve()
    other = await self.start()
    player = await self.start(prompt="fail")
    with self.assertLogs(level="ERROR"):
      message = await player.until("state")
    self.assertEqual((message["state"], message["reason"]), ("ended", "the server failed to make a chunk"))
    await other.play(3)

  async def test_health_metrics_and_page(self):
    await self.serve()
    player = await self.start()
    await player.play(2)
    self.assertEqual(await (await self.client.get("/healthz")).json(), {"status": "ok"})
    self.assertGreaterEqual(await self.metric("chunks_total"), 2)
    self.assertEqual(await self.metric('chunk_seconds_bucket{le="0.025"}'), await self.metric("chunk_seconds_count"))
    self.assertEqual(await self.metric('sessions{state="all"}'), 1)
    self.assertEqual(await self.metric("sessions_total"), 1)
    page = await self.client.get("/")
    self.assertIn("frame-ancestors 'none'", page.headers["Content-Security-Policy"])
    for name in re.findall(r'(?:src|href)="(\w+\.\w+)"', await page.text()):
      self.assertEqual((await self.client.get(f"/{name}")).status, 200, name)


class RefusalTest(ServerTestCase):

  async def test_malformed_text(self):
    await self.serve(refusals=100)
    player = await self.connect()
    for text in ("", "{", "[]", "7", '"start"', "{}", '{"type": 3}', '{"type": []}', '{"type": "sudo"}', "[" * 10_000,
                 '{"type": "start"}', '{"type": "start", "prompt": "x", "colour": 1}', '{"type": "ack"}',
                 '{"type": "pause", "now": true}', '{"type": "__init__"}', "x" * 20_000,
                 '{"type": "ack", "chunk": ' + "9" * 5000):
      await player.ws.send_str(text)
      message = await player.until("error")
      self.assertIn(message["code"], ("malformed", "too_long"), text[:60])
      self.assertLess(len(message["message"]), 300)
    self.assertEqual(await self.metric('refused_total{reason="too_long"}'), 1)
    await self.assert_alive()

  async def test_bad_values(self):
    await self.serve(prompt=50, refusals=100)
    player = await self.connect()
    for fields in ({"prompt": "x" * 51}, {"prompt": 7}, {"prompt": None}, {"prompt": "\ud800"}, {"seed": -1},
                   {"seed": 2**31}, {"seed": 0.5}, {"seed": True}, {"policy": "forget"}, {"policy": ["keep"]},
                   {"strength": 0},
                   {"strength": 1.1}, {"strength": float("nan")}, {"strength": float("inf")}, {"strength": "1"},
                   {"blend": -1}, {"blend": 10**9}, {"source": "file:///etc/passwd"}):
      await player.send(**{"type": "start", "prompt": "x", **fields})
      self.assertEqual((await player.until("error"))["code"], "bad_value", fields)
    self.assertEmpty(self.pipe.streams)
    await player.send(type="start", prompt="x" * 50)
    await player.until("chunk")
    await player.send(type="ack", chunk=10**6)
    self.assertRegex((await player.until("error"))["message"], "at most [12], the last sent")

  async def test_messages_out_of_turn(self):
    await self.serve()
    player = await self.connect()
    for fields in ({"type": "steer", "prompt": "x"}, {"type": "pause"}, {"type": "resume"}, {"type": "stop"},
                   {"type": "source_end"}):
      await player.send(**fields)
      self.assertEqual((await player.until("error"))["code"], "no_session", fields)
    frames = protocol.pack({"type": "frames"}, [picture()])
    await player.ws.send_bytes(frames)
    self.assertEqual((await player.until("error"))["code"], "no_session")
    await player.send(type="start", prompt="x")
    await player.ws.send_bytes(frames)
    self.assertEqual((await player.until("error"))["code"], "no_source")

  async def test_binary_junk(self):
    await self.serve(refusals=100)
    player = await self.connect()
    good = protocol.pack({"type": "image"}, [picture()])
    def header(text):
      return struct.pack(">I", len(text)) + text
    for junk in (b"", b"\0", b"\xff" * 4, b"\xff" * 5000, os.urandom(1000), good[:20], good[:-1], good + b"x",
                 header(b"\xff\xfe"), header(b"{}"), header(b"[1]"), header(b'{"type": "image", "sizes": [0]}'),
                 header(b'{"type": "image", "sizes": [-5, 5]}'), header(b'{"type": "image", "sizes": [1e9]}'),
                 header(b'{"type": "image", "sizes": [1, 1]}') + b"ab",
                 header(b'{"type": "exec", "sizes": [1]}') + b"a",
                 header(b'{"type": "frames", "sizes": [' + b"1," * 70 + b"1]}") + b"a" * 71, header(b"[" * 4000)):
      await player.ws.send_bytes(junk)
      self.assertEqual((await player.until("error"))["code"], "malformed", junk[:60])
    await self.assert_alive()

  async def test_bad_pictures(self):
    await self.serve(pixels=1 << 20, refusals=100)
    player = await self.connect()
    still, other = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "red")
    def animated(format):
      buffer = io.BytesIO()
      still.save(buffer, format, save_all=True, append_images=[other])
      return buffer.getvalue()
    canvas = struct.pack("<I", 1 << 1)[:4] + (16382).to_bytes(3, "little") * 2
    webp = b"VP8X" + struct.pack("<I", len(canvas)) + canvas
    webp = b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp
    bomb = png(20_000, 20_000, zlib.compress(bytes(20_000 * 200), 9))
    text = png(8, 8, zlib.compress(bytes(72)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9)))
    whole = picture(size=(512, 512), format="JPEG")
    before = _resident()
    for name, content, code in (
        ("gif", animated("GIF"), "bad_image"), ("animated png", animated("PNG"), "bad_image"),
        ("animated webp", animated("WEBP"), "bad_image"), ("bomb", bomb, "too_large"),
        ("huge header", png(2**31 - 1, 2**31 - 1, b"x"), "too_large"), ("huge webp", webp, "bad_image|too_large"),
        ("compressed text", text, "bad_image"), ("large jpeg", picture(size=(2000, 1000), format="JPEG"), "too_large"),
        ("half a jpeg", whole[:len(whole) // 2], "bad_image"), ("svg", b"<svg/>", "bad_image"),
        ("bmp", picture(format="BMP"), "bad_image"), ("tiff", picture(format="TIFF"), "bad_image"),
        ("junk", os.urandom(2000), "bad_image"), ("empty size", png(0, 0, b""), "bad_image"),
        ("too little data", png(64, 64, zlib.compress(bytes(10))), "bad_image")):
      await player.ws.send_bytes(protocol.pack({"type": "image"}, [content]))
      self.assertRegex((await player.until("error"))["code"], code, name)
    self.assertLess(_resident() - before, 120 << 20)
    await player.ws.send_bytes(protocol.pack({"type": "image"}, [picture(size=(1024, 1024))]))
    await player.until("image")
    await self.assert_alive()

  async def test_mistakes_are_counted(self):
    await self.serve(refusals=3)
    player = await self.connect()
    for _ in range(3):
      await player.ws.send_str("junk")
    while await player.next() is not None:
      pass
    self.assertEqual(player.ws.close_code, aiohttp.WSCloseCode.POLICY_VIOLATION)
    await self.assert_alive()

  async def test_oversized_messages_and_broken_frames(self):
    await self.serve(upload=10_000)
    player = await self.connect()
    await player.ws.send_bytes(bytes(20_000))
    self.assertIsNone(await player.next())
    self.assertEqual(player.ws.close_code, aiohttp.WSCloseCode.MESSAGE_TOO_BIG)
    for junk in (b"\xff" * 64, b"\x81\xff" + b"\xff" * 8 + b"abcd", os.urandom(300), b"\x83\x80abcd"):
      reader, writer = await asyncio.open_connection("127.0.0.1", self.client.port)
      writer.write(b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" + junk)
      await asyncio.wait_for(reader.read(), 10)  # the server closes
      writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", self.client.port)
    writer.write(b"\0\1\2 junk that is no HTTP\r\n\r\n")
    self.assertIn(b"400", await asyncio.wait_for(reader.read(), 10))
    writer.close()
    self.assertGreaterEqual(await self.metric('refused_total{reason="bad_frame"}'), 1)
    await self.assert_alive()

  async def test_paths(self):
    await self.serve()
    player = await self.start()
    await player.play(1)
    for path in ("/stream/../../../../etc/passwd", "/stream/..%2f..%2fetc%2fpasswd.mp4", "/stream/%2e%2e/%2e%2e/x.mp4",
                 f"/stream/{player.session}.mp4/../x", f"/stream/{player.session}%00.mp4", f"/stream/{'A' * 22}.mp4",
                 "/server.py", "/page/../server.py", "/..%2fserver.py", "/%2fetc/passwd", "/stream/", "//etc/passwd"):
      reader, writer = await asyncio.open_connection("127.0.0.1", self.client.port)
      writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
      answer = await asyncio.wait_for(reader.read(), 10)
      writer.close()
      self.assertRegex(answer.split(b"\r\n")[0], b" (404|400) ", path)
      self.assertNotIn(b"root:", answer)

  async def test_origins_and_names(self):
    await self.serve(origins=["https://video.example.org"])
    for origin, right in (("https://evil.example.org", False), ("null", False), ("http://127.0.0.1:1", False),
                          (f"http://127.0.0.1:{self.client.port}", True), ("https://video.example.org", True)):
      if right:
        await self.connect(headers={"Origin": origin})
      else:
        with self.assertRaises(aiohttp.WSServerHandshakeError, msg=origin) as caught:
          await self.connect(headers={"Origin": origin})
        self.assertEqual(caught.exception.status, 403)
    for host, status in (("evil.example.org", 403), ("localhost:80", 200), ("video.example.org", 200),
                         ("[::1]:8000", 200)):
      self.assertEqual((await self.client.get("/", headers={"Host": host})).status, status, host)
    await self.assert_alive()

  async def test_the_token(self):
    await self.serve(token="sesame")
    self.assertEqual((await self.client.get("/")).status, 200)
    self.assertEqual((await self.client.get("/healthz")).status, 200)
    for query, headers, status in (("", {}, 401), ("?token=Sesame", {}, 401), ("?token=%ff%fe", {}, 401),
                                   ("", {"Authorization": "Bearer x"}, 401), ("?token=sesame", {}, 200),
                                   ("", {"Authorization": "Bearer sesame"}, 200)):
      self.assertEqual((await self.client.get(f"/metrics{query}", headers=headers)).status, status)
    self.assertEqual((await self.client.get(f"/stream/{'A' * 22}.mp4")).status, 401)
    with self.assertRaises(aiohttp.WSServerHandshakeError) as caught:
      await self.client.ws_connect("/ws")
    self.assertEqual(caught.exception.status, 401)
    player = Player(await self.client.ws_connect("/ws?token=sesame"))
    await player.until("hello")

  async def test_busy(self):
    await self.serve(sessions=2, connections=3)
    first, second = await self.start(), await self.start()
    third = await self.connect()
    await third.send(type="start", prompt="x")
    self.assertRegex((await third.until("busy"))["message"], "busy: 2 of 2 streams run")
    with self.assertRaises(aiohttp.WSServerHandshakeError) as caught:
      await self.client.ws_connect("/ws")
    self.assertEqual(caught.exception.status, 503)
    await first.send(type="stop")
    await first.until("state")
    await third.send(type="start", prompt="x")
    await third.play(2)
    await second.send(type="start", prompt="y")  # its own place is free again
    await second.until("started")
    second.messages.clear()
    await second.play(3)
    self.assertEmpty(second.messages)  # nothing of the stream that it replaced


class FairnessTest(ServerTestCase):

  async def test_turns(self):
    await self.serve(ahead=2)
    self.pipe.gate.clear()
    players = [await self.start(seed=seed) for seed in (1, 2, 3)]
    self.pipe.gate.set()
    await asyncio.gather(*(player.play(20) for player in players))
    turns = self.pipe.turns[3:54]  # while all three have chunks to make
    counts = [turns[:i].count(seed) for i in range(0, len(turns), 6) for seed in (1, 2, 3)]
    spread = [max(counts[i:i + 3]) - min(counts[i:i + 3]) for i in range(0, len(counts), 3)]
    self.assertLessEqual(max(spread), 3)
    self.assertEqual(sorted(self.pipe.turns[:3]), [1, 2, 3])

  async def test_a_greedy_client_waits_its_turn(self):
    """While one chunk is made, all others have become ready: the order is strict."""
    await self.serve(ahead=4)
    self.pipe.gate.clear()
    players = [await self.start(seed=seed) for seed in (1, 2, 3)]
    await self.eventually(lambda: len(self.server.scheduler.sessions) == 3)
    self.pipe.gate.set()
    for player in players:
      for _ in range(4):
        await player.until("chunk")
    self.assertEqual(self.pipe.turns, [1, 2, 3] * 4)

  async def test_a_slow_client_pauses_its_own_stream_only(self):
    await self.serve(ahead=2)
    slow, fast = await self.start(seed=1), await self.start(seed=2)
    await fast.play(30)
    self.assertEqual(self.pipe.turns.count(1), 2)
    session = self.server.sessions[slow.session]
    self.assertLen(session.unacknowledged, 2)
    await slow.play(2)
    await slow.until("chunk")
    self.assertLessEqual(self.pipe.turns.count(1), 4)

  async def test_a_client_that_does_not_read_holds_nobody_up(self):
    await self.serve(ahead=2)
    stuck, fast = await self.start(seed=1), await self.start(seed=2)
    release = asyncio.Event()
    async def never(message):
      await release.wait()
    self.server.sessions[stuck.session].send = never
    await stuck.send(type="ack", chunk=1)
    await fast.play(30)
    self.assertLessEqual(self.pipe.turns.count(1), 3)
    release.set()

  async def test_a_source_never_grows(self):
    await self.serve(source_chunks=2)
    player = await self.start(source="video")
    await player.send(type="pause")
    room = player.messages[-1]["source_frames"]
    batch = protocol.pack({"type": "frames"}, [picture()] * 10)
    for _ in range(30):
      await player.ws.send_bytes(batch)
    await player.send(type="ack", chunk=0)
    await player.send(type="resume")
    while (await player.until("state"))["state"] != "running":
      pass
    self.assertEqual(room, 2 * LATER)
    self.assertGreaterEqual(await self.metric("source_frames_dropped_total"), 300 - room - FIRST - LATER)
    self.assertLessEqual(len(self.server.sessions[player.session].source), room)


class ConnectionTest(ServerTestCase):

  async def test_a_lost_connection_comes_back(self):
    await self.serve(ahead=3)
    player = await self.start()
    await player.play(3)
    while player.chunks[-1]["chunk"] < 5:
      await player.until("chunk")
    player.ws._response.connection.transport.abort()
    await self.eventually(lambda: self.server.sessions[player.session].send is None)
    made = len(self.pipe.turns)
    await asyncio.sleep(0.1)
    self.assertLen(self.pipe.turns, made)  # nothing is made for nobody
    again = await self.connect()
    await again.send(type="reconnect", session=player.session, chunk=5)
    self.assertTrue((await again.until("started"))["resumed"])
    await again.play(4)
    self.assertEqual([chunk["chunk"] for chunk in again.chunks], [6, 7, 8, 9])
    self.assertLen(self.pipe.streams, 1)

  async def test_it_does_not_wait_for_ever(self):
    await self.serve(resume_seconds=0.2)
    player = await self.start()
    await player.play(2)
    path = self.server.sessions[player.session].record.path
    self.assertTrue(path.exists())
    await player.ws.close()
    await self.eventually(lambda: not self.server.sessions)
    await self.eventually(lambda: self.pipe.streams[0].closed)
    self.assertFalse(path.exists())
    self.assertEmpty(self.server.scheduler.sessions)
    again = await self.connect()
    await again.send(type="reconnect", session=player.session, chunk=2)
    self.assertEqual((await again.until("error"))["code"], "unknown_session")
    self.assertEqual((await self.client.get(f"/stream/{player.session}.mp4")).status, 404)

  async def test_taken_over_by_another_window(self):
    await self.serve()
    player = await self.start()
    await player.play(2)
    other = await self.connect()
    await other.send(type="reconnect", session=player.session, chunk=0)
    self.assertEqual((await other.until("error"))["code"], "bad_value")  # chunks 1 and 2 are gone
    await other.send(type="reconnect", session=player.session, chunk=2)
    await other.play(3)
    while await player.next() is not None:
      pass
    self.assertTrue(player.ws.closed)
    self.assertLen(self.server.sessions, 1)

  async def test_silence_ends_a_connection(self):
    await self.serve(idle_seconds=0.3, resume_seconds=0.1)
    player = await self.start()
    while await player.next() is not None:
      pass
    self.assertEqual(player.ws.close_code, 4000)
    await self.eventually(lambda: not self.server.sessions)

  async def test_nothing_stays_behind(self):
    await self.serve(resume_seconds=0.0)
    for _ in range(20):
      player = await self.start()
      await player.play(1)
      await player.ws.close()
    await self.eventually(lambda: not self.server.sessions and all(stream.closed for stream in self.pipe.streams))
    for left in (self.server._connections, self.server._owners, self.server._leaving, self.server.scheduler.sessions):
      self.assertEmpty(left)
    self.assertEmpty(list(self.server._folder.iterdir()))

  async def test_load(self):
    await self.serve(sessions=3)
    with mock.patch.object(StubPipe, "fps", 200), contextlib.redirect_stdout(io.StringIO()) as out:
      self.assertTrue(await load.load(str(self.client.make_url("")).rstrip("/"), "", 5, 2.0, 1.5))
    self.assertRegex(out.getvalue(), r"client 0: \d+ chunks, longest wait")
    self.assertRegex(out.getvalue(), r"server: \d+ MiB, \S+ MiB a minute; 0 of 5 clients stuck")


class ImagesTest(absltest.TestCase):

  def test_orientation_and_transparency(self):
    limits = limits_lib.Limits()
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, :20] = 255
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(half).save(buffer, "JPEG", exif=exif, quality=95)
    found = images.decode(buffer.getvalue(), limits)
    self.assertEqual(found.shape, (40, 20, 3))
    self.assertGreater(found[5].mean(), 200)
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(buffer, "PNG")
    self.assertEqual(images.decode(buffer.getvalue(), limits).max(), 0)

  def test_frames_survive(self):
    rng = np.random.default_rng(0)
    frame = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 10, 3), np.uint8)).resize((832, 480)))
    found = np.asarray(Image.open(io.BytesIO(images.encode(frame))))
    self.assertLess(np.abs(found.astype(int) - frame).mean(), 2)


class ProcessTest(absltest.TestCase):
  """`python -m causvid_jax.serve` in a process of its own, with a tiny model."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    tiny.build(cls.folder)
    cls.environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TMPDIR": str(cls.folder)}

  def spawn(self, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "causvid_jax.serve", *args], cwd=tiny.ROOT, env=self.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def refused(self, pattern, *args):
    process = self.spawn(*args)
    _, error = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 2, error)
    self.assertRegex(error, pattern)
    self.assertEqual(error.count("\n"), 1, error)

  def test_mistakes_on_the_command_line(self):
    teacher, student = (f"--checkpoint={self.folder / name}" for name in ("teacher", "student"))
    self.refused("error: .*teacher is bidirectional and cannot stream", teacher, "--port=0")
    with socket.socket() as taken:
      taken.bind(("127.0.0.1", 0))
      taken.listen()
      port = taken.getsockname()[1]
      self.refused(f"error: cannot listen on 127.0.0.1:{port}", student, f"--port={port}")

  def test_sigterm_drains(self):
    process = self.spawn(f"--checkpoint={self.folder / 'student'}", "--port=0", "--token=sesame")
    self.addCleanup(process.kill)
    url = process.stdout.readline().strip()
    self.assertRegex(url, r"^http://127\.0\.0\.1:\d+/\?token=sesame$")
    before = set(self.folder.iterdir())
    chunks, code = asyncio.run(self.stream_until_sigterm(url.replace("/?", "/ws?"), process))
    _, error = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 0, error)
    self.assertEqual(code, aiohttp.WSCloseCode.GOING_AWAY)
    self.assertGreaterEqual(chunks, 3)
    self.assertNotIn("Traceback", error)
    self.assertLess(set(self.folder.iterdir()), before)  # the recordings are gone

  async def stream_until_sigterm(self, url, process):
    async with aiohttp.ClientSession() as http, http.ws_connect(url) as ws:
      player = Player(ws)
      await ws.receive()
      await player.send(type="start", prompt="a red seven moving left")
      deadline = time.monotonic() + 90  # it compiles first
      while len(player.chunks) < 3 and time.monotonic() < deadline:
        message = await ws.receive(timeout=90)
        if message.type is aiohttp.WSMsgType.BINARY:
          header, _ = protocol.unpack(message.data)
          player.chunks.append(header)
          await player.send(type="ack", chunk=header["chunk"])
      process.send_signal(signal.SIGTERM)
      while await player.next() is not None:
        pass
      return len(player.chunks), ws.close_code


def _resident():
  with open("/proc/self/statm", encoding="ascii") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  absltest.main()
