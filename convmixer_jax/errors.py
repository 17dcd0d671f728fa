"""Errors that a person reads: one line that says what, where and what to do."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import io
import os
from pathlib import Path
import re
from typing import TextIO

# What the system may say of damaged files: one is missing, or a name or an
# offset makes no sense.
_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
              errno.EINVAL)  # fmt: skip


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


def platform_error(error: BaseException) -> UserError | None:
  """A line for jax's error that JAX_PLATFORMS names no platform here."""
  if "Unable to initialize backend" not in str(error):
    return None
  chosen = os.environ.get("JAX_PLATFORMS", "")
  return UserError(f"JAX_PLATFORMS={chosen}: {first_line(error)}")


def damage(folder: Path, problem: Exception | str) -> str:
  """Says how the files in `folder` are damaged.

  Args:
    folder: of a checkpoint.
    problem: what reading it raised, or else a text.

  Raises:
    UserError: they may be whole: the disk, a permission, the network or memory
      failed.
  """
  causes, cause = [], problem
  while isinstance(cause, BaseException):
    causes.append(cause)
    cause = cause.__cause__ or cause.__context__
  try:  # orbax does not raise all errors, so each file is read once more.
    for file in folder.rglob("*"):
      if file.is_file():
        with file.open("rb") as f:
          while f.read(1 << 24):
            pass
  except OSError as e:
    causes.append(e)
  for cause in causes:
    code = re.search(r"os_error_code='(\d+)'", str(cause))
    code = int(code[1]) if code else getattr(cause, "errno", None)
    if (
      isinstance(cause, MemoryError)
      or re.search("RESOURCE_EXHAUSTED|UNAVAILABLE|DENIED", str(cause))
      or code not in (None, *_OF_DAMAGE)
    ):
      text = getattr(cause, "strerror", None) or reason(cause)
      raise UserError(
        f"{folder}: cannot be read: {text}. It need not be damaged, and nothing"
        " was moved; rerun the command when this is solved"
      ) from cause
  return problem if isinstance(problem, str) else reason(problem)


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


def sync(*paths: Path) -> None:
  """Forces files and folders to the disk, so that they outlast a power failure.

  Those that do not exist are left out. Raises OSError if the disk fails. Does
  nothing on file systems that cannot.
  """
  for path in paths:
    try:
      number = os.open(path, os.O_RDONLY)
      try:
        os.fsync(number)
      finally:
        os.close(number)
    except OSError as e:
      cannot = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
      if e.errno not in (errno.ENOENT, errno.EACCES, *cannot):
        raise
