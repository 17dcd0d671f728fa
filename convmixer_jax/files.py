"""The files of a run: failed writes, damage, and power failures."""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import re

from convmixer_jax.errors import reason
from convmixer_jax.errors import UserError

# What the system may say of damaged files: one is missing, or a name or an
# offset makes no sense.
_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
              errno.EINVAL)  # fmt: skip


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


def damage(folder: Path, problem: BaseException | str) -> str:
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
  if isinstance(problem, str):
    return problem
  while problem.__cause__:  # It says more than orbax, which wraps it.
    problem = problem.__cause__
  return reason(problem)
