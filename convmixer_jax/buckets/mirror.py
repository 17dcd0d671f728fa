"""Files that grow, such as logs, of a run in a bucket: objects cannot grow.

They are written to a local folder, whose files are copied to the bucket while
they change.
"""

import contextlib
import os
from pathlib import Path
import shutil
import sys
import tempfile
import threading
import time

from convmixer_jax.buckets import lease
from convmixer_jax.buckets.paths import BucketPath
from convmixer_jax.errors import UserError

INTERVAL = 30.0  # Seconds between two copies.

_open: list["Mirror"] = []


class Mirror:
  """Copies files that change in the folder `local` to `remote`."""

  def __init__(self, remote: BucketPath):
    self.remote = remote
    self.local = Path(tempfile.mkdtemp(prefix="convmixer_jax_"))
    self._copied: dict[Path, tuple[int, int]] = {}
    self._failure: OSError | None = None  # Of the last copy, and its time.
    self._failed = 0.0
    self._mutex = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._copy_on, daemon=True)
    self._thread.start()
    _open.append(self)

  def _copy_on(self):
    while not self._stop.wait(INTERVAL):
      # The next `flush` of the main thread will raise them.
      with contextlib.suppress(OSError, UserError):
        self.flush()

  def check(self) -> None:
    """Raises UserError if it is known that another has taken over `remote`."""
    lease.confirm(self.remote, ask=False)

  def flush(self) -> None:
    """Copies what has changed.

    Raises UserError if another process has taken over `remote`, OSError if it
    cannot be written.
    """
    with self._mutex:
      try:
        lease.confirm(self.remote)
        for folder, _, names in os.walk(self.local):
          for name in names:
            self._copy(Path(folder, name))
        self._failure = None
      except OSError as e:
        self._failure, self._failed = e, time.monotonic()
        raise

  def _copy(self, file):
    try:
      now = file.stat()
      version = (now.st_size, now.st_mtime_ns)
      if self._copied.get(file) == version:
        return
      content = file.read_bytes()  # Of now: it may grow.
    except FileNotFoundError:  # Another has deleted it.
      return
    target = self.remote / file.relative_to(self.local).as_posix()
    target.write_bytes(content)
    self._copied[file] = version

  def close(self) -> None:
    """Copies what has changed, and removes the local folder.

    Raises as `flush`. If that has failed a moment ago, it is not tried again,
    because a bucket that does not answer takes half a minute. The local folder
    then stays, and a warning names it.
    """
    self._stop.set()
    _open.remove(self)
    try:
      if self._failure and time.monotonic() < self._failed + 10:
        raise self._failure
      self.flush()
    except OSError:
      text = f"files that could not be copied are in {self.local}"
      print(f"warning: {self.remote}: {text}", file=sys.stderr)
      raise
    shutil.rmtree(self.local, ignore_errors=True)


def flush(path: BucketPath) -> None:
  """Copies what has changed to the folders above `path`; see `Mirror.flush`."""
  lease.confirm(path)
  for mirror in [*_open]:
    if path.is_relative_to(mirror.remote):
      mirror.flush()
