"""Loads a running server: `python -m causvid_jax.serving.load --clients=4 --seconds=600`.

Every client plays its stream in real time and now and then steers, pauses, loses its connection and comes back. Prints
the chunks and the longest wait of each, and the slope of the server's memory. Exits with status 1 if one was stuck.
"""

import asyncio
import random
import re
import sys
import time

from absl import flags
import aiohttp
import numpy as np

from causvid_jax import errors
from causvid_jax.serving import protocol

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "The server.")
_TOKEN = flags.DEFINE_string("token", "", "Its token.")
_CLIENTS = flags.DEFINE_integer(
    "clients", 4, "Clients at once; those beyond the server's sessions are told that it is busy.", 1)
_SECONDS = flags.DEFINE_float("seconds", 600.0, "How long.", 1.0)
_STUCK = flags.DEFINE_float("stuck", 30.0, "Seconds without a chunk that count as stuck.", 1.0)
_PROMPTS = ("a red seven moving left", "a blue two moving up", "a green five moving right and a cyan one moving down")


class Client:
  """One client; its record is `chunks`, `waits` (seconds from asking for a chunk to it), `reconnects` and `busy`."""

  def __init__(self, http: aiohttp.ClientSession, url: str, seed: int):
    self._http, self._url, self._rng, self._seed = http, url, random.Random(seed), seed
    self._session, self._received = "", 0
    self.chunks = self.reconnects = self.busy = 0
    self.waits = [0.0]

  async def run(self, until: float) -> None:
    while time.monotonic() < until:
      async with self._http.ws_connect(f"{self._url}/ws") as socket:
        hello = await socket.receive_json()
        if self._session:
          await socket.send_json({"type": "reconnect", "session": self._session, "chunk": self._received})
          self.reconnects += 1
        else:
          await socket.send_json({"type": "start", "prompt": self._rng.choice(_PROMPTS), "seed": self._seed})
        await self._play(socket, hello["fps"], until)

  async def _play(self, socket: aiohttp.ClientWebSocketResponse, fps: float, until: float) -> None:
    """Until the time is over, the server says busy, or the connection is dropped on purpose."""
    asked = time.monotonic()
    while (left := until - time.monotonic()) > 0:
      try:
        message = await socket.receive(timeout=left)
      except TimeoutError:
        self.waits.append(time.monotonic() - asked)
        return
      if message.type is aiohttp.WSMsgType.TEXT:
        fields = message.json()
        if fields["type"] == "started":
          self._session = fields["session"]
        elif fields["type"] in ("busy", "error"):
          self._session, self.busy = "", self.busy + 1
          await asyncio.sleep(1.0)
          return
      elif message.type is aiohttp.WSMsgType.BINARY:
        header, _ = protocol.unpack(message.data)
        self.waits.append(time.monotonic() - asked)
        self.chunks, self._received = self.chunks + 1, header["chunk"]
        await asyncio.sleep(header["frames"] / fps)
        if not await self._whim(socket):
          return
        await socket.send_json({"type": "ack", "chunk": self._received})
        asked = time.monotonic()
      else:
        return

  async def _whim(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
    """What a person might do after a chunk; False after dropping the connection."""
    whim = self._rng.random()
    if whim < 0.3:
      await socket.send_json({"type": "steer", "prompt": self._rng.choice(_PROMPTS)})
    elif whim < 0.35:
      await socket.send_json({"type": "pause"})
      await asyncio.sleep(1.0)
      await socket.send_json({"type": "resume"})
    return whim < 0.95


async def _memory(http: aiohttp.ClientSession, url: str) -> float:
  """MiB of the server."""
  async with http.get(f"{url}/metrics") as response:
    return float(re.search(r"^causvid_resident_memory_bytes (\S+)", await response.text(), re.M)[1]) / 2**20


async def load(url: str, token: str, clients: int, seconds: float, stuck: float) -> bool:
  """Runs the clients and prints what came of it; returns whether none was stuck."""
  headers = {"Authorization": f"Bearer {token}"} if token else {}
  async with aiohttp.ClientSession(headers=headers) as http:
    people = [Client(http, url, seed) for seed in range(clients)]
    start = time.monotonic()
    running = asyncio.gather(*(person.run(start + seconds) for person in people))
    samples = []
    while not running.done():
      samples.append((time.monotonic() - start, await _memory(http, url)))
      await asyncio.wait([running], timeout=min(seconds / 20, 10.0))
    await running
  for number, person in enumerate(people):
    print(f"client {number}: {person.chunks} chunks, longest wait {max(person.waits):.2f} s,"
          f" {person.reconnects} reconnects, {person.busy} times busy")
  times, memory = np.array(samples[len(samples) // 4:]).T  # the first quarter fills caches
  slope = np.polyfit(times, memory, 1)[0] * 60 if len(times) > 1 else 0.0
  losers = [person for person in people if max(person.waits) > stuck]
  print(f"server: {memory[-1]:.0f} MiB, {slope:+.2f} MiB a minute; {len(losers)} of {clients} clients stuck")
  return not losers


def main() -> None:
  try:
    fine = asyncio.run(load(_URL.value.rstrip("/"), _TOKEN.value, _CLIENTS.value, _SECONDS.value, _STUCK.value))
  except aiohttp.ClientError as error:
    raise errors.UserError(f"{_URL.value}: {error}") from error
  if not fine:
    sys.exit(1)


if __name__ == "__main__":
  errors.run(main)
