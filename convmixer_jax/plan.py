"""What a run needs, and at best takes, on a machine that need not be here.

  python -m convmixer_jax.plan --config configs/digits.py --topology cpu:8
  python -m convmixer_jax.plan --config configs/imagenet.py:1536_20 \\
      --config.batch_size=512 --topology v5e:2x4
  python -m convmixer_jax.plan --config configs/imagenet.py:768_32 \\
      --config.model.bn_group_size=0 --topology v5e:16x16 --find_batch --json

Compiles the very train step of that run for the topology, with the compiler of
that platform, and reads the program: memory, FLOPs, traffic, what the devices
exchange and why. Nothing is computed or allocated, and no such device is
needed; for TPUs libtpu is: pip install "jax[tpu]". Times are bounds and not
measurements: no step can be faster than its arithmetic at the peak rate, its
memory traffic at the full bandwidth, and its communication over all links.

Exits with 0 if the run fits, and with 1 if it does not.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import topologies
from jax.extend import core as jax_core
import jax.numpy as jnp
import ml_collections
import numpy as np

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import hlo
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import runtime
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax import train
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError

_FLAGS = flags.FlagValues()
_CONFIG = cli.define_config(_FLAGS)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "The devices to plan for: --topology v5e:4x4, v4:2x2x4, v5p:2x2x2, v6e:2x4"
  " (chips along each axis), or cpu:8. Default: this machine's own.",
  flag_values=_FLAGS,
)
_FIND_BATCH = flags.DEFINE_bool(
  "find_batch",
  False,
  "Search for the largest batch size that fits, to the unit or within 2 %,"
  " beginning at the config's: --find_batch. Each size is compiled, which is"
  " said on stderr.",
  flag_values=_FLAGS,
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  "Training images, where the data set is not here to be counted:"
  " --num_images 1281167.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_NUM_CLASSES = flags.DEFINE_integer(
  "num_classes",
  None,
  "Classes, likewise: --num_classes 1000.",
  lower_bound=2,
  flag_values=_FLAGS,
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print a JSON object instead: --json.", flag_values=_FLAGS
)

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip, which is one device.

  Attributes:
    flops: bfloat16 FLOP/s at peak, in which float32 too is multiplied.
    bandwidth: of its memory, bytes/s.
    interconnect: bytes/s that it can send over all its links together.
    memory: bytes that a program may use, as libtpu 0.0.42.1 says.
    clock: Hz; `flops` over what its matrix units do in a cycle.
  """

  flops: float
  bandwidth: float
  interconnect: float
  memory: int
  clock: float


# By JAX's device_kind. cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e in
# November 2026; of "bidirectional ICI bandwidth per chip" (v4: 6 links of 50
# GB/s each way, Jouppi et al., arXiv:2304.01433) half is what leaves it. Matrix
# units: eight of 128 x 128 on v4 and v5p, four on v5e; v6e's rate is 2^19 FLOPs
# a cycle, of which its compiler expects 70 % for a product of two [8192, 8192].
CHIPS = {
  "TPU v4": Chip(275e12, 1200e9, 300e9, int(30.75 * GIB), 275e12 / 2**18),
  "TPU v5 lite": Chip(197e12, 819e9, 200e9, int(15.75 * GIB), 197e12 / 2**17),
  "TPU v5": Chip(459e12, 2765e9, 600e9, int(95.74 * GIB), 459e12 / 2**18),
  "TPU v6 lite": Chip(918e12, 1638e9, 400e9, int(31.25 * GIB), 918e12 / 2**19),
}
_KINDS = ("v4", "v5e", "v5p", "v6e")  # As libtpu's topologies are named.
_MOST_DEVICES = 10_000  # A pod of v5p has 8,960.


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  devices = open_topology(_TOPOLOGY.value)
  # A program from the cache may name operations of another version's source.
  jax.config.update("jax_enable_compilation_cache", False)
  data = config.data
  known = sources.describe(
    data.name, data.dir, data.train_split, data.image_size
  )
  known = dataclasses.replace(
    known,
    size=_NUM_IMAGES.value or known.size,
    num_classes=_NUM_CLASSES.value or known.num_classes,
  )
  for flag, value in (
    ("num_images", known.size),
    ("num_classes", known.num_classes),
  ):
    if value is None:
      raise UserError(
        f"data.name={data.name}: is not here to be counted; give --{flag}"
      )
  if _FIND_BATCH.value:
    say = lambda line: print(line, file=sys.stderr, flush=True)
    result = find_batch(config, devices, known, say)
  else:
    result = plan(config, devices, known)
  result |= {
    "topology": _TOPOLOGY.value,
    "command": shlex.join(
      ["python", "-m", "convmixer_jax.plan", *sys.argv[1:]]
    ),
    **runtime.provenance(),
  }
  if devices[0].platform == "tpu":
    *_, build = devices[0].client.platform_version.splitlines()
    result["versions"]["libtpu"] = build
  print(json.dumps(result, indent=2) if _JSON.value else report(result))
  if not result["fits"]:
    sys.exit(1)


