"""Estimates what a sweep will take, without training."""

from collections.abc import Sequence
import heapq
import math
import re
import time

import jax
import numpy as np

from convmixer_jax import plan
from convmixer_jax import recipe
from convmixer_jax.errors import UserError
from convmixer_jax.plan import report
from convmixer_jax.plan import topology
from experiments import cells
from experiments import devices
from experiments import runs as runs_lib


def print_hours(runs: Sequence[runs_lib.Run]) -> None:
  """Prints parameters, FLOPs and times, from the speed of a step here.

  Raises UserError if the data are not here.
  """
  costs = {run.name: _costs(run.cell) for run in runs}
  smallest = min(runs, key=lambda run: costs[run.name][1])
  speed, measured = _measured_speed(smallest.cell, costs[smallest.name][1])
  width = max(len(run.name) for run in runs)
  print(f"{'run':{width}}  parameters  GFLOP/image  epochs{'time':>18}")
  total = 0.0
  for run in runs:
    parameters, flops = costs[run.name]
    hours = 3 * flops * run.epochs * run.cell.data.size / speed / 3600
    total += hours * (run.status != "finished")
    print(
      f"{run.name:{width}}{parameters:12,}"
      f"{flops / 1e9:13.3g}{run.epochs:8}{report.long_time(hours):>18}"
      + ("  finished" if run.status == "finished" else "")
    )
  print(
    f"about {report.long_time(total)} to go, one run at a time, at"
    f" {speed / 1e9:.3g} GFLOP/s in training ({measured}), without start,"
    " compilation and evaluation"
  )


def print_hours_on(
  runs: Sequence[runs_lib.Run],
  where: str,
  devices_per_run: int,
  dollars: float | None,
) -> None:
  """Prints the times on the devices of a topology, as `plan` says them.

  Args:
    runs: those that are finished count as done.
    where: as in `plan.topology.open_topology`.
    devices_per_run: runs are trained side by side, each by so many.
    dollars: price of a device for an hour.

  Raises:
    UserError: there is no such topology, its devices' speed is unknown, or they
      are too few or too small for a run.
  """
  if topology.open_topology(where)[0].device_kind not in topology.CHIPS:
    raise UserError(f"--topology={where}: their speed is not known")
  kind, _, shape = where.partition(":")
  sizes = [int(n) for n in re.findall(r"\d+", shape)]
  at_a_time = math.prod(sizes) // devices_per_run
  bounds = devices.BOUNDS.get(devices_per_run)
  if "x" not in shape:
    part = f"{kind}:{devices_per_run}"
  elif bounds:
    part = f"{kind}:{'x'.join(bounds.split(',')[: len(sizes)])}"
  else:
    text = "must be 1, 2, 4 or 8 TPU chips"
    raise UserError(f"--devices_per_run={devices_per_run}: {text}")
  if not at_a_time:
    text = f"--topology={where} has fewer devices"
    raise UserError(f"--devices_per_run={devices_per_run}: {text}")
  found = topology.open_topology(part)
  costs = {run.cell.name: _costs(run.cell) for run in runs}
  width = max(len(run.name) for run in runs)
  heads = f"{'at best':>14}{'estimate':>14}"
  print(f"{'run':{width}}  parameters  GFLOP/image  epochs{heads}", flush=True)
  hours: dict[str, tuple[float, float]] = {}
  totals = [[0.0] * at_a_time, [0.0] * at_a_time]
  for run in runs:
    name = run.cell.name
    if name not in hours:
      hours[name] = _planned(run.cell, found)
    for ends, length in zip(totals, hours[name]):
      if run.status != "finished":  # It goes where one ends first.
        heapq.heapreplace(ends, ends[0] + length)
    parameters, flops = costs[name]
    print(
      f"{run.name:{width}}{parameters:12,}{flops / 1e9:13.3g}{run.epochs:8}"
      + "".join(f"{report.long_time(x):>18}" for x in hours[name])
      + ("  finished" if run.status == "finished" else ""),
      flush=True,
    )
  best, estimate = map(max, totals)
  print(
    f"{where}, {devices_per_run} for each run, {at_a_time} runs at a time:"
    f" {report.long_time(best)} at best, {report.long_time(estimate)} by the"
    " compiler's estimate, without start, compilation and evaluation"
  )
  if dollars is not None:
    each = dollars * math.prod(sizes)
    print(f"${best * each:,.2f} to ${estimate * each:,.2f} for all devices")


def _planned(cell, found):
  """Hours of a run: at best, and by the compiler's estimate."""
  result = plan.plan(cell.resolve(0), found, cell.data)
  if not result["fits"]:
    raise UserError(
      f"{cell.name}: needs more memory than the devices have; see python -m"
      " convmixer_jax.plan"
    )
  best = result["hours"]["at_best"]
  return best, result["hours"].get("compiler_estimate", best)


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
