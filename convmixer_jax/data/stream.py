"""Batches on the host, each a pure function of (seed, step).

Sample n = step * batch_size + row of a training run is entry n mod N of
permutation n // N of the N images. So batches cross epochs, no image is lost at
an epoch's end, a resumed run needs no iterator state, and any number of hosts
sees the same global batch, each reading its own rows of it.
"""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import multiprocessing
from pathlib import Path
import queue
import re
import signal
import sys
import threading
import time

from absl import flags
import grain
import numpy as np

from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

Batch = dict[str, np.ndarray]

PATIENCE = 300.0  # Seconds that a batch of encoded images may take.
_POLL = 0.2  # Seconds after which a signal is seen while one is waited for.
_GRACE = 2.0  # Seconds that those who decode have to end by themselves.


@functools.lru_cache(maxsize=2)  # The two epochs that a batch can touch.
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


def sample_indices(seed: int, samples: np.ndarray, size: int) -> np.ndarray:
  """Which images the samples of a run are.

  Args:
    seed: of the order.
    samples: [R] int, counted from the run's start: step * batch_size + row.
    size: N, images in the data set.

  Returns:
    [R] int in [0, N).
  """
  epochs, positions = np.divmod(samples, size)
  indices = np.empty_like(positions)
  for epoch in np.unique(epochs):
    chosen = epochs == epoch
    indices[chosen] = _permutation(seed, int(epoch), size)[positions[chosen]]
  return indices


def image_ids(
  source: sources.Source, seed: int, step: int, batch_size: int
) -> list[int | str]:
  """Which images the global batch of a step is of, row by row.

  Args:
    source: of the run.
    seed: of the order.
    step: updates done before.
    batch_size: of the global batch.

  Returns:
    Their indices in memory, or the names of their files or records.
  """
  samples = step * batch_size + np.arange(batch_size)
  indices = sample_indices(seed, samples, len(source)).tolist()
  if isinstance(source, sources.InMemory):
    return indices
  return [source.read.name(index) for index in indices]


def train_batches(
  source: sources.Source,
  *,
  seed: int,
  batch_size: int,
  rows: np.ndarray,
  start: int,
  stop: int,
  image_size: int,
  num_workers: int = 0,
  max_unreadable: int = 0,
  stopped: Callable[[], object] = lambda: False,
  **crop,
) -> Generator[Batch]:
  """This process's part of the batches of steps start, ..., stop - 1.

  Args:
    source: images; those not in memory are cropped at random as they are
      decoded.
    seed: of order and crops.
    batch_size: of the global batch.
    rows: the rows of the global batch to produce.
    start: first step.
    stop: one after the last step.
    image_size: side of the images in pixels.
    num_workers: processes that decode; 0 decodes in threads of this one.
    max_unreadable: how many files may be broken. The next in the source takes
      the place of each, and a warning names it.
    stopped: ends the batches, also while one is waited for.
    **crop: scale, ratio and interpolation; see `decode.train_image`.

  Yields:
    image, uint8 [R, S, S, 3]; label, int32 [R].

  Raises:
    UserError: naming a broken file, or processes that decode no more.
  """
  if isinstance(source, sources.InMemory):
    for step in range(start, stop):
      if stopped():
        return
      indices = sample_indices(seed, step * batch_size + rows, len(source))
      yield {"image": source.images[indices], "label": source.labels[indices]}
    return
  load = _LoadTrain(
    source,
    seed,
    batch_size,
    rows,
    start,
    image_size,
    tuple(crop.items()),
    max_unreadable,
  )
  yield from _decoded(load, stop - start, len(rows), num_workers, stopped)


