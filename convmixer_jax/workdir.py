"""The folder of a run: its config, its lock and its records."""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import datetime
import errno
import fcntl
import json
import os
from pathlib import Path
import platform
import sys
import time
from typing import Any

import jax
import ml_collections

from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import runtime
from convmixer_jax.buckets import lease
from convmixer_jax.errors import InUse
from convmixer_jax.errors import UserError
from convmixer_jax.files import writing


def config_changes(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  may_differ: Collection[str],
) -> dict[str, str]:
  """How `config` differs from that of the run in `workdir`, if there is one.

  Returns a text for each field that differs and is not in `may_differ`: seed ->
  'seed is 0 there and 1 here'. Raises UserError if no checkpoint can be saved
  in a folder of this name, or its config.json is not a valid config.
  """
  try:
    os.fspath(workdir).encode()
  except UnicodeEncodeError as e:  # Orbax cannot write there.
    text = "must be UTF-8, in a locale of UTF-8"
    raise UserError(f"--workdir={workdir}: {text}") from e
  check_place(workdir)
  path = files.path(workdir) / "config.json"
  if not (os.path.islink(path) or files.exists(path)):
    return {}
  old = config_lib.flatten(read_config(workdir))
  new = config_lib.flatten(json.loads(config.to_json()))
  return {
    name: f"{name} is {old.get(name)} there and {new.get(name)} here"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and name not in may_differ
  }


def check_place(workdir: str | os.PathLike, flag: str = "workdir") -> None:
  """Raises UserError if orbax does not write to such a place."""
  path = files.path(workdir)
  if not isinstance(path, Path) and path.scheme != "gs":
    raise UserError(
      f"--{flag}={path}: orbax keeps checkpoints on a disk or in gs:// only"
    )


def load_config(where: str | os.PathLike) -> ml_collections.ConfigDict:
  """The config of a run; UserError if there is none, or a value is invalid.

  `where` is its workdir or its config.json. A field that was added since the
  run began has its default.
  """
  found = read_config(where)
  for name, value in config_lib.flatten(config_lib.defaults()).items():
    section, _, leaf = name.rpartition(".")
    holder = found.get(section) if section else found
    if isinstance(holder, ml_collections.ConfigDict) and leaf not in holder:
      holder[leaf] = value
  config_lib.check(found, num_devices=None)
  return config_lib.complete(config_lib.flatten(found))


def read_config(where: str | os.PathLike) -> ml_collections.ConfigDict:
  """The content of config.json, unchecked: a new field may be missing in it.

  Raises UserError if there is none, or it is damaged.
  """
  path = files.path(where)
  path = path if path.suffix == ".json" else path / "config.json"
  try:
    return ml_collections.ConfigDict(json.loads(path.read_text("utf-8")))
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f"{path}: not a valid config: {e}") from e


_SAVED = ("finished", "interrupted")  # A status whose last step was saved.


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
  """Creates `workdir` and locks it against other runs, as `lock` does.

  In a run of several processes the first one holds the lock for all.
  """
  path = files.path(workdir) / "lock"
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(lock(path, wait=True))
    if not isinstance(path, Path):  # Taking over a lease takes a while.
      runtime.wait_for_all("convmixer_jax_lock")
    yield


def lock(
  path: files.AnyPath, *, wait: bool = False
) -> contextlib.AbstractContextManager[None]:
  """Creates a file in a workdir, which is created too, and locks it.

  The lock belongs to the process and ends with it, even after SIGKILL; in a
  bucket, after a while, for which this function may `wait`, see `lease.lock`.
  Raises UserError if the file cannot be written, and InUse if another process
  holds the lock. Does not start jax's devices.
  """
  if isinstance(path, Path):
    return _locked_file(path)
  return lease.lock(path, wait=wait)


@contextlib.contextmanager
def _locked_file(path):
  workdir = path.parent
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Opened without truncating it: it says which process holds the lock.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}: {e.filename}") from e
  with file:
    try:
      _flock(file)
    except BlockingIOError as e:
      raise InUse(workdir, file.read().strip() or "another process") from e
    except OSError as e:
      none = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
      if e.errno not in none:
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


