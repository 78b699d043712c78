"""The one exception that a user's input may raise, and how the command line shows it."""

from collections.abc import Callable
import sys

from absl import app
from absl import flags
from absl import logging


class UserError(ValueError):
  """A user's mistake, as one clear line: what, where, what was expected."""


def run(main: Callable[[], None]) -> None:
  """Runs an entry point: parses the flags, calls `main`, and turns a user's mistake into one line and exit status 2."""

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(argv)[1:]
      if rest:
        raise UserError(f"unexpected arguments {' '.join(rest)!r}: expected only --flags (see --help)")
      for name in flags.FLAGS:
        getattr(flags.FLAGS[name].value, "stage", None)  # a config file that is missing says so at the first read
    except AttributeError as error:  # ml_collections', on --config.key=value
      key = str(error).strip("\"'")
      fail(UserError(f"unknown config key {key!r}: expected one that the config file sets"))
    except (flags.Error, ImportError, KeyError, TypeError, ValueError, OSError) as error:
      fail(error)
    return argv[:1]

  def body(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    try:
      main()
    except UserError as error:
      fail(error)

  app.run(body, flags_parser=parse)


def fail(error: Exception) -> None:
  """Prints the error as one line on stderr and exits with status 2."""
  message = str(error.args[0]) if error.args else type(error).__name__
  before, trace, rest = message.partition("Traceback (most recent call last):")
  if trace:  # ml_collections quotes that of a failing config; its last line says what is wrong
    message = before + rest.strip().splitlines()[-1]
  print("error: " + " ".join(message.split()), file=sys.stderr)
  sys.exit(2)
