"""The caption grammar of the digit world: a colour, a digit and a heading for each of one or two things.

A caption is "a <colour> <digit> moving <direction>", and two things are joined by "and": "a red seven moving
left and a blue two moving up". The heading is the one of the first frame. Because `parse` inverts `describe`,
a video can be judged against its caption alone.
"""

import dataclasses
import re

import numpy as np

from causvid_jax import errors

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 64, 64),
    "green": (64, 220, 64),
    "blue": (80, 112, 255),
    "yellow": (250, 220, 50),
    "purple": (190, 80, 240),
    "cyan": (50, 220, 230),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS: dict[str, tuple[int, int]] = {  # (dy, dx), y pointing down as image rows do
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}
NEGATIVE_PROMPT = ""
PAIR_PROBABILITY = 0.25

_THING = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(DIGITS)}) moving ({'|'.join(DIRECTIONS)})")


@dataclasses.dataclass(frozen=True)
class Thing:
  """One coloured digit (0 to 9) and the name of its first heading."""

  color: str
  digit: int
  direction: str


def describe(things: tuple[Thing, ...]) -> str:
  """Returns the caption of one or more things, in their drawing order."""
  return " and ".join(f"a {t.color} {DIGITS[t.digit]} moving {t.direction}" for t in things)


def parse(caption: str) -> tuple[Thing, ...]:
  """Inverts `describe`.

  Raises:
    UserError: when the caption is not one or two things of the grammar.
  """
  matches = [_THING.fullmatch(part) for part in caption.strip().lower().split(" and ")]
  if len(matches) > 2 or not all(matches):
    raise errors.UserError(
        f"caption {caption!r} is not of the digit world: expected 'a <color> <digit> moving <direction>',"
        " at most two joined by 'and', for example 'a red seven moving left and a blue two moving up'")
  return tuple(Thing(m[1], DIGITS.index(m[2]), m[3]) for m in matches)


def sample_things(rng: np.random.Generator) -> tuple[Thing, ...]:
  """Draws one thing, or with `PAIR_PROBABILITY` two of different colours, uniformly over the grammar."""
  count = 2 if rng.random() < PAIR_PROBABILITY else 1
  colors = rng.choice(list(COLORS), count, replace=False)
  return tuple(Thing(str(color), int(rng.integers(len(DIGITS))), str(rng.choice(list(DIRECTIONS))))
               for color in colors)