def eval_batches(
  source: sources.Source,
  *,
  batch_size: int,
  rows: np.ndarray,
  image_size: int,
  crop_pct: float,
  num_workers: int = 0,
  max_unreadable: int = 0,
  stopped: Callable[[], object] = lambda: False,
) -> Generator[Batch]:
  """This process's part of every image once, in order; padded at the end.

  Args:
    source: images; those not in memory are resized and cropped at the centre.
    batch_size: of the global batch.
    rows: the rows of the global batch to produce.
    image_size: side of the images in pixels.
    crop_pct: see `decode.eval_image`.
    num_workers: processes that decode; 0 decodes in threads of this one.
    max_unreadable: how many files may be broken; a warning names each.
    stopped: ends the batches, also while one is waited for.

  Yields:
    image, uint8 [R, S, S, 3]; label, int32 [R]; mask, bool [R], False for
    padding and broken files.

  Raises:
    UserError: naming a broken file, or processes that decode no more.
  """
  steps = -(-len(source) // batch_size)
  if isinstance(source, sources.InMemory):
    for step in range(steps):
      if stopped():
        return
      samples = step * batch_size + rows
      mask = samples < len(source)
      indices = np.where(mask, samples, 0)
      yield {
        "image": source.images[indices],
        "label": source.labels[indices],
        "mask": mask,
      }
    return
  load = _LoadEval(
    source, batch_size, rows, image_size, crop_pct, max_unreadable
  )
  yield from _decoded(load, steps, len(rows), num_workers, stopped)


def _load(source, index, decode_image):
  try:
    data, label = source.read(index)
    return decode_image(data), label
  except Exception as e:  # Pillow raises whatever a damaged file leads to.
    name = source.read.name(index)
    reason = first_line(e)
    raise UserError(f"{name}: cannot be decoded: {reason}") from e


@dataclasses.dataclass(frozen=True)
class _LoadTrain:
  """Position in this process's samples -> one cropped image."""

  source: sources.Encoded
  seed: int
  batch_size: int
  rows: np.ndarray
  start: int
  image_size: int
  crop: tuple
  max_unreadable: int

  def __call__(self, position: int):
    step, row = divmod(position, len(self.rows))
    sample = (self.start + step) * self.batch_size + self.rows[row]
    first = int(sample_indices(self.seed, sample[None], len(self.source))[0])

    def decode_image(data):
      rng = np.random.default_rng((self.seed, int(sample)))
      return decode.train_image(data, self.image_size, rng, **dict(self.crop))

    for index in range(first, first + self.max_unreadable + 1):
      try:
        image, label = _load(
          self.source, index % len(self.source), decode_image
        )
      except UserError:
        if index == first + self.max_unreadable:
          raise
      else:
        break
    unreadable = np.int64(first if index > first else -1)
    return {
      "image": image,
      "label": np.int32(label),
      "unreadable": unreadable,
    }


@dataclasses.dataclass(frozen=True)
class _LoadEval:
  """Position in this process's samples -> one image, or padding."""

  source: sources.Encoded
  batch_size: int
  rows: np.ndarray
  image_size: int
  crop_pct: float
  max_unreadable: int

  def __call__(self, position: int):
    step, row = divmod(position, len(self.rows))
    sample = int(step * self.batch_size + self.rows[row])
    result = {
      "image": np.zeros((self.image_size, self.image_size, 3), np.uint8),
      "label": np.int32(0),
      "mask": np.False_,
      "unreadable": np.int64(-1),
    }
    if sample >= len(self.source):
      return result
    try:
      image, label = _load(
        self.source,
        sample,
        lambda data: decode.eval_image(data, self.image_size, self.crop_pct),
      )
    except UserError:
      if not self.max_unreadable:
        raise
      return result | {"unreadable": np.int64(sample)}
    return result | {
      "image": image,
      "label": np.int32(label),
      "mask": np.True_,
    }


def _decoded(
  load: _LoadTrain | _LoadEval,
  steps: int,
  rows: int,
  num_workers: int,
  stopped: Callable[[], object],
) -> Generator[Batch]:
  """Runs `load` over all positions with grain, ahead of the consumer."""
  samples = grain.MapDataset.range(steps * rows).map(load)
  if not num_workers:
    options = grain.ReadOptions(
      num_threads=16, prefetch_buffer_size=max(16, 2 * rows)
    )
    batches = samples.to_iter_dataset(options).batch(rows)
  else:
    # grain's workers read absl's flags; a notebook has not parsed them.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = samples.batch(rows).to_iter_dataset(options)
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers), _ignore_interrupt
    )
  unreadable = set()
  for batch in _waited_for(iter(batches), stopped):
    for index in set(batch.pop("unreadable").tolist()) - unreadable - {-1}:
      unreadable.add(index)
      text = f"{load.source.read.name(index)}: cannot be decoded"
      count = f"{len(unreadable)} of {load.max_unreadable} allowed"
      if len(unreadable) > load.max_unreadable:
        raise UserError(f"{text}; {count} by data.max_unreadable")
      print(f"warning: {text}; {count}", file=sys.stderr)
    yield batch


def _waited_for(
  iterator: Iterator[Batch], stopped: Callable[[], object]
) -> Generator[Batch]:
  """Yields from grain's iterator, which could wait forever.

  A thread waits for each batch, so that this one sees `stopped`, the time, and
  processes that are gone.
  """
  before = set(multiprocessing.active_children())
  workers = lambda: set(multiprocessing.active_children()) - before
  seen = set()
  coming = queue.SimpleQueue()

  def fetch():
    try:
      coming.put((next(iterator, None), None))
    except Exception as e:
      coming.put((None, e))

  def close():
    with contextlib.suppress(Exception):
      iterator.close()

  def failure():
    seen.update(workers())
    for worker in seen:
      if worker.exitcode:
        return UserError(
          f"data: process {worker.pid}, which decodes, ended with exit code"
          f" {worker.exitcode}; was memory short?"
        )
    return None

  try:
    while True:
      _thread(fetch)
      deadline = time.monotonic() + PATIENCE
      batch = error = None
      while not stopped():
        with contextlib.suppress(queue.Empty):
          batch, error = coming.get(timeout=_POLL)
          break
        if failure():  # A signal may have been sent to us as well.
          deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
          states = ", ".join(map(_state, workers())) or "its threads"
          raise failure() or UserError(
            f"data: no batch came in {PATIENCE:.0f} s from what decodes:"
            f" {states}"
          )
      if error and not stopped():
        raise failure() or error
      if batch is None:
        return
      yield batch
  finally:
    # grain's close() waits for one that is stuck, and for ever for one that
    # was killed while it held a lock, which a dead process never releases.
    closing = _thread(close)
    closing.join(_GRACE)
    for worker in workers():
      worker.kill()
    closing.join(_GRACE)


def _thread(call: Callable[[], object]) -> threading.Thread:
  """Started; one that never ends does not keep the program from ending."""
  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  return thread


def _state(process: multiprocessing.process.BaseProcess) -> str:
  """Its number, and what the system says that it does, where it says so."""
  try:
    state = re.search(
      r"^State:\s*(.*)", Path(f"/proc/{process.pid}/status").read_text(), re.M
    )
  except OSError:
    state = None
  return f"process {process.pid}" + (f", {state[1]}" if state else "")


def _ignore_interrupt(worker: int, num_workers: int) -> None:
  """Ctrl-C reaches every process of a terminal; the trainer decides."""
  del worker, num_workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)
