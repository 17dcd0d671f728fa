"""Local copies of data and weights that lie in a bucket."""

from concurrent import futures
import contextlib
import fcntl
import json
import os
from pathlib import Path
import shutil

import tqdm

from convmixer_jax.buckets.paths import BucketPath
from convmixer_jax.errors import UserError


def local_copy(source: BucketPath) -> Path:
  """Where an object, or all below a folder, lies on this machine.

  It is copied to ~/.cache/convmixer_jax (or $XDG_CACHE_HOME/convmixer_jax) at
  the first time, and again if it has changed in the bucket. Of several
  processes one copies, and the others wait.

  Raises:
    UserError: it does not exist, cannot be read, or does not fit on the disk.
  """
  top = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  target = top / "convmixer_jax" / source.scheme / source.key
  try:
    objects = source.objects()
    if not objects:
      raise UserError(f"{source}: no such file or directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = lambda suffix: target.with_name(f".{target.name}.{suffix}")
    index, part = beside("json"), beside("part")
    listing = {
      str(path.relative_to(source)): [*version]
      for path, version in objects.items()
    }
    with beside("lock").open("a", encoding="utf-8") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      with contextlib.suppress(OSError, ValueError):
        if json.loads(index.read_text("utf-8")) == listing and target.exists():
          return target
      for old in (index, target, part):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
      _copy(source, objects, part)
      part.rename(target)
      index.write_text(json.dumps(listing), "utf-8")
  except OSError as e:
    text = f"cannot be copied to {target.parent}: {e.strerror}"
    raise UserError(f"{source}: {text}") from e
  return target


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
  found = local_copy(root / path)
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
