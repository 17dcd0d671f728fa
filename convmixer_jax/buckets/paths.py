"""Paths in a bucket: gs://bucket/folder and s3://bucket/folder.

They have the methods of pathlib's paths that a run needs, by fsspec. An object
is written whole: readers see the old one or the new one. There are no folders;
one is there while something is in it. Requests that fail are repeated for half
a minute, and if there is no answer for some minutes.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import functools
import logging
import os
from pathlib import PurePosixPath
import re
from typing import Any

from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

# What the extras of this package install.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}

_CLIENTS = ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests")


def is_clients(error: BaseException) -> bool:
  """Whether an error is from a library that speaks to buckets."""
  return type(error).__module__.partition(".")[0] in _CLIENTS


@functools.cache
def filesystem(scheme: str) -> Any:
  """fsspec's file system, whose listings are never old."""
  if scheme not in _PACKAGES:
    raise UserError(f"{scheme}://: must be gs:// or s3://")
  # Buckets with real folders are not supported.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  try:
    import fsspec
    import fsspec.config

    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "gs":
      import aiohttp

      # It would wait for ever.
      options["requests_timeout"] = aiohttp.ClientTimeout(
        total=None, sock_connect=20, sock_read=60
      )
      # The error that it raises is enough.
      logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    fsspec.config.conf.setdefault(scheme, {}).update(options)  # Orbax's too.
    return fsspec.filesystem(scheme)
  except ImportError as e:
    package = _PACKAGES[scheme]
    how = f"pip install {package}, or this package with its extra [gcs] or [s3]"
    raise UserError(f"{scheme}://: {first_line(e)}; {how}") from e
  except Exception as e:  # No credentials.
    raise UserError(f"{scheme}://: {first_line(e)}") from e


@contextlib.contextmanager
def _os_errors(path):
  """Turns what fsspec's file systems raise into OSError."""
  codes = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST,
           PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR,
           NotADirectoryError: errno.ENOTDIR}  # fmt: skip
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    code = codes.get(type(e))
    text = os.strerror(code) if code else " ".join(str(e).split())[:200]
    # gcsfs has no type for a denial.
    if "Forbidden" in text or getattr(e, "code", None) in (401, "401"):
      code = errno.EACCES
    text = text or type(e).__name__
    raise OSError(code or errno.EIO, text, str(path)) from e


def is_url(where: str | os.PathLike) -> bool:
  """Whether it is a path in a bucket: SCHEME://BUCKET/PATH."""
  # pathlib has made one slash of two.
  return re.match(r"\w+://|(gs|s3):/", os.fspath(where)) is not None


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath(os.PathLike):
  """A path in a bucket, as pathlib.Path; all methods raise OSError."""

  scheme: str
  key: str  # BUCKET/PATH.

  @classmethod
  def of(cls, url: str | os.PathLike) -> "BucketPath":
    """From SCHEME://BUCKET/PATH; UserError if there is no bucket in it."""
    # os.path and pathlib make one slash of two.
    scheme, _, key = os.fspath(url).partition(":")
    key = str(PurePosixPath("/", key.lstrip("/")))[1:]
    if not key:
      raise UserError(f"{os.fspath(url)}: must be {scheme}://BUCKET/PATH")
    return cls(scheme, key)

  def __str__(self) -> str:
    return f"{self.scheme}://{self.key}"

  def __fspath__(self) -> str:
    return str(self)

  def __truediv__(self, name: str | os.PathLike) -> "BucketPath":
    return self._at(PurePosixPath(self.key, name))

  def _at(self, key):
    return BucketPath(self.scheme, str(key))

  @property
  def _fs(self):
    return filesystem(self.scheme)

  name = property(lambda self: PurePosixPath(self.key).name)
  suffix = property(lambda self: PurePosixPath(self.key).suffix)
  parent = property(lambda self: self._at(PurePosixPath(self.key).parent))

  def with_name(self, name: str) -> "BucketPath":
    return self.parent / name

  def relative_to(self, other: "BucketPath") -> PurePosixPath:
    return PurePosixPath(self.key).relative_to(other.key)

  def is_relative_to(self, other: "BucketPath") -> bool:
    inside = PurePosixPath(self.key).is_relative_to(other.key)
    return self.scheme == other.scheme and inside

  def read_bytes(self) -> bytes:
    with _os_errors(self):
      return self._fs.cat_file(self.key)

  def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
    return self.read_bytes().decode(encoding, errors)

  def write_bytes(self, data: bytes) -> None:
    with _os_errors(self):
      self._fs.pipe_file(self.key, data)

  def write_text(
    self, text: str, encoding: str = "utf-8", errors: str = "strict"
  ) -> None:
    self.write_bytes(text.encode(encoding, errors))

  def create(self, data: bytes) -> None:
    """Writes an object that must be new, or else raises FileExistsError.

    Of several processes one succeeds. One that is told that it failed may have
    succeeded, if the answer to its first request was lost.
    """
    with _os_errors(self):
      self._fs.pipe_file(self.key, data, mode="create")

  def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
    """Does nothing: a bucket has no folders."""

  def unlink(self, missing_ok: bool = False) -> None:
    try:
      with _os_errors(self):
        self._fs.rm_file(self.key)
    except FileNotFoundError:
      if not missing_ok:
        raise

  def exists(self) -> bool:
    with _os_errors(self):
      return self._fs.exists(self.key)

  def is_dir(self) -> bool:
    return any(True for _ in self.iterdir())

  def is_file(self) -> bool:
    with _os_errors(self):
      return self._fs.isfile(self.key)

  def iterdir(self) -> Iterator["BucketPath"]:
    """What is in it; nothing if it does not exist."""
    with _os_errors(self):
      try:
        names = self._fs.ls(self.key, detail=False)
      except FileNotFoundError:
        names = []
    # A folder may have an empty object of its own name.
    return (self._at(k) for k in (n.strip("/") for n in names) if k != self.key)

  def objects(self) -> dict["BucketPath", tuple[int, str]]:
    """The objects below it, or itself, with sizes and versions."""
    with _os_errors(self):
      found = self._fs.find(self.key, detail=True)
    return {
      self._at(key): (info["size"], str(info.get("etag") or info.get("ETag")))
      for key, info in found.items()
      if info["type"] == "file" and not key.endswith("/")
    }

  def download(self, local: os.PathLike) -> None:
    """Copies an object into a local file."""
    with _os_errors(self):
      self._fs.get_file(self.key, os.fspath(local))

  def copy(self, target: "BucketPath") -> None:
    """Copies an object within the bucket."""
    with _os_errors(self):
      self._fs.cp_file(self.key, target.key)
