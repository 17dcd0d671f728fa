"""The largest batch size that fits."""

from collections.abc import Callable
from collections.abc import Sequence
import copy
import math
from typing import Any

import ml_collections

from convmixer_jax import plan
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.plan import report


def find_batch(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
  log: Callable[[str], None],
) -> dict[str, Any]:
  """The plan of the largest batch size that fits, to the unit or within 2 %.

  It tries only sizes that give each device whole BatchNorm groups, microbatches
  and mixing groups. Larger ones are assumed to need more memory.
  The search starts from the config's size and passes a line for each size to
  `log`. See `plan.plan` for the other arguments and the result, which also has
  `tried`: [{batch_size, fits, memory_bytes}]. Raises UserError if no size fits.
  """
  unit = math.lcm(
    len(devices) * config.accum_steps * (config.model.bn_group_size or 1),
    config.augment.mix_group_size or 1,
  )
  largest = data.size // unit
  if not largest:
    raise UserError(
      f"--find_batch: batch sizes are multiples of {unit:,} here, and the data"
      f" set has only {data.size:,} images"
    )
  log(f"batch sizes are multiples of {unit:,} here")
  config = copy.deepcopy(config)
  guess = min(max(config.batch_size // unit, 1), largest)
  low, high = 0, largest + 1  # In units: `low` fits, `high` does not.
  best, tried, estimate = None, [], None
  while high - low > max(1, low // 64):
    config.batch_size = guess * unit
    result = plan.plan(config, devices, data)
    tried.append({k: result[k] for k in ("batch_size", "fits", "memory_bytes")})
    log(
      f"batch_size={guess * unit:,}: {report.fit(result)}; compiled in"
      f" {result['compile_seconds']:.0f} s"
    )
    if result["fits"]:
      low, best = guess, result
    else:
      high = guess
    # Memory is a constant plus a part nearly proportional to the batch. Every
    # fourth try is a bisection, in case that estimate does not converge.
    needed, available = result["memory_bytes"], result["memory_available_bytes"]
    if needed and available:
      split = result["memory_split_bytes"]
      moving = split["batch"] + split["activations"]
      estimate = int(guess * (available - needed + moving) / moving)
    if estimate is None or len(tried) % 4 == 0:
      estimate = (low + high) // 2 if high <= largest else 2 * low
    step = max(1, low // 64)
    guess = min(max(estimate, low + step), high - step)
  if best is None:
    raise UserError(
      f"--find_batch: batch_size={unit:,}, the smallest possible,"
      f" {report.fit(result)}; try --config.model.remat=nothing_saveable with"
      " --config.model.scan=true, or more devices"
    )
  return best | {"tried": tried}
