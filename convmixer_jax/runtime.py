"""The process: memory, compiled programs, output, signals and versions."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import math
import os
from pathlib import Path
import platform
import signal
import subprocess
import threading
import time
from typing import Any
from typing import TextIO

import jax
from jax._src import distributed as jax_distributed  # Its barriers.
import psutil

from convmixer_jax.ops import build

AHEAD = 2  # Steps that the host may enqueue before the device has done them.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def keep_pages() -> None:
  """Makes glibc's malloc keep freed memory in the process.

  On a CPU, XLA allocates its buffers at every call. By default malloc returns
  large ones to the system, which must then map and zero every page again.
  `bound_memory` limits what is kept. Does nothing without glibc, or if a
  MALLOC_... variable is set.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  tuned = any(name.startswith("MALLOC_") for name in os.environ)
  if mallopt is not None and not tuned:
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    mallopt(m_mmap_max, 0)  # Use one heap only,
    mallopt(m_arena_max, 1)
    mallopt(m_top_pad, 64 << 20)  # which grows in large steps
    mallopt(m_trim_threshold, -1)  # and never shrinks.


_memory_checked = -math.inf  # As time.monotonic() says.


def bound_memory(results: Sequence[Any]) -> None:
  """Limits the memory that a loop of steps takes. Call it after each step.

  Each enqueued step has buffers, so this waits for all but the last `AHEAD`.
  And it makes malloc return what `keep_pages` keeps if the process holds more
  memory than the machine has left, which is looked at once a second. Small
  blocks that live long split large ones, so the heap would grow to several
  times what a step needs.

  Args:
    results: of the steps so far: trees of arrays, the oldest first.
  """
  if len(results) > AHEAD:
    jax.block_until_ready(results[-1 - AHEAD])
  global _memory_checked  # It takes longer than a small model's step should.
  if time.monotonic() < _memory_checked + 1:
    return
  _memory_checked = time.monotonic()
  holds = psutil.Process().memory_info().rss
  if holds > psutil.virtual_memory().available and (
    trim := getattr(ctypes.CDLL(None), "malloc_trim", None)
  ):
    trim(0)


def keep_compiled() -> None:
  """Keeps compiled programs in ~/.cache/convmixer_jax for the next start.

  JAX_COMPILATION_CACHE_DIR overrides the folder. Nothing is kept if it cannot
  be written. XLA's programs for a CPU depend on its features and on the number
  of cores. jax's cache keys contain neither, so each pair has its own folder.
  """
  given = jax.config.jax_compilation_cache_dir
  if given is not None or (cache := build.cache_folder()) is None:
    return
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # Not Linux.
    cores = os.cpu_count()
  kind = hashlib.sha256(build.cpu().encode()).hexdigest()[:8]
  folder = cache / "xla" / f"{kind}-{cores}"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  # In bytes. The least recently used programs are removed first.
  jax.config.update("jax_compilation_cache_max_size", 2**30)


class _Output(io.FileIO):
  """Calls `failed` at the first write that fails, and drops it and the next."""

  def __init__(self, fd, failed):
    super().__init__(fd, "w", closefd=False)
    self._failed = failed

  def write(self, data):
    try:
      return super().write(data)
    except OSError as e:
      failed, self._failed = self._failed, lambda e: None
      failed(e)
      return len(data)


def open_output(
  fd: int, like: TextIO, failed: Callable[[OSError], None] = lambda e: None
) -> TextIO:
  """Opens standard output or error, whose reader may go away.

  Args:
    fd: the file descriptor.
    like: the stream that is replaced.
    failed: called with the error of the first write that fails; may raise.
      What is written from then on is dropped.
  """
  raw = _Output(fd, failed)
  return io.TextIOWrapper(
    raw if like.write_through else io.BufferedWriter(raw),
    encoding=like.encoding,
    errors="backslashreplace",  # A terminal's encoding may lack characters.
    line_buffering=like.line_buffering,
    write_through=like.write_through,
  )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
  """Yields a list that receives the number of a signal to stop.

  These are SIGINT, SIGTERM, SIGHUP unless it is ignored (nohup), and those that
  Slurm can be told to send, SIGUSR1 and SIGUSR2. A second Ctrl-C stops at once.
  With several processes jax handles SIGTERM, and stops all of them at the same
  step (`Checkpointer.preempted`); the other signals become SIGTERM.
  """
  received = []

  def note(signum, frame):
    del frame
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      received.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  signals = [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signals.append(signal.SIGHUP)
  if jax.process_count() == 1:
    signals.append(signal.SIGTERM)
  if threading.current_thread() is not threading.main_thread():
    signals = []  # Python allows no other thread to handle them.
  previous = {signum: signal.signal(signum, note) for signum in signals}
  try:
    yield received
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)


def provenance() -> dict[str, Any]:
  """What produced a result: commit, Python, versions of `PACKAGES`.

  The commit is None unless the package lies in its own repository.
  """
  folder, quiet = Path(__file__).parent, subprocess.DEVNULL
  git = lambda *args: subprocess.check_output(
    ["git", *args], cwd=folder, stderr=quiet, text=True
  ).strip()
  try:
    # The repository around an environment does not track the package there.
    own = git("ls-files", "--full-name", "errors.py") == (
      "convmixer_jax/errors.py"
    )
    commit = git("rev-parse", "HEAD") if own else None
    # Results that are being written are not a change of the code.
    status = ["status", "--porcelain", "--untracked-files=no", "--"]
    if own and git(*status, ":(top,exclude,glob)*/results/**"):
      commit += "+changes"
  except (OSError, subprocess.CalledProcessError):
    commit = None
  return {
    "commit": commit,
    "python": platform.python_version(),
    "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
  }


def wait_for_all(name: str, seconds: float = 600) -> None:
  """Waits for the other processes of a run, longer than a collective does."""
  if client := jax_distributed.global_state.client:
    client.wait_at_barrier(name, round(1000 * seconds))
