"""Batches on the host, each a pure function of (seed, step).

Sample n = step * batch_size + row of a training run is entry n mod N of
permutation n // N of the N images. Therefore batches cross epochs, no image is
dropped at the end of an epoch, and a resumed run needs no iterator state. Any
number of hosts sees the same global batch; each reads its own rows of it.
"""

from collections.abc import Callable
from collections.abc import Generator
import functools
import sys

import numpy as np
from PIL import Image

from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.data import workers
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

Batch = workers.Batch


@functools.lru_cache(maxsize=2)  # The two epochs that a batch can touch.
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


def sample_indices(seed: int, samples: np.ndarray, size: int) -> np.ndarray:
  """Returns the image that each sample of a run is: [R] int in [0, size).

  `samples` is [R] int: step * batch_size + row, from the start of the run.
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
  """Identifies the images in the global batch of a step, row by row.

  Returns:
    Indices into an in-memory source, or names of files or records.
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
  """Yields this process's rows of the batches of steps start to stop - 1.

  Args:
    source: the images. They are decoded and cropped at random here, except
      those that `augment` crops.
    seed: seed of the order and the crops.
    batch_size: size of the global batch.
    rows: [R] int, the rows of the global batch to load.
    start: the first step.
    stop: one after the last step.
    image_size: S, height and width in pixels.
    num_workers: number of decoding processes; 0 decodes in threads.
    max_unreadable: number of unreadable files that are tolerated. Each gives a
      warning, and the next file in the source replaces it.
    stopped: ends the batches when it returns true, even during a wait.
    **crop: scale, ratio and interpolation; see `decode.random_crop`.

  Yields:
    image, uint8 [R, S, S, 3]; label, int32 [R].

  Raises:
    UserError: too many unreadable files, or a worker died or is stuck.
  """
  if isinstance(source, sources.InMemory):
    for step in range(start, stop):
      if stopped():
        return
      indices = sample_indices(seed, step * batch_size + rows, len(source))
      yield {"image": source.images[indices], "label": source.labels[indices]}
    return
  size = len(source)

  def load(position):
    step, row = divmod(position, len(rows))
    sample = (start + step) * batch_size + rows[row]
    first = int(sample_indices(seed, sample[None], size)[0])

    def decode_image(data):
      if source.crop_on_device:
        return decode.whole_image(data, image_size)
      rng = np.random.default_rng((seed, int(sample)))
      return decode.train_image(data, image_size, rng, **crop)

    for index in range(first, first + max_unreadable + 1):
      try:
        image, label = _load(source, index % size, decode_image)
        break
      except _Unreadable:
        if index == first + max_unreadable:
          raise
    unreadable = np.int64(first if index > first else -1)
    return {"image": image, "label": np.int32(label), "unreadable": unreadable}

  yield from _decoded(
    source, load, stop - start, rows, num_workers, max_unreadable, stopped
  )


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
  """Yields this process's rows of batches that hold every image once, in order.

  Args:
    source: the images. They are resized and cropped at the centre here.
    batch_size: size of the global batch. The last batch is padded to it.
    rows: see `train_batches`.
    image_size: see `train_batches`.
    crop_pct: see `decode.eval_image`.
    num_workers: see `train_batches`.
    max_unreadable: number of unreadable files that are tolerated. Each gives a
      warning and is masked.
    stopped: see `train_batches`.

  Yields:
    image, uint8 [R, S, S, 3]; label, int32 [R] or [R, L], see
    `sources.Encoded`; mask, bool [R], False for padding and unreadable files.

  Raises:
    UserError: too many unreadable files, or a worker died or is stuck.
  """
  size = len(source)
  steps = -(-size // batch_size)
  if isinstance(source, sources.InMemory):
    for step in range(steps):
      if stopped():
        return
      samples = step * batch_size + rows
      mask = samples < size
      indices = np.where(mask, samples, 0)
      images, labels = source.images[indices], source.labels[indices]
      if crop_pct < 1:
        crop = lambda x: decode.centre_crop(x, image_size, crop_pct)
        images = np.stack([crop(Image.fromarray(x)) for x in images])
      yield {"image": images, "label": labels, "mask": mask}
    return

  def load(position):
    step, row = divmod(position, len(rows))
    sample = int(step * batch_size + rows[row])
    image = np.zeros((image_size, image_size, 3), np.uint8)
    label = np.zeros(source.label_shape, np.int32)
    mask, unreadable = sample < size, -1
    if mask:
      decode_image = lambda data: decode.eval_image(data, image_size, crop_pct)
      try:
        image, label = _load(source, sample, decode_image)
      except _Unreadable:
        if not max_unreadable:
          raise
        mask, unreadable = False, sample
    return {
      "image": image,
      "label": np.int32(label),
      "mask": np.bool_(mask),
      "unreadable": np.int64(unreadable),
    }

  yield from _decoded(
    source, load, steps, rows, num_workers, max_unreadable, stopped
  )


class _Unreadable(UserError):
  """A file that `max_unreadable` may tolerate."""


def _load(source, index, decode_image):
  try:
    data, label = source.read(index)
    return decode_image(data), label
  except UserError:
    raise
  except Exception as e:  # Pillow may raise anything for a damaged file.
    name = source.read.name(index)
    raise _Unreadable(f"{name}: cannot be decoded: {first_line(e)}") from e


def _decoded(source, load, steps, rows, num_workers, max_unreadable, stopped):
  """Yields the batches of `load`; warns once of each unreadable file."""
  seen = set()
  size, samples = len(rows), steps * len(rows)
  for batch in workers.load_batches(load, samples, size, num_workers, stopped):
    for index in set(batch.pop("unreadable").tolist()) - seen - {-1}:
      seen.add(index)
      text = f"{source.read.name(index)}: cannot be decoded"
      count = f"{len(seen)} of {max_unreadable} allowed"
      if len(seen) > max_unreadable:
        raise UserError(f"{text}; {count} by data.max_unreadable")
      print(f"warning: {text}; {count}", file=sys.stderr)
    yield batch
