"""Time to compile a training step: unrolled, scanned, and scanned with remat.

  python -m benchmarks.compile --model convmixer_1536_20 --batch 4
  python -m benchmarks.compile --model convmixer_768_32 --batch 8 --repeats 7

The step is forward, backward, clipping, AdamW and BatchNorm's update on images
of 224 pixels, without augmentation. Prints one JSON object. For each way:
seconds to trace and to compile, seconds of a step, and MiB of the state, of the
temporary buffers, and of both together.
"""

import json
import time

import jax
import jax.numpy as jnp

import benchmarks
from benchmarks import work
from convmixer_jax import cli
from convmixer_jax import models
from convmixer_jax import step as step_lib

_FLAGS = cli.Flags()
_MODEL = benchmarks.define_model(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS, 3)
WAYS = {
  "unrolled": {},
  "scanned": {"scan": True},
  "scanned, remat": {"scan": True, "remat": "nothing_saveable"},
}


def main() -> None:
  """Runs what the flags say; see --help."""
  jax.config.update("jax_enable_compilation_cache", False)
  result = {}
  for way, fields in WAYS.items():
    model, batch, size = _MODEL(**fields)
    result[way] = _measure(way, model, batch, size)
  result |= {"model": benchmarks.title(model), "batch": batch}
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _measure(way, model, batch, size):
  shapes = models.variable_shapes(model)
  tx = work.make_optimizer(shapes["params"])
  as_floats = lambda key, images, targets: (images / 255.0, targets)
  step = jax.jit(
    step_lib.make_train_step(model, tx, as_floats, seed=0), donate_argnums=0
  )
  init = jax.jit(lambda key: step_lib.init_state(key, model, tx, size))
  inputs = {
    "image": jnp.zeros((batch, size, size, 3), jnp.uint8),
    "label": jnp.arange(batch),
  }
  state = init(jax.random.key(0))
  start = time.perf_counter()
  lowered = step.lower(state, inputs)
  traced = time.perf_counter()
  compiled = lowered.compile()
  ended = time.perf_counter()

  run = work.repeated_step(compiled, state, inputs)
  times = benchmarks.by_turns({way: run}, _REPEATS.value)[way]
  memory = compiled.memory_analysis()
  mebibytes = lambda size: round(size / 2**20)
  return {
    "trace_seconds": round(traced - start, 2),
    "compile_seconds": round(ended - traced, 2),
    "step_seconds": benchmarks.summary(times),
    "state_mebibytes": mebibytes(memory.argument_size_in_bytes),
    "temporary_mebibytes": mebibytes(memory.temp_size_in_bytes),
    "peak_mebibytes": mebibytes(
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    ),
  }


if __name__ == "__main__":
  cli.run(main, _FLAGS)
