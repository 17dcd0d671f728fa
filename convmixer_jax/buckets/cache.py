"""Local copies of data and weights that lie in a bucket."""

from concurrent import futures
import contextlib
import fcntl
import hashlib
import os
from pathlib import Path
import shutil

import tqdm

from convmixer_jax.buckets.paths import BucketPath
from convmixer_jax.errors import UserError

# Locks of the copies that this process uses, until it ends.
_used = []


def local_copy(source: BucketPath, base: BucketPath | None = None) -> Path:
  """Where an object, or all below a folder, lies on this machine.

  It is copied to ~/.cache/convmixer_jax (or $XDG_CACHE_HOME/convmixer_jax) at
  the first time, and again if it has changed in the bucket. A copy that has
  changed is deleted when no process uses it. Of several processes one copies,
  and the others wait.

  Args:
    source: the object or folder.
    base: a folder above it, whose own path the copy then has too. Default: the
      one above it.

  Raises:
    UserError: it does not exist, cannot be read, or does not fit on the disk.
  """
  top = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  place = top / "convmixer_jax" / _hash(str(source))
  try:
    objects = source.objects()
    if not objects:
      raise UserError(f"{source}: no such file or directory")
    version = _hash(repr(sorted(objects.items())))
    target = place / version
    place.mkdir(parents=True, exist_ok=True)
    name = source.relative_to(base or source.parent)
    with _locked(place / "copying", fcntl.LOCK_EX):
      _used.append(_locked(place / f"{version}.lock", fcntl.LOCK_SH))
      if not target.exists():
        for other in place.glob("*.lock"):
          _delete(other)
        part = place / f"{version}.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / name).parent.mkdir(parents=True)
        _copy(source, objects, part / name)
        part.rename(target)
  except OSError as e:
    text = f"cannot be copied to {place}: {e.strerror}"
    raise UserError(f"{source}: {text}") from e
  return target / name


def _hash(text):
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _locked(path, how):
  """An open file with a lock, if its file system has locks."""
  file = path.open("a", encoding="utf-8")
  try:
    fcntl.flock(file, how)
  except BlockingIOError:
    file.close()
    raise
  except OSError:
    pass
  return file


def _delete(lock):
  """Deletes the copy that belongs to a lock, unless a process uses it."""
  with (
    contextlib.suppress(BlockingIOError),
    _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB),
  ):
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)


def local_data(name: str, directory: str) -> str:
  """The data directory of a local copy of a data set; see `local_copy`.

  Args:
    name: 'folder', or a TFDS data set.
    directory: root of the folder, or TFDS's data directory.
  """
  root = BucketPath.of(directory)
  if name == "folder":
    return str(local_copy(root))
  # All versions: a bucket for training has one, as a rule.
  path = name.partition(":")[0]
  try:
    if not (root / path).is_dir():
      raise UserError(
        f"data.dir={directory}: has no folder {path}; prepare {name} on a"
        " machine with TensorFlow, and copy this folder from there"
      )
  except OSError as e:
    raise UserError(f"data.dir={directory}: {e.strerror}") from e
  found = local_copy(root / path, root)
  return str(found.parents[path.count("/")])


def _copy(source, objects, target):
  total = sum(size for size, _ in objects.values())
  free = shutil.disk_usage(target.parent).free
  if total > free:
    raise UserError(
      f"{source}: its {total / 2**30:.1f} GiB do not fit into {target.parent},"
      f" where {free / 2**30:.1f} GiB are free; set XDG_CACHE_HOME to a larger"
      " disk, or mount the bucket"
    )

  def copy(path):
    local = target / path.relative_to(source)
    local.parent.mkdir(parents=True, exist_ok=True)
    path.download(local)
    return objects[path][0]

  with (
    tqdm.tqdm(
      desc=f"copying {source}",
      total=total,
      unit="B",
      unit_scale=True,
      disable=None,
    ) as progress,
    futures.ThreadPoolExecutor(16) as pool,
  ):
    for size in pool.map(copy, objects):
      progress.update(size)
