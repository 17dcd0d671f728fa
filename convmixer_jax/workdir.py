"""The folder of a run: its config, its lock and its records."""

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
from typing import Any

import jax
import ml_collections

from convmixer_jax import config as config_lib
from convmixer_jax.errors import UserError


def config_changes(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  may_differ: Collection[str],
) -> list[str]:
  """The differences between `config` and the config stored in `workdir`.

  Args:
    config: the new run's.
    workdir: the earlier run's; it need not exist.
    may_differ: names of fields that are not compared.

  Returns:
    A text for each field that differs, such as 'seed is 0 there and 1 here'.

  Raises:
    UserError: `workdir` is a URL, or its config.json is not a valid config.
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
    UserError: there is none, or a value in it is not valid.
  """
  config = read_config(workdir)
  config_lib.check(config, num_devices=None)
  return config


def read_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """The content of config.json, unchecked: a new field may be missing in it.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = Path(workdir).expanduser() / "config.json"
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text()))
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f"{path}: not a valid config: {e}") from e


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
  """Creates `workdir` and locks it against other runs.

  The lock belongs to the process and ends with it, even after SIGKILL. In a run
  of several processes the first one holds it for all.

  Raises:
    UserError: `workdir` cannot be written, or another run holds the lock.
  """
  path = Path(workdir) / "lock"
  if jax.process_index() > 0:
    yield
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened without truncating it: it says which process holds the lock.
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
      text = "its file system has no locks; do not start a second run in it"
      print(f"warning: {workdir}: {text}", file=sys.stderr)
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    try:
      file.truncate()
      file.write(f"process {os.getpid()} on {platform.node()} since {now}\n")
      file.flush()
    except OSError as e:
      raise UserError(f"{path}: {e.strerror}") from e
    yield


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; damaged lines are left out.

  Raises:
    UserError: it cannot be read.
  """
  path = Path(workdir) / "metrics.jsonl"
  records = []
  if path.exists():
    for line in _read_text(path).splitlines():
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("kind"), str)
      ):
        records.append(record)
  return records


def read_eval(workdir: str | os.PathLike, step: int) -> dict[str, Any] | None:
  """The last valid record of the evaluation at `step`, or None."""
  found = [
    record
    for record in read_metrics(workdir)
    if record["kind"] == "eval"
    and record["step"] == step
    and all(
      isinstance(record.get(name), (int, float))
      for name in ("top1", "top5", "loss", "count")
    )
  ]
  return found[-1] if found else None


def _read_text(path):
  try:
    return path.read_text(errors="replace")
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e


def read_starts(workdir: str | os.PathLike) -> dict[str, Any]:
  """The content of run.json: {'starts': [one dict per start of the run]}.

  Raises:
    UserError: it cannot be read, or is damaged.
  """
  path = Path(workdir) / "run.json"
  if not path.exists():
    return {"starts": []}
  try:
    run = json.loads(_read_text(path))
    run["starts"] = [*run["starts"]]
  except (ValueError, TypeError, LookupError, RecursionError) as e:
    raise UserError(
      f"{path}: damaged ({e}); remove it and rerun the command"
    ) from e
  return run


def write_whole(path: Path, text: str) -> None:
  """Replaces the file at once: a crash leaves the old text or the new one."""
  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)