def open_topology(name: str | None) -> Sequence[Any]:
  """The devices of 'v5e:4x4' or 'cpu:8', or for None those of this machine.

  To be called before anything else uses JAX, which from then on computes on the
  CPU alone unless `name` is None.

  Raises:
    UserError: there is no such topology, or no compiler for it.
  """
  if name is None:
    return jax.devices()
  kind, _, shape = name.partition(":")
  known = ", ".join(_KINDS)
  pattern = rf"cpu:[1-9]\d*|({'|'.join(_KINDS)}):[1-9]\d*(x[1-9]\d*)*"
  count = math.prod(map(int, re.findall(r"\d+", shape)))
  if not re.fullmatch(pattern, name) or count > _MOST_DEVICES:
    raise UserError(
      f"--topology={name}: must be cpu:8, or one of {known} and the number of"
      f" chips along each axis, as in v5e:4x4; at most {_MOST_DEVICES:,}"
    )
  jax.config.update("jax_platforms", "cpu")
  if kind == "cpu":
    jax.config.update("jax_num_cpu_devices", int(shape))
    return jax.devices()
  if (
    importlib.util.find_spec("libtpu") is None
    and "TPU_LIBRARY_PATH" not in os.environ
  ):
    raise UserError(
      f"--topology={name}: libtpu compiles for it, and is not installed; pip"
      f' install "jax[tpu]=={jax.__version__}"'
    )
  # There is no chip whose owner libtpu must be, no host to ask about it, and
  # nothing to log about that.
  os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="",
    TPU_HOST_BOUNDS="1,1,1",
    TPU_LOG_DIR="disabled",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
  )
  more = {"chip_config_name": "megacore"} if kind == "v4" else {}
  if count == 1:
    more["chips_per_host_bounds"] = [1, 1, 1]
  try:
    return topologies.get_topology_desc(name, platform="tpu", **more).devices
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    raise UserError(f"--topology={name}: {str(e).splitlines()[0]}") from e


