"""Plans a training run for devices that need not be present.

`plan` compiles the run's train step and reads the program. The command line is
`python -m convmixer_jax.plan`.
"""

from collections.abc import Sequence
import contextlib
import re
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import step as step_lib
from convmixer_jax.data import sources
from convmixer_jax.plan import cost
from convmixer_jax.plan import hlo
from convmixer_jax.plan import topology

# Attributes that a plan reports, if the model has them.
_MODEL = ("dim", "depth", "patch_size", "kernel_size", "norm", "bn_group_size",
          "scan", "remat")  # fmt: skip


def plan(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
) -> dict[str, Any]:
  """Compiles a run's train step and reads the program.

  `devices` are real ones, or those of `topology.open_topology`. `data` is the
  training split; none of its fields is None. Raises UserError if a value in
  `config` is invalid.

  Returns:
    The fields that `--json` prints, except topology, command and versions.
    Sizes (bytes), FLOPs and times (seconds) are those of one device and one
    step. Unknown fields are None: those that are read from the program, if it
    needs too much memory to compile, and times, if the chip is not in
    `topology.CHIPS`.
  """
  what = (
    f"{config.model.name}, batch {config.batch_size:,}, for {len(devices)} x"
    f" {devices[0].device_kind}"
  )
  with _shown(f"tracing {what}"):
    recipe, state, batch, traced = trace_step(config, devices, data)
  model = recipe.model
  forward = models.flops(model, config.data.image_size)
  batch_size, count = config.batch_size, len(devices)
  # The state is replicated, the batch is sharded.
  memory = {
    "parameters": _num_bytes(state.params),
    "batch_stats": _num_bytes(state.batch_stats),
    "ema": _num_bytes(state.ema),
    "optimizer": _num_bytes(state.opt_state),
    "batch": _num_bytes(batch) // count,
  }
  flops = cost.flops(traced.jaxpr.jaxpr) // count
  start = time.perf_counter()
  with _shown(f"compiling {what}"):
    compiled, needed = _compile(traced)
  compile_seconds = time.perf_counter() - start
  chip = topology.CHIPS.get(devices[0].device_kind)
  traffic = collectives = seconds = hours = None
  if compiled is not None:
    memory["program"] = compiled.memory_analysis().generated_code_size_in_bytes
    program = hlo.Program(compiled.as_text())
    traffic = program.bytes()
    collectives = cost.by_cause(program.collectives())
    if chip is not None:
      kernels = cost.kernel_cycles(traced.jaxpr.jaxpr) // count
      seconds = cost.step_seconds(
        chip, flops, traffic, collectives, program.cycles(), kernels
      )
      hours = {
        name: seconds[name] * recipe.total_steps / 3600
        for name in ("at_best", "compiler_estimate")
        if name in seconds
      }
  if needed is not None:
    memory["activations"] = needed - sum(memory.values())
  available = topology.available_memory(devices)
  return {
    "model": config.model.name,
    "description": models.describe(model),
    **{name: getattr(model, name, None) for name in _MODEL},
    "dtype": jnp.dtype(model.dtype).name,
    "device": devices[0].device_kind,
    "num_devices": count,
    "batch_size": batch_size,
    "accum_steps": config.accum_steps,
    "num_images": data.size,
    "epochs": config.epochs,
    "steps": recipe.total_steps,
    "compile_seconds": round(compile_seconds, 1),
    "fits": compiled is not None and (available is None or needed <= available),
    "memory_available_bytes": available,
    "memory_bytes": needed,
    "memory_split_bytes": memory,
    "flops": flops,
    "model_flops": 3 * forward * batch_size // count,
    "bytes": traffic,
    "collectives": collectives,
    "seconds": seconds,
    "hours": hours,
  }


def trace_step(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
) -> tuple[recipe_lib.Recipe, step_lib.TrainState, dict[str, Any], Any]:
  """Traces a run's train step; see `plan` for the arguments and errors.

  Returns the recipe, the shapes of its state and of a batch, and the traced
  step, which can be lowered for the devices.
  """
  config_lib.check(config, len(devices))
  recipe = recipe_lib.build(config, data, devices)
  state, batch = jax.eval_shape(recipe.init_state), recipe.batch_shapes()
  seed = jax.ShapeDtypeStruct((), np.uint32)
  # Tracing would choose the kernels that are written for this machine's CPU.
  on_cpu = devices[0].platform == "cpu"
  with contextlib.nullcontext() if on_cpu else ops.portable():
    traced = recipe.train_step.trace(seed, state, batch)
  return recipe, state, batch, traced


@contextlib.contextmanager
def _shown(doing):
  """Shows what is under way, and for how long, if stderr is a terminal."""
  bar = tqdm.tqdm(
    desc=doing, bar_format="{desc}: {elapsed}", leave=False, disable=None
  )
  ended = threading.Event()

  def tick():
    while not ended.wait(1):
      bar.refresh()

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    bar.close()


def _compile(traced):
  """The program, or None if memory is short, and the bytes that it needs."""
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    # "... required for HLO temporaries (16.85G) exceeds ..."
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", str(e))
    if match is None:
      return None, None
    return None, int(float(match[1]) * 1024 ** " KMGT".index(match[2]))
  memory = compiled.memory_analysis()
  return compiled, (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )


def _num_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
