"""Errors that a person reads: one line that says what, where and what to do."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import io
import os
from pathlib import Path
import re
from typing import TextIO


class UserError(ValueError):
  """A mistake in what the user gave: a flag, a config, a file, a workdir.

  Commands print the message without a traceback and exit with code 2. The
  message says what is wrong, where, and what to do. Characters that a terminal
  cannot print, line breaks included, are escaped.
  """

  def __init__(self, text: str):
    super().__init__(
      "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
      )
    )


class _Output(io.FileIO):
  """Calls `failed` at the first write that fails, and drops it and the next."""

  def __init__(self, fd, failed):
    super().__init__(fd, "w", closefd=False)
    self._failed = failed

  def write(self, data):
    try:
      return super().write(data)
    except OSError as e:
      failed, self._failed = self._failed, lambda e: None
      failed(e)
      return len(data)


def open_output(
  fd: int, like: TextIO, failed: Callable[[OSError], None] = lambda e: None
) -> TextIO:
  """Opens standard output or error, whose reader may go away.

  Args:
    fd: the file descriptor.
    like: the stream that is replaced.
    failed: called with the error of the first write that fails; may raise.
      What is written from then on is dropped.
  """
  raw = _Output(fd, failed)
  return io.TextIOWrapper(
    raw if like.write_through else io.BufferedWriter(raw),
    encoding=like.encoding,
    errors="backslashreplace",  # A terminal's encoding may lack characters.
    line_buffering=like.line_buffering,
    write_through=like.write_through,
  )


def first_line(error: BaseException) -> str:
  """The first line of an exception's message, or else its type's name."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
  """The system's message for the error code in `error`, or else its first line.

  tensorstore's errors hold such a code in a long text.
  """
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else first_line(error)[:200]


@contextlib.contextmanager
def writing(folder: Path, *errors: type[Exception]) -> Iterator[None]:
  """Turns OSError and `errors` into a UserError that names `folder`.

  For the files of a run. Each is replaced at once, so a failed write leaves its
  earlier version.
  """
  try:
    yield
  except (OSError, *errors) as e:
    text = getattr(e, "strerror", None) or reason(e)
    raise UserError(
      f"{folder}: cannot be written: {text}. What is saved there is intact;"
      " rerun the command to resume from it"
    ) from e
