"""The folder of a run: which config it holds, and who is writing to it."""

from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import json
import os
from pathlib import Path
import platform
import sys

import jax
import ml_collections

from convmixer_jax import config as config_lib
from convmixer_jax.errors import UserError


def changes(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  may_differ: Collection[str],
) -> list[str]:
  """Where `config` differs from the one that `workdir` holds, if it holds one.

  Args:
    config: of the run to come.
    workdir: of the run before; it may be absent.
    may_differ: names of fields that are not compared.

  Returns:
    A text for each field, such as 'seed is 0 there and 1 here'.

  Raises:
    UserError: `workdir` is an address, or holds a config.json that is none.
  """
  if "://" in str(workdir):
    raise UserError(
      f"--workdir={workdir}: must be on a file system; mount the bucket"
    )
  if not os.path.lexists(os.path.join(workdir, "config.json")):
    return []
  old = config_lib.flatten(read_config(workdir))
  new = config_lib.flatten(json.loads(config.to_json()))
  return [
    f"{name} is {old.get(name)} there and {new.get(name)} here"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and name not in may_differ
  ]


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """The config of the run in `workdir`.

  Raises:
    UserError: there is none, or it was edited into something that cannot be.
  """
  config = read_config(workdir)
  config_lib.check(config, num_devices=None)
  return config


def read_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """What config.json holds, unchecked: a run may be older than a field.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = Path(workdir).expanduser() / "config.json"
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text()))
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f"{path}: is no config: {e}") from e


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
  """Makes `workdir`, and keeps other runs out of it.

  The lock belongs to the process, not to the file: that of a process that was
  killed is free. With several processes the first holds it for all.

  Raises:
    UserError: it cannot be written, or another run is in it.
  """
  path = Path(workdir) / "lock"
  if jax.process_index() > 0:
    yield
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not cut to nothing when it is opened: it says who holds it.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}: {e.filename}") from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      holder = file.read().strip() or "another process"
      raise UserError(f"--workdir={workdir}: in use by {holder}") from e
    except OSError as e:
      if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
        raise UserError(f"{path}: {e.strerror}") from e
      text = "its file system has no locks; start no second run in it"
      print(f"warning: {workdir}: {text}", file=sys.stderr)
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    try:
      file.truncate()
      file.write(f"process {os.getpid()} on {platform.node()} since {now}\n")
      file.flush()
    except OSError as e:
      raise UserError(f"{path}: {e.strerror}") from e
    yield
