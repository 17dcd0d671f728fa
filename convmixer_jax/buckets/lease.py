"""Locks in a bucket, where no system releases the lock of a dead process.

A lease is an object, NAME.1, which its owner rewrites every BEAT seconds. If it
has not changed for SILENT seconds by the clock of another process, that one may
take it over: it creates NAME.2, which succeeds for one process only. The old
owner finds it before it writes the next time, and ends. A process that ends
says so in the object; one that was killed is noticed at once on its own host.
"""

from collections.abc import Iterator
import contextlib
import datetime
import json
import os
from pathlib import Path
import platform
import secrets
import threading
import time
from typing import Any

import psutil

from convmixer_jax.buckets.paths import BucketPath
from convmixer_jax.errors import InUse
from convmixer_jax.errors import UserError

BEAT = 15.0  # Seconds between two signs of life.
SILENT = 90.0  # Seconds without one, after which an owner is taken for dead.

# Leases of this process, which keep others from writing below their folders.
_held: list["Lease"] = []
# Object -> its content, since when this process has seen that, and when last.
_seen: dict[BucketPath, tuple[str, float, float]] = {}


def _now():
  """Seconds; also while the machine is suspended, where the system says so."""
  clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
  return time.clock_gettime(clock)


class Lease:
  """A lease that this process holds; see `lock`."""

  def __init__(self, path: BucketPath, number: int, content: dict[str, Any]):
    self.folder = path.parent
    self._path, self._number, self._content = path, number, content
    self._beaten = _now()
    self._mutex = threading.Lock()
    self._lost = self._ending = False
    self._failure: OSError | None = None  # Of the last sign of life.
    self._failed = 0.0
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._beat_on, daemon=True)
    self._thread.start()

  def _beat_on(self):
    while not self._stop.wait(BEAT):
      with contextlib.suppress(OSError):  # The next one may succeed.
        self._beat()

  def _beat(self):
    with self._mutex:
      if self._ending:
        return
      if self._failure and _now() < self._failed + 10:
        raise self._failure  # Another thread has just tried for half a minute.
      now = _now()
      try:
        self._write(beat=self._content["beat"] + 1)
        self._beaten, self._failure = now, None
      except OSError as e:
        self._failure, self._failed = e, _now()
        raise

  def _write(self, **more):
    if not self._lost:
      self._lost = max(_numbers(self._path), default=0) > self._number
    if not self._lost:
      self._content |= more
      text = json.dumps(self._content)
      _numbered(self._path, self._number).write_text(text)

  def confirm(self) -> None:
    """Raises UserError if another process has taken the lease over.

    Raises OSError if that cannot be found out.
    """
    if not self._lost and _now() - self._beaten > SILENT / 2:
      self._beat()
    self.check()

  def check(self) -> None:
    """As `confirm`, of what is known; asks nobody."""
    if self._lost:
      raise UserError(
        f"{self.folder}: another process has taken over, because this one gave"
        f" no sign of life for {SILENT:.0f} s; nothing more is written here"
      )

  def release(self) -> None:
    """Leaves the folder to others."""
    self._stop.set()
    with self._mutex, contextlib.suppress(OSError):  # It will be silent.
      self._ending = True
      if _now() < self._beaten + 3 * BEAT:  # The bucket answers.
        self._write(released=True)


def confirm(path: BucketPath, *, ask: bool = True) -> None:
  """Raises UserError if this process has lost a lease of a folder above.

  If it has been silent itself, the bucket is asked, or else what is known
  counts. Raises OSError if the bucket does not answer.
  """
  for lease in [*_held]:
    if path.is_relative_to(lease.folder):
      lease.confirm() if ask else lease.check()


@contextlib.contextmanager
def lock(path: BucketPath, *, wait: bool) -> Iterator[None]:
  """Takes the lease of this name, and keeps it.

  Args:
    path: of the objects, without their number.
    wait: for the owner's next sign of life, and if there is none, take over.

  Raises:
    InUse: another process holds it.
    UserError: the bucket cannot be read or written.
  """
  try:
    lease = _take(path, wait)
  except OSError as e:
    text = f"{e.strerror}: {e.filename}"
    raise UserError(f"--workdir={path.parent}: {text}") from e
  _held.append(lease)
  try:
    yield
  finally:
    _held.remove(lease)
    lease.release()


def _take(path, wait):
  """The lease of this process; raises OSError or InUse."""
  first = None
  while True:
    number, content = _newest(path)
    if owner := _alive(path, number, content):
      if not wait or first not in (None, content):
        raise InUse(path.parent, owner)
      if first is None:
        text = f"waiting up to {SILENT:.0f} s for a sign of life of {owner}"
        print(f"{path.parent}: {text}", flush=True)
      first = content
      time.sleep(BEAT / 10)
      continue
    content, number = _ours(), number + 1
    try:
      _numbered(path, number).create(json.dumps(content).encode())
    except FileExistsError:  # Another was faster, or the answer was lost.
      if _read(path, number).get("owner") != content["owner"]:
        continue
    numbers = _numbers(path)
    if max(numbers, default=0) <= number:
      break
    # Others came and went while the request was under way.
    _numbered(path, number).unlink(missing_ok=True)
  for old in numbers:
    if old < number:
      _numbered(path, old).unlink(missing_ok=True)
  return Lease(path, number, content)


def holder(path: BucketPath) -> str | None:
  """The process that holds a lease, in words, or None.

  One that has just died counts as its holder until this process has watched it
  for SILENT seconds. Raises UserError if the bucket cannot be read.
  """
  try:
    number, content = _newest(path)
  except OSError as e:
    raise UserError(f"{path.parent}: {e.strerror}") from e
  return _alive(path, number, content)


def _numbered(path, number):
  return path.with_name(f"{path.name}.{number}")


def _read(path, number):
  """The content of a lease; {} if it is no lease, or gone."""
  try:
    content = json.loads(_numbered(path, number).read_bytes())
    return content if isinstance(content, dict) else {}
  except (FileNotFoundError, ValueError):
    return {}


def _numbers(path):
  """Those of the leases of this name."""
  ends = (
    other.name.removeprefix(f"{path.name}.") for other in path.parent.iterdir()
  )
  return [int(end) for end in ends if end.isdecimal()]


def _newest(path):
  """The number of the newest lease, 0 if there is none, and its content."""
  number = max(_numbers(path), default=0)
  return number, _read(path, number) if number else {}


def _alive(path, number, content):
  """The owner, in words, or None if it has ended or is silent."""
  if not content or content.get("released"):
    return None
  pid, host = content.get("pid"), _host()
  here = host is not None and content.get("host") == host
  if here and isinstance(pid, int) and not psutil.pid_exists(pid):
    return None
  key, text, now = _numbered(path, number), json.dumps(content), _now()
  before, since, last = _seen.get(key, ("", now, now))
  # Who has not looked for long may have been cut off himself.
  if before != text or now - last > SILENT / 2:
    since = now
  _seen[key] = (text, since, now)
  if now - since > SILENT:
    return None
  return str(content.get("holder") or "another process")


def _host():
  """Names this host since its start, and what numbers its processes.

  None if that is unknown.
  """
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return None


def _ours():
  now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
  return {
    "holder": f"process {os.getpid()} on {platform.node()} since {now}",
    "owner": secrets.token_hex(8),
    "host": _host(),
    "pid": os.getpid(),
    "beat": 0,
  }
