"""Cost of the training loop: its time per step, beside the bare jitted step.

  python -m benchmarks.loop --config configs/digits.py \\
      --config.model.dim=8 --config.model.depth=1

In each round, trains as `convmixer_jax.main` does, with logging, but evaluates
and saves only at the end. Then calls the same jitted step as often, on one
batch that is on the device. Prints one JSON object: microseconds per step of
both, and their ratio.
"""

import contextlib
import io
import json
import operator
import tempfile
import time

import jax
import numpy as np

import benchmarks
from convmixer_jax import cli
from convmixer_jax import recipe
from convmixer_jax import sharding
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_REPEATS = benchmarks.define_repeats(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  config.eval_every = config.save_every = 2**31
  data = config.data
  built = recipe.build(
    config,
    sources.describe(data.name, data.dir, data.train_split, data.image_size),
    None,
  )
  waits = []

  def loop():
    with (
      tempfile.TemporaryDirectory() as workdir,
      contextlib.redirect_stdout(io.StringIO()),
    ):
      train.train_and_evaluate(config, workdir)
      records = workdir_lib.read_metrics(workdir)
    records = [r for r in records if "images_per_second" in r]
    waits[:] = [record["data_wait"] for record in records]
    return np.mean(
      [config.batch_size / r["images_per_second"] for r in records]
    )

  times = benchmarks.by_turns(
    {"loop": loop, "bare": _make_bare(config, built)},
    _REPEATS.value,
    timer=operator.call,
    warmup=0,
  )
  result = {
    "config": _FLAGS["config"].config_filename,
    "steps": built.total_steps,
    "log_every": config.log_every,
    **{
      f"{name}_microseconds": benchmarks.summary(1e6 * values)
      for name, values in times.items()
    },
    "ratio": benchmarks.summary(times["loop"] / times["bare"]),
    "data_wait_percent": benchmarks.summary(waits),
  }
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _make_bare(config, built):
  """Returns a function that times the steps alone, in seconds per step."""
  rng = np.random.default_rng(0)
  size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
  batch = {
    "image": rng.integers(0, 256, size, np.uint8),
    "label": rng.integers(0, 2, config.batch_size).astype(np.int32),
  }
  batch = sharding.to_global(built.mesh, batch, config.batch_size)

  def bare():
    step = lambda state: built.train_step(built.seed, state, batch)
    state, _ = jax.block_until_ready(step(built.init_state()))  # Compiles.
    start = time.perf_counter()
    for _ in range(built.total_steps):
      state, metrics = step(state)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - start) / built.total_steps

  return bare


if __name__ == "__main__":
  cli.run(main, _FLAGS)
