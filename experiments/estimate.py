"""Estimates what a sweep will take, without training."""

from collections.abc import Sequence
import time

import jax
import numpy as np

from convmixer_jax import recipe
from convmixer_jax.errors import UserError
from experiments import cells
from experiments import runs as runs_lib


def print_hours(runs: Sequence[runs_lib.Run]) -> None:
  """Prints parameters, FLOPs and hours, from the speed of a step here.

  Raises UserError if the data are not here.
  """
  costs = {run.name: _costs(run.cell) for run in runs}
  smallest = min(runs, key=lambda run: costs[run.name][1])
  speed, measured = _measured_speed(smallest.cell, costs[smallest.name][1])
  width = max(len(run.name) for run in runs)
  print(f"{'run':{width}}  parameters  GFLOP/image  epochs   hours")
  total = 0.0
  for run in runs:
    parameters, flops = costs[run.name]
    hours = 3 * flops * run.epochs * run.cell.data.size / speed / 3600
    total += hours * (run.status != "finished")
    print(
      f"{run.name:{width}}{parameters:12,}"
      f"{flops / 1e9:13.3g}{run.epochs:8}{hours:8.2g}"
      + ("  finished" if run.status == "finished" else "")
    )
  print(
    f"about {total:.2g} hours to go, one run at a time, at {speed / 1e9:.3g}"
    f" GFLOP/s in training ({measured})"
  )


def _costs(cell: cells.Cell):
  costs = cell.costs(cell.data.num_classes)
  if costs is None or cell.data.size is None:
    raise UserError(
      f"{cell.name}: --dry_run needs the number of its images and classes, and"
      " its data (data.name, data.dir) are not here"
    )
  return costs


def _measured_speed(cell, flops):
  """FLOP/s of training, as three forward passes, of a cell."""
  config = cell.resolve(0)
  config.batch_size = min(config.batch_size, 64)
  config.accum_steps = 1
  config.model.bn_group_size = config.augment.mix_group_size = 0
  built = recipe.build(config, cell.data, jax.local_devices()[:1])
  state = built.init_state()
  zeros = lambda like: np.zeros(like.shape, like.dtype)
  batch = jax.tree.map(zeros, built.batch_shapes())
  seconds = []
  for _ in range(6):  # The first compiles, and is left out.
    start = time.perf_counter()
    state, metrics = built.train_step(built.seed, state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - start)
  return 3 * config.batch_size * flops / np.median(seconds[1:]), (
    f"measured here: {cell.name}, {config.batch_size} images a step"
  )