def plan(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
) -> dict[str, Any]:
  """Compiles a run's train step and reads the program.

  Args:
    config: of the run.
    devices: of `open_topology`, or real ones.
    data: the training split; nothing in it is None.

  Returns:
    What `--json` prints but for where it comes from. Sizes, FLOPs and times are
    those of one device and one step. Values that the program does not tell
    (all, if it does not fit) or that the chip is not known for are None.

  Raises:
    UserError: something in `config` is not as it must be.
  """
  model, state, batch, traced = trace_step(config, devices, data)
  batch_size, size = config.batch_size, config.data.image_size
  count = len(devices)
  chip = CHIPS.get(devices[0].device_kind)
  available = _available(devices[0], chip, count)
  # Replicated, but for the batch.
  memory = {
    "parameters": _num_bytes(state.params),
    "batch_stats": _num_bytes(state.batch_stats),
    "ema": _num_bytes(state.ema),
    "optimizer": _num_bytes(state.opt_state),
    "batch": _num_bytes(batch) // count,
  }
  flops = _flops(traced.jaxpr.jaxpr) // count
  start = time.perf_counter()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    compiled, needed = None, _needed(str(e))
  else:
    analysis = compiled.memory_analysis()
    memory["program"] = analysis.generated_code_size_in_bytes
    needed = (
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      - analysis.alias_size_in_bytes
      + analysis.temp_size_in_bytes
      + memory["program"]
    )
  if needed is not None:
    memory["activations"] = needed - sum(memory.values())
  compile_seconds = time.perf_counter() - start
  fits = compiled is not None and (available is None or needed <= available)
  program = compiled and hlo.Program(compiled.as_text())
  result = {
    "model": config.model.name,
    "dim": model.dim,
    "depth": model.depth,
    "patch_size": model.patch_size,
    "kernel_size": model.kernel_size,
    "dtype": jnp.dtype(model.dtype).name,
    "norm": model.norm,
    "bn_group_size": model.bn_group_size,
    "scan": model.scan,
    "remat": model.remat,
    "device": devices[0].device_kind,
    "num_devices": count,
    "batch_size": batch_size,
    "accum_steps": config.accum_steps,
    "num_images": data.size,
    "epochs": config.epochs,
    "steps": -(-config.epochs * data.size // batch_size),
    "compile_seconds": round(compile_seconds, 1),
    "fits": fits,
    "memory_available_bytes": available,
    "memory_bytes": needed,
    "memory_split_bytes": memory,
    "flops": flops,
    "model_flops": 3 * models.forward_flops(model, size) * batch_size // count,
    "bytes": program and program.bytes(),
    "collectives": program and _by_cause(program.collectives()),
  }
  return result | _bounds(result, program, chip)


def trace_step(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
) -> tuple[models.ConvMixer, step_lib.TrainState, dict[str, Any], Any]:
  """Traces a run's train step; see `plan` for the arguments and errors.

  Returns:
    The model, the shapes of its state and of a batch, and the traced step,
    which lowers for the devices.
  """
  config_lib.check(config, len(devices))
  mesh = sharding.make_mesh(devices)
  model, shapes = train.make_model(config, data.num_classes)
  tx, _ = train.make_optimizer(config, shapes, data.size)
  state = jax.eval_shape(lambda: train.init_state(config, model, tx, mesh))
  batch = train.batch_shapes(config, mesh)
  crop = data.in_memory(config.data.image_size)
  step = train.jit_update(config, model, tx, mesh, crop=crop)
  seed = jax.ShapeDtypeStruct((), np.uint32)
  on_cpu = devices[0].platform == "cpu"
  with contextlib.nullcontext() if on_cpu else ops.portable():
    return model, state, batch, step.trace(seed, state, batch)


def _num_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _available(device, chip, count):
  """Bytes for one device; host devices share the machine's memory."""
  if chip is not None:
    return chip.memory
  if device.platform == "cpu":
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // count
  return (device.memory_stats() or {}).get("bytes_limit")


def _needed(message: str) -> int | None:
  """'... required for HLO temporaries (16.85G) exceeds ...' -> bytes."""
  match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
  return match and int(float(match[1]) * 2 ** (10 * " KMGT".index(match[2])))


def _flops(jaxpr) -> int:
  """Of all products and convolutions, as often as they run; all devices'."""
  total, used = 0, {v for v in jaxpr.outvars if isinstance(v, jax_core.Var)}
  for eqn in reversed(jaxpr.eqns):
    if used.isdisjoint(eqn.outvars):
      continue  # As jax.vjp leaves them; XLA drops them too.
    used.update(v for v in eqn.invars if isinstance(v, jax_core.Var))
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * out * math.prod(lhs[axis] for axis in contracted)
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      _, inputs, *space = eqn.params["dimension_numbers"].rhs_spec
      total += 2 * out * math.prod(kernel[axis] for axis in (inputs, *space))
    else:
      inner = [
        _flops(getattr(x, "jaxpr", x))
        for x in jax.tree.leaves(
          list(eqn.params.values()),
          is_leaf=lambda x: isinstance(
            x, (jax_core.Jaxpr, jax_core.ClosedJaxpr)
          ),
        )
        if isinstance(x, (jax_core.Jaxpr, jax_core.ClosedJaxpr))
      ]
      if eqn.primitive.name == "cond":
        # The same for each platform; where it is C++, none are to be seen.
        total += max(inner)
      else:
        total += eqn.params.get("length", 1) * sum(inner)
  return total


def _by_cause(collectives):
  """[{cause, kind, exchanges, ...}] of a step; most bytes first.

  Arrays of several causes may travel in one exchange, which counts for each.
  """
  rows = {}
  for c in collectives:
    row = rows.setdefault(
      (_cause(c.op_name), c.kind),
      {"exchanges": {}, "arrays": 0, "bytes": 0, "sent_bytes": 0.0},
    )
    row["exchanges"][c.name] = c.runs
    row["arrays"] += c.runs
    row["bytes"] += c.runs * c.bytes
    row["sent_bytes"] += c.runs * c.sent_bytes
  rows = [
    {
      "cause": cause,
      "kind": kind,
      **row,
      "exchanges": sum(row["exchanges"].values()),
      "sent_bytes": round(row["sent_bytes"]),
    }
    for (cause, kind), row in rows.items()
  ]
  return sorted(rows, key=lambda row: -row["bytes"])


def _cause(op_name: str) -> str:
  """What an exchange is for, by the name of the operation it comes from."""
  for text, cause in (
    (f"/{ops.STATISTICS}/", "BatchNorm statistics"),
    (f"/{ops.AVERAGES}/", "BatchNorm running averages"),
    ("/augment/", "augmentation"),
    ("/microbatches/", "microbatches"),
    ("transpose(", "gradients"),
    ("metrics", "metrics"),
  ):
    if text in op_name:
      return cause
  return op_name or "unknown"


def _bounds(result, program, chip):
  """Seconds a step and hours a run; None without a program or a known chip."""
  if program is None or chip is None:
    return {"seconds": None, "hours": None}
  sent = sum(row["sent_bytes"] for row in result["collectives"])
  bounds = {
    "arithmetic": result["flops"] / chip.flops,
    "memory": result["bytes"] / chip.bandwidth,
    "interconnect": sent / chip.interconnect,
  }
  seconds = {"at_best": max(bounds.values())}
  if cycles := program.cycles():  # Which exchanges have none of.
    cost = cycles / chip.clock + bounds["interconnect"]
    seconds["compiler_estimate"] = cost
  return {
    "seconds": bounds | seconds,
    "hours": {k: v * result["steps"] / 3600 for k, v in seconds.items()},
  }


def find_batch(
  config: ml_collections.ConfigDict,
  devices: Sequence[Any],
  data: sources.Description,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """The plan of the largest batch size that fits, to the unit or within 2 %.

  Sizes are tried whose BatchNorm groups, microbatches and mixing groups are
  whole on every device, on the assumption that larger ones need more memory.

  Args:
    config: of the run; the search begins at its batch size.
    devices: see `plan`.
    data: likewise.
    say: gets a line for each size that is tried.

  Returns:
    What `plan` does, and `tried`: [{batch_size, fits, memory_bytes}].

  Raises:
    UserError: none fits.
  """
  group = config.model.bn_group_size or 1
  unit = math.lcm(
    len(devices) * config.accum_steps * group,
    config.augment.mix_group_size or 1,
  )
  largest = data.size // unit
  if not largest:
    raise UserError(
      f"--find_batch: batches are multiples of {unit:,} images here, and there"
      f" are only {data.size:,}"
    )
  say(f"batch sizes are multiples of {unit:,} here")
  guess = min(max(config.batch_size // unit, 1), largest)
  low, high = 0, largest + 1  # Fits, does not fit: in units.
  best, tried, estimate = None, [], None
  while high - low > max(1, low // 64):
    config = copy.deepcopy(config)
    config.batch_size = guess * unit
    result = plan(config, devices, data)
    tried.append({k: result[k] for k in ("batch_size", "fits", "memory_bytes")})
    say(
      f"batch_size={guess * unit:,}: {_fits(result)}; compiled in"
      f" {result['compile_seconds']:.0f} s"
    )
    if result["fits"]:
      low, best = guess, result
    else:
      high = guess
    # What the batch takes, beside what does not depend on it, is nearly
    # proportional to it; bisection is for when that leads nowhere.
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
      f"--find_batch: not even batch_size={unit:,}: {_fits(result)}; try"
      " --config.model.remat=nothing_saveable with --config.model.scan=true, or"
      " more devices"
    )
  return best | {"tried": tried}


def _fits(result):
  needed, available = (
    "an unknown number of" if n is None else f"{n / GIB:.2f}"
    for n in (result["memory_bytes"], result["memory_available_bytes"])
  )
  fits = "fits" if result["fits"] else "does not fit"
  return f"{fits}, {needed} of {available} GiB"


def report(result: dict[str, Any]) -> str:
  """Lines for a reader, of what `plan` returns."""
  group = result["bn_group_size"]
  norm = f"groups of {group} images" if group else "the whole batch"
  norm = "LayerNorm" if result["norm"] == "layer" else f"BatchNorm over {norm}"
  how = ["scanned"] * result["scan"] + [result["remat"]]
  how = "".join(f", {x}" for x in how if x)
  per_device = result["batch_size"] // result["num_devices"]
  lines = [
    f"ConvMixer-{result['dim']}/{result['depth']}, patch"
    f" {result['patch_size']}, kernel {result['kernel_size']},"
    f" {result['dtype']}, {norm}{how}",
    f"{result['num_devices']:,} x {result['device']}, batch"
    f" {result['batch_size']:,}: {per_device:,} images a device",
    "",
    f"memory a device: {_fits(result)}",
  ]
  row = lambda name, text: lines.append(f"  {name:27} {text}")
  split = result["memory_split_bytes"]
  for key, name in _PARTS.items():
    if split.get(key):
      row(name, _quantity(split[key], "B", binary=True))
  lines.append("a step of a device:")
  row(
    "arithmetic",
    f"{_quantity(result['flops'], 'FLOP')}; 3 times the forward pass is"
    f" {_quantity(result['model_flops'], 'FLOP')}",
  )
  if result["bytes"] is not None:
    row("memory traffic", _quantity(result["bytes"], "B"))
    for exchange in result["collectives"]:
      row(
        exchange["cause"],
        f"{_quantity(exchange['bytes'], 'B')}, {exchange['arrays']:,} arrays in"
        f" {exchange['exchanges']:,} {exchange['kind']}",
      )
    if not result["collectives"]:
      row("exchanged", "nothing")
  run = f"{result['steps']:,} steps, {result['epochs']:,} epochs"
  seconds, hours = result["seconds"], result["hours"]
  if seconds is None:
    return "\n".join([*lines, f"the run: {run}"])
  rate = result["batch_size"] / seconds["at_best"]
  lines += [
    f"at best: {_duration(seconds['at_best'])} a step, {rate:,.0f} images/s;"
    f" the run, {run}: {hours['at_best']:.1f} hours"
  ]
  for name in ("arithmetic", "memory", "interconnect"):
    row(name, _duration(seconds[name]))
  if "compiler_estimate" in seconds:
    lines.append(
      "by the compiler's own estimates:"
      f" {_duration(seconds['compiler_estimate'])} a step; the run:"
      f" {hours['compiler_estimate']:.1f} hours"
    )
  return "\n".join(lines)


_PARTS = {
  "parameters": "parameters",
  "batch_stats": "BatchNorm's averages",
  "ema": "moving averages",
  "optimizer": "optimiser",
  "batch": "images",
  "activations": "activations and the rest",
  "program": "program",
}


def _quantity(value, unit, binary=False):
  """12345678, 'B' -> '12.35 MB', or '11.77 MiB'."""
  base = 1024 if binary else 1000
  power = next(n for n in range(7) if abs(value) < base ** (n + 1))
  prefix = ("", "k", "M", "G", "T", "P", "E")[power]
  if binary and power:
    prefix = prefix.upper() + "i"
  return f"{value / base**power:.4g} {prefix}{unit}"


def _duration(seconds):
  """0.01234 -> '12.3 ms'."""
  power = next((n for n in range(3) if seconds * 1000**n >= 1), 2)
  return f"{seconds * 1000**power:.3g} {('s', 'ms', 'us')[power]}"


if __name__ == "__main__":
  cli.run(main, _FLAGS)
