"""Exact metrics: every image of the split counted once."""

from collections.abc import Callable
from collections.abc import Iterable
import functools

import jax
from jax.sharding import Mesh
import numpy as np

from convmixer_jax import sharding
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from convmixer_jax.step import TrainState


def make_evaluate(
  eval_step: Callable,
  source: sources.Source,
  mesh: Mesh,
  state: TrainState,
  *,
  batch_size: int,
  image_size: int,
  crop_pct: float,
  num_workers: int,
  max_unreadable: int = 0,
  progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Callable[..., dict[str, float] | None]:
  """Returns the function that scores a state on all of `source`.

  Args:
    eval_step: from `make_eval_step`; compiled here.
    source: the split.
    mesh: the devices.
    state: one as those that will be scored.
    batch_size: rounded up to a multiple of the number of devices.
    image_size: side of the images in pixels.
    crop_pct: see `decode.eval_image`.
    num_workers: see `stream.eval_batches`.
    max_unreadable: likewise.
    progress: wraps the batches, given their number; a progress bar.

  Returns:
    (state, stopped=never) -> top1 and top5 in percent, loss in nats, and count,
    the number of images. It raises RuntimeError if that is not the size of the
    split, but for unreadable ones. `stopped` is asked before each batch; once
    it says so, the result is None.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size
  rows = sharding.local_rows(mesh, batch_size)
  like = functools.partial(
    jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh)
  )
  batch = {
    "image": like((batch_size, image_size, image_size, 3), np.uint8),
    "label": like((batch_size,), np.int32),
    "mask": like((batch_size,), bool),
  }
  jitted = jax.jit(eval_step, out_shardings=sharding.replicated(mesh))
  compiled = jitted.lower(state, batch).compile()

  def evaluate(state: TrainState, stopped: Callable = lambda: False):
    batches = stream.eval_batches(
      source,
      batch_size=batch_size,
      rows=rows,
      image_size=image_size,
      crop_pct=crop_pct,
      num_workers=num_workers,
      max_unreadable=max_unreadable,
      stopped=stopped,
    )
    sums = []
    for batch in progress(batches, -(-len(source) // batch_size)):
      sums.append(compiled(state, sharding.to_global(mesh, batch, batch_size)))
    if stopped():
      return None
    total = jax.tree.map(
      lambda *x: np.sum(x, dtype=np.float64), *jax.device_get(sums)
    )
    missing = len(source) - total["count"]
    if not total["count"]:
      raise UserError("data.eval_split: none of its images can be decoded")
    if not 0 <= missing <= max_unreadable * jax.process_count():
      raise RuntimeError(
        f"scored {total['count']:.0f} of {len(source)} images: a bug"
      )
    return {
      "top1": 100 * total["top1"] / total["count"],
      "top5": 100 * total["top5"] / total["count"],
      "loss": total["loss"] / total["count"],
      "count": int(total["count"]),
    }

  return evaluate
