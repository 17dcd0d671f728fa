"""The files of a run, on a disk or in a bucket: failed writes and damage."""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import re
import tempfile

from convmixer_jax.buckets import cache
from convmixer_jax.buckets import mirror
from convmixer_jax.buckets import paths
from convmixer_jax.errors import reason
from convmixer_jax.errors import UserError

# What the system may say of damaged files: one is missing, or a name or an
# offset makes no sense.
_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
              errno.EINVAL)  # fmt: skip


AnyPath = Path | paths.BucketPath
is_url = paths.is_url


def path(where: str | os.PathLike) -> AnyPath:
  """A path, which may be in a bucket: gs://BUCKET/PATH.

  Raises UserError if it is empty, or no bucket of a kind that is known.
  """
  if not os.fspath(where):
    raise UserError("a path is empty; name a file or folder")
  if paths.is_url(where):
    return paths.BucketPath.of(where)
  return Path(os.path.expanduser(where))


def absolute(where: str | os.PathLike) -> AnyPath:
  """As `path`, from the root."""
  found = path(where)
  return Path(os.path.abspath(found)) if isinstance(found, Path) else found


def exists(where: str | os.PathLike) -> bool:
  """Whether there is such a file or folder; UserError if that is unknown."""
  with reading(found := path(where)):
    return found.exists()


def is_folder(where: str | os.PathLike) -> bool:
  """As `exists`, for a folder."""
  with reading(found := path(where)):
    return found.is_dir()


def local(where: str | os.PathLike) -> Path:
  """The same path, or that of a local copy of what is in a bucket.

  Raises UserError if it cannot be copied.
  """
  found = path(where)
  return found if isinstance(found, Path) else cache.local_copy(found)


@contextlib.contextmanager
def output(folder: AnyPath, *, create: bool = True) -> Iterator[Path]:
  """A folder to write to; a local one, whose files then go into the bucket.

  It is created, if `create`. Raises OSError if it cannot be written.
  """
  if isinstance(folder, Path):
    if create:
      folder.mkdir(parents=True, exist_ok=True)
    yield folder
    return
  with tempfile.TemporaryDirectory() as name:
    yield Path(name)
    for file in sorted(Path(name).rglob("*")):
      if file.is_file():
        target = folder / file.relative_to(name).as_posix()
        target.write_bytes(file.read_bytes())


@contextlib.contextmanager
def writing(folder: AnyPath, *errors: type[Exception]) -> Iterator[None]:
  """Turns OSError and `errors` into a UserError that names `folder`.

  For the files of a run. Each is replaced at once, so a failed write leaves its
  earlier version.
  """
  try:
    yield
  except Exception as e:
    known = isinstance(e, (OSError, *errors)) or paths.is_clients(e)
    if not known or isinstance(e, UserError):
      raise
    text = getattr(e, "strerror", None) or reason(e)
    raise UserError(
      f"{folder}: cannot be written: {text}. What is saved there is intact;"
      " rerun the command to resume from it"
    ) from e


def denied(error: BaseException | None) -> bool:
  """Whether an error, or its cause, is that a path may not be used."""
  while error and not isinstance(error, OSError):
    error = error.__cause__
  codes = (errno.EACCES, errno.ENOENT, errno.EPERM)
  return error is not None and error.errno in codes


@contextlib.contextmanager
def reading(folder: AnyPath) -> Iterator[None]:
  """Turns what a disk or a bucket raises into a UserError."""
  try:
    yield
  except Exception as e:
    known = isinstance(e, OSError) or paths.is_clients(e)
    if not known or isinstance(e, UserError):
      raise
    text = getattr(e, "strerror", None) or reason(e)
    raise UserError(f"{folder}: cannot be read: {text}") from e


def sync(*places: AnyPath) -> None:
  """Forces files and folders to the disk, so that they outlast a power failure.

  Those that do not exist are left out. Raises OSError if the disk fails. Does
  nothing on file systems that cannot. In a bucket, files that grow are copied
  there; see `mirror.flush`.
  """
  for place in places:
    if not isinstance(place, Path):
      mirror.flush(place)
      continue
    try:
      number = os.open(place, os.O_RDONLY)
      try:
        os.fsync(number)
      finally:
        os.close(number)
    except OSError as e:
      cannot = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
      if e.errno not in (errno.ENOENT, errno.EACCES, *cannot):
        raise


def write_whole(path: AnyPath, text: str) -> None:
  """Replaces the file at once: a crash leaves the old text or the new one.

  So does a power failure. Raises OSError if it cannot be written.
  """
  # Names of files and classes may hold bytes that are not UTF-8.
  if not isinstance(path, Path):
    mirror.flush(path)  # Another process may have taken over.
    path.write_text(text, "utf-8", "surrogateescape")
    return
  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(text, "utf-8", "surrogateescape")
  sync(temporary)
  temporary.replace(path)
  sync(path.parent)


def move_folder(source: AnyPath, target: AnyPath) -> None:
  """Renames a folder; in a bucket, copies it and then deletes it."""
  if isinstance(source, Path):
    source.rename(target)
    return
  found = sorted(source.objects())
  for file in found:
    file.copy(target / file.relative_to(source))
  for file in found:
    file.unlink()


def damage(folder: AnyPath, problem: BaseException | str) -> str:
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
    if not isinstance(folder, Path):
      for file in folder.objects():
        file.read_bytes()
    else:
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
      or paths.is_clients(cause)
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
