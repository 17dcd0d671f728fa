"""Loads batches ahead of the consumer, in worker processes or in threads.

grain does the loading. Its iterator can wait forever: for a process that was
killed or is stuck, or for a dead file system. This module watches the workers
and turns such a wait into an error.
"""

from collections.abc import Callable
from collections.abc import Generator
import contextlib
import functools
import multiprocessing
from multiprocessing import spawn
from pathlib import Path
import queue
import re
import signal
import threading
import time

from absl import flags
import grain
import numpy as np

from convmixer_jax.errors import UserError

Batch = dict[str, np.ndarray]

PATIENCE = 300.0  # Seconds after which a missing batch is an error.
_POLL = 0.2  # Seconds between two looks at `stopped` and the workers.
_GRACE = 2.0  # Seconds that workers have to end by themselves.
_SHARED = (
  "enlarge it (Docker: --shm-size=8g), lower data.num_workers or batch_size, or"
  " use threads: data.num_workers=0"
)


def load_batches(
  load: Callable[[int], Batch],
  num_samples: int,
  batch_size: int,
  num_workers: int,
  stopped: Callable[[], object],
) -> Generator[Batch]:
  """Calls `load` on 0, ..., num_samples - 1 and stacks the results.

  Args:
    load: position -> one sample, name -> array. cloudpickle copies it to the
      workers.
    num_samples: a multiple of `batch_size`.
    batch_size: R, samples per batch.
    num_workers: number of processes; 0 loads in threads of this process.
    stopped: ends the batches when it returns true, even during a wait.

  Yields:
    name -> array [R, ...], in the order of the positions.

  Raises:
    UserError: a worker died, or no batch came for `PATIENCE` seconds.
    Exception: what `load` raised.
  """
  samples = grain.MapDataset.range(num_samples).map(load)
  if not num_workers:
    options = grain.ReadOptions(
      num_threads=16, prefetch_buffer_size=max(16, 2 * batch_size)
    )
    batches = samples.to_iter_dataset(options).batch(batch_size)
  else:
    # grain's workers read absl's flags; a notebook has not parsed them.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    _start_without_main()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = samples.batch(batch_size).to_iter_dataset(options)
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers), _ignore_interrupt
    )
  return _supervised(iter(batches), stopped)


@functools.cache
def _start_without_main():
  """Lets grain's workers start without the main program.

  They need nothing of it. Importing it takes time, and would run a script that
  has no `if __name__ == "__main__"` again in each worker.
  """
  prepare = spawn.get_preparation_data

  def without_main(name):
    keep = lambda key: not (name.startswith("grain-") and "main" in key)
    return {k: v for k, v in prepare(name).items() if keep(k)}

  spawn.get_preparation_data = without_main


def _supervised(iterator, stopped):
  """Yields grain's batches: one thread waits, this one checks the workers."""
  before = set(multiprocessing.active_children())
  workers = lambda: set(multiprocessing.active_children()) - before
  seen = set()
  results = queue.SimpleQueue()

  def fetch():
    try:
      batch = next(iterator, None)
      results.put((batch and dict(batch), None))
      # When grain has caught an exception, it keeps its last batch: until the
      # program ends nobody would free the shared memory that the arrays are in.
      if batch:
        batch.clear()
    except Exception as e:
      results.put((None, e))

  def close():
    with contextlib.suppress(Exception):
      iterator.close()

  def failure():
    seen.update(workers())
    for worker in seen:
      if code := worker.exitcode:
        text = f"Data worker {worker.pid} exited with code {code}"
        if code == -signal.SIGBUS:
          text += f": its shared memory, /dev/shm, is full; {_SHARED}"
        elif code == -signal.SIGKILL:
          text += " (out of memory?); lower data.num_workers"
        return UserError(text)
    return None

  try:
    while True:
      _start_thread(fetch)
      deadline = time.monotonic() + PATIENCE
      batch = error = None
      while not stopped():
        with contextlib.suppress(queue.Empty):
          batch, error = results.get(timeout=_POLL)
          break
        # A signal to the whole process group kills a worker and stops this
        # process too. Leave time to see `stopped`: then it is not an error.
        if failure():
          deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
          states = ", ".join(map(_state, workers())) or "loading in threads"
          raise failure() or UserError(
            f"No batch was loaded in {PATIENCE:.0f} s ({states}); is the file"
            " system of data.dir slow or gone?"
          )
      if error and not stopped():
        if isinstance(error, OSError):  # Not of a file: `load` names those.
          text = f"data.num_workers: /dev/shm: {error.strerror}; {_SHARED}"
          raise UserError(text) from error
        raise failure() or error
      if batch is None:
        return
      yield batch
  finally:
    # grain's close() waits for a stuck worker. It never returns if a worker was
    # killed while it held a lock, which a dead process does not release.
    closing = _start_thread(close)
    closing.join(_GRACE)
    for worker in workers():
      worker.kill()
    closing.join(_GRACE)


def _start_thread(call):
  """Starts a daemon thread. If it never ends, the program still can."""
  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  return thread


def _state(process):
  """'worker 4242, D (disk sleep)'; no state on systems without /proc."""
  name = f"worker {process.pid}"
  with contextlib.suppress(OSError):
    status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
    if state := re.search(r"^State:\s*(.*)", status, re.M):
      return f"{name}, {state[1]}"
  return name


def _ignore_interrupt(*_):
  """Leaves Ctrl-C, which reaches every process, to the main process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
