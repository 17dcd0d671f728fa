"""What the training loop costs: its time a step beside the bare jitted step's.

  python -m benchmarks.loop --config configs/digits.py \\
      --config.model.dim=8 --config.model.depth=1

Trains as `convmixer_jax.main` does, logging on, but scores and saves only at
the end; then calls the very step of that run as often in a loop, on one batch
that lies on the device; and so on by turns. Prints one JSON object:
microseconds a step of both, medians of --repeats, and the ratio.
"""

import contextlib
import io
import json
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np
import tqdm

import benchmarks
from convmixer_jax import cli
from convmixer_jax import sharding
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib

_FLAGS = flags.FlagValues()
_CONFIG = cli.define_config(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  config.eval_every = config.save_every = 2**31
  rng = np.random.default_rng(0)
  size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
  batch = sharding.to_global(
    sharding.make_mesh(),
    {
      "image": rng.integers(0, 256, size, np.uint8),
      "label": rng.integers(0, 2, config.batch_size).astype(np.int32),
    },
    config.batch_size,
  )
  times = {"loop": [], "bare": []}
  for _ in tqdm.trange(_REPEATS.value, disable=not sys.stderr.isatty()):
    state, step, loop, waits = _train(config)
    start = time.perf_counter()
    for _ in range(num_steps := int(state.step)):
      state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    times["bare"].append((time.perf_counter() - start) / num_steps)
    times["loop"].append(loop)
  result = {
    "config": _FLAGS["config"].config_filename,
    "steps": num_steps,
    "log_every": config.log_every,
    **{
      f"{name}_microseconds": benchmarks.summary(1e6 * np.array(values))
      for name, values in times.items()
    },
    "ratio": benchmarks.summary(np.divide(times["loop"], times["bare"])),
    "data_wait_percent": benchmarks.summary(waits),
  }
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _train(config):
  """A whole run: its state, its step, seconds a step, and data_wait."""
  steps, jit_step = [], train.jit_step

  def keep(*args, **kwargs):
    steps.append(jit_step(*args, **kwargs))
    return steps[-1]

  train.jit_step = keep
  with (
    tempfile.TemporaryDirectory() as workdir,
    contextlib.redirect_stdout(io.StringIO()),
  ):
    state = train.train_and_evaluate(config, workdir)
    records = workdir_lib.read_metrics(workdir)
  train.jit_step = jit_step
  records = [r for r in records if "images_per_second" in r]
  seconds = [config.batch_size / r["images_per_second"] for r in records]
  waits = [record["data_wait"] for record in records]
  return state, steps[0], np.mean(seconds), waits


if __name__ == "__main__":
  cli.run(main, _FLAGS)
