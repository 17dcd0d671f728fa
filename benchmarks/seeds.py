"""Would seeds of a cell gain from training together on one TPU chip?

  python -m benchmarks.seeds --cell p8_k9 --seeds 2
  python -m benchmarks.seeds --cell p4_k3 --seeds 4 --sweep patch_kernel

Compiles the train step of one seed, and that step under vmap over (seed, state,
batch), for a TPU v5e chip, which need not be here. Prints one JSON object:
milliseconds of both steps, at best and by the compiler's estimate as in `plan`,
and the gains, the seeds' times one after the other by their time together. It
takes minutes.
"""

import json

import jax
import numpy as np

import benchmarks
from convmixer_jax import cli
from convmixer_jax import ops
from convmixer_jax import plan
from convmixer_jax import sharding
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError
from convmixer_jax.plan import cost
from convmixer_jax.plan import hlo
from convmixer_jax.plan import topology
from experiments import sweeps

_FLAGS = cli.Flags()
_SWEEP = _FLAGS.string(
  "sweep", "The cell's sweep: --sweep patch_kernel.", "patch_kernel"
)
_CELL = _FLAGS.string("cell", "A cell of the sweep: --cell p8_k9.")
_SEEDS = _FLAGS.positive("seeds", "Seeds that train together: --seeds 2.", 2)


def main() -> None:
  """Runs what the flags say; see --help."""
  jax.config.update("jax_enable_compilation_cache", False)
  name, seeds = cli.required(_CELL), _SEEDS.value
  cells = {cell.name: cell for cell in sweeps.get(_SWEEP.value).cells}
  if name not in cells:
    raise UserError(f"--cell={name}: must be one of {', '.join(cells)}")
  cell = cells[name]
  devices = topology.open_topology("v5e:1x1")
  recipe, state, batch, traced = plan.trace_step(
    cell.resolve(0), devices, cell.data
  )
  alone = _milliseconds(devices[0], traced)
  on_chip = sharding.replicated(recipe.mesh)
  together = jax.jit(
    jax.vmap(recipe.train_step.__wrapped__),
    in_shardings=on_chip,
    out_shardings=on_chip,
    donate_argnums=1,
  )
  shapes = (jax.ShapeDtypeStruct((), np.uint32), state, batch)
  stacked = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), shapes
  )
  with ops.portable():
    both = _milliseconds(devices[0], together.trace(*stacked))
  gain = {kind: seeds * alone[kind] / both[kind] for kind in alone}
  result = {"cell": name, "seeds": seeds, "one_seed_ms": alone}
  result |= {"together_ms": both, "gain": gain}
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _milliseconds(device, traced):
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise UserError(f"does not fit on the chip: {first_line(e)}") from e
  program = hlo.Program(compiled.as_text())
  seconds = cost.step_seconds(
    topology.CHIPS[device.device_kind],
    cost.flops(traced.jaxpr.jaxpr),
    program.bytes(),
    cost.by_cause(program.collectives()),
    program.cycles(),
    cost.kernel_cycles(traced.jaxpr.jaxpr),
  )
  return {k: 1e3 * seconds[k] for k in ("at_best", "compiler_estimate")}


if __name__ == "__main__":
  cli.run(main, _FLAGS)
