"""Prompts from text: schedules, which change the prompt at given frames, and files of prompts."""

import os
import pathlib

from causvid_jax import errors


def parse(text: str) -> list[tuple[int, str]]:
  """Reads "0: a red seven moving left; 120: a blue two moving up" as [(0, "a red seven moving left"), (120, ...)].

  Raises:
    UserError: an entry is not FRAME: PROMPT, the first frame is not 0, or the frames do not increase.
  """
  entries = []
  for part in text.split(";"):
    frame, colon, prompt = part.partition(":")
    if not colon or not frame.strip().isdecimal():
      raise errors.UserError(f"schedule: {part.strip()!r}: expected FRAME: PROMPT, and a semicolon between two")
    entries.append((int(frame), prompt.strip()))
  frames = [frame for frame, _ in entries]
  if frames[0] != 0 or any(a >= b for a, b in zip(frames, frames[1:])):
    raise errors.UserError(f"schedule: frames {', '.join(map(str, frames))}: expected 0 first, then growing numbers")
  return entries


def read_prompts(path: str | os.PathLike) -> list[str]:
  """The prompts of a text file, one a line; empty lines do not count.

  Raises:
    UserError: the file cannot be read, or has none.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f"{path}: expected a text file of prompts, got: {error}") from error
  if not (prompts := [line.strip() for line in lines if line.strip()]):
    raise errors.UserError(f"{path}: expected a prompt a line, found none")
  return prompts