def _flock(file):
  """Raises BlockingIOError if another process holds it, OSError otherwise."""
  for wait in (0.05, 0.1, 0.2, None):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if wait is None:
        raise
      time.sleep(wait)  # `holder` may be looking.
    else:
      return


def holder(workdir: str | os.PathLike, name: str = "lock") -> str | None:
  """The process that holds a lock of `workdir`, in words, or None.

  Raises UserError if a bucket cannot be read.
  """
  path = files.path(workdir) / name
  if not isinstance(path, Path):
    return lease.holder(path)
  with contextlib.suppress(OSError), path.open(errors="replace") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return file.read().strip() or "another process"
  return None


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The valid lines of metrics.jsonl; UserError if it cannot be read."""
  records = []
  path = files.path(workdir) / "metrics.jsonl"
  for line in _read_text(path).splitlines():
    with contextlib.suppress(ValueError, RecursionError):
      match json.loads(line):
        case {"step": int(), "kind": str()} as record:
          records.append(record)
  return records


# Of each evaluation; of up to five classes there is no top5.
SCORES = ("top1", "top5", "loss", "count")


def read_eval(workdir: str | os.PathLike, step: int) -> dict[str, Any] | None:
  """The last valid record of the evaluation at `step`, or None."""
  for record in reversed(read_metrics(workdir)):
    found = record["kind"] == "eval" and record["step"] == step
    values = {"top5": 0.0} | record
    if found and all(isinstance(values.get(n), (int, float)) for n in SCORES):
      return record
  return None


def _read_text(path):
  """A file's text; '' if there is no such file."""
  try:
    return path.read_text("utf-8", "replace")
  except (FileNotFoundError, NotADirectoryError):
    return ""
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e


def read_starts(workdir: str | os.PathLike) -> dict[str, Any]:
  """The content of run.json: {'starts': [one dict per start of the run]}.

  Raises UserError if it cannot be read, or is damaged.
  """
  path = files.path(workdir) / "run.json"
  if not (text := _read_text(path)) and not files.exists(path):
    return {"starts": []}
  try:
    run = json.loads(text)
    run["starts"] = [*run["starts"]]
  except (ValueError, TypeError, LookupError, RecursionError) as e:
    text = f"{path}: damaged ({e}); remove it and rerun the command"
    raise UserError(text) from e
  return run


def lacks_checkpoints(workdir: str | os.PathLike) -> bool:
  """Whether a run that has no checkpoint must have had some.

  It has records although it ended, was resumed, or its folder for checkpoints
  is gone, of which a bucket knows nothing. One that was killed before the first
  checkpoint may begin again.
  """
  folder = files.path(workdir) / "checkpoints"
  return bool(read_metrics(workdir)) and (
    (isinstance(folder, Path) and not folder.exists())
    or any(
      start.get("first_step") or start.get("status") in _SAVED
      for start in read_starts(workdir)["starts"]
      if isinstance(start, dict)
    )
  )


def mark_finished(
  workdir: str | os.PathLike, metrics: Mapping[str, Any]
) -> None:
  """Completes run.json after a kill between the last checkpoint and the end.

  `metrics` is the record of the last evaluation. Raises UserError if run.json
  is damaged or cannot be written.
  """
  run, step = read_starts(workdir), metrics["step"]
  end = {
    "status": "finished",
    "last_step": step,
    "ended": metrics.get("time"),
  }
  match run["starts"]:
    case [*_, {"status": "finished", "last_step": last}] if last == step:
      return
    case [*_, dict() as start]:
      start.update(end)
    case starts:
      starts.append(end)
  with writing(files.path(workdir)):
    write_run(workdir, run)


def write_run(workdir: str | os.PathLike, run: Mapping[str, Any]) -> None:
  """Writes run.json; see `read_starts`."""
  text = json.dumps(run, indent=2) + "\n"
  files.write_whole(files.path(workdir) / "run.json", text)
