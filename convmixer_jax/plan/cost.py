"""What a train step costs: FLOPs, communication and lower bounds of time."""

from collections.abc import Iterable
import math
from typing import Any

from jax.extend import core

from convmixer_jax import ops
from convmixer_jax.plan import hlo
from convmixer_jax.plan import topology

# A text in an operation's path -> the cause of its exchange; first match wins.
_CAUSES = (
  (f"/{ops.STATISTICS}/", "BatchNorm statistics"),
  (f"/{ops.AVERAGES}/", "BatchNorm running averages"),
  ("/augment/", "augmentation"),
  ("/microbatches/", "microbatches"),
  ("transpose(", "gradients"),
  ("metrics", "metrics"),
)


# Of ops.tpu's kernels, the bundles that libtpu 0.0.42.1 schedules for a v5e: of
# a block, once for 128 channels, and once for a call. A core issues one a
# cycle, in order. They are those of 128 lanes and a window of 384 pixels, as
# all of the paper's models have. Source: python -m benchmarks.tpu_kernels.
BUNDLES = {
  "depthwise_forward": (14_167, 10_112, 5_432),
  "depthwise_forward_relu": (14_692, 10_080, 5_432),
  "depthwise_forward_gelu": (18_728, 10_144, 5_432),
  "depthwise_backward": (25_071, 25_456, 7_848),
  "depthwise_backward_relu": (28_627, 25_664, 10_040),
  "depthwise_backward_gelu": (34_885, 24_128, 10_000),
}


def flops(jaxpr: core.Jaxpr) -> int:
  """FLOPs of all products and convolutions, on all devices together.

  A multiply-add is two. Loops count as often as they run.
  """

  def count(eqn):
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      return _multiply_adds(eqn.outvars[0], eqn.invars[0], contracted)
    if eqn.primitive.name == "conv_general_dilated":
      _, *contracted = eqn.params["dimension_numbers"].rhs_spec
      return _multiply_adds(eqn.outvars[0], eqn.invars[1], contracted)
    return None

  return _total(jaxpr, count)


def kernel_cycles(jaxpr: core.Jaxpr) -> int:
  """Cycles of ops.tpu's kernels, of all devices together; see `BUNDLES`.

  Other chips are assumed to need as many.
  """

  def count(eqn):
    if eqn.primitive.name != "pallas_call":
      return None
    # Without an activation it takes about as long as with ReLU.
    name = eqn.params["name"].replace("identity", "relu")
    block, channels, call = BUNDLES[name]
    *batched, _ = eqn.params["grid_mapping"].grid
    parts = eqn.outvars[0].aval.shape[-1] // 128
    calls = math.prod(batched)
    return _blocks(eqn) * block + calls * (parts * channels + call)

  return _total(jaxpr, count)


def _blocks(eqn):
  """Blocks of the maps of ops.tpu's kernels, in all of a vmap's calls.

  The first and the last step of their grid compute nothing.
  """
  *batched, steps = eqn.params["grid_mapping"].grid
  return math.prod(batched) * (steps - 2)


def _total(jaxpr, count):
  """Sums count(equation) over a program.

  Where that is None, it is the sum of what the equation calls.
  """
  total, used = 0, {v for v in jaxpr.outvars if isinstance(v, core.Var)}
  for eqn in reversed(jaxpr.eqns):
    if used.isdisjoint(eqn.outvars) and not eqn.effects:
      continue  # jax.vjp leaves unused operations, which XLA drops too.
    used.update(v for v in eqn.invars if isinstance(v, core.Var))
    own = count(eqn)
    if own is not None:
      total += own
      continue
    inner = [_total(j, count) for j in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == "cond":
      # The branches are one operation, written for several platforms. Where a
      # branch calls C++, its FLOPs are not visible.
      total += max(inner)
    elif eqn.primitive.name == "pallas_call":
      total += _blocks(eqn) * sum(inner)
    elif eqn.primitive.name == "shard_map":  # What each device does.
      total += eqn.params["mesh"].size * sum(inner)
    else:
      total += eqn.params.get("length", 1) * sum(inner)
  return total


def by_cause(collectives: Iterable[hlo.Collective]) -> list[dict[str, Any]]:
  """Sums up a step's collectives by cause and kind.

  Returns [{cause, kind, exchanges, arrays, bytes, sent_bytes}], most bytes
  first. XLA may merge arrays of several causes into one exchange, which then
  counts for each of them.
  """
  groups = {}
  for c in collectives:
    causes = (cause for text, cause in _CAUSES if text in c.op_name)
    cause = next(causes, c.op_name or "unknown")
    groups.setdefault((cause, c.kind), []).append(c)
  rows = [
    {
      "cause": cause,
      "kind": kind,
      "exchanges": sum({c.name: c.runs for c in group}.values()),
      "arrays": sum(c.runs for c in group),
      "bytes": sum(c.runs * c.bytes for c in group),
      "sent_bytes": round(sum(c.runs * c.sent_bytes for c in group)),
    }
    for (cause, kind), group in groups.items()
  ]
  return sorted(rows, key=lambda row: -row["bytes"])


def step_seconds(
  chip: topology.Chip,
  num_flops: int,
  num_bytes: int,
  collectives: Iterable[dict[str, Any]],
  cycles: int | None,
  kernel_cycles: int = 0,
) -> dict[str, float]:
  """Lower bounds of a step's time by resource, and `at_best`, the largest.

  FLOPs, bytes of memory traffic and `collectives` (see `by_cause`) are of one
  device. `cycles` is the compiler's estimate, which leaves out exchanges and
  kernels; if it is not None, the result has `compiler_estimate` too, and
  `kernels`, the part of it that is theirs.
  """
  sent = sum(row["sent_bytes"] for row in collectives)
  seconds = {
    "arithmetic": num_flops / chip.flops,
    "memory": num_bytes / chip.bandwidth,
    "interconnect": sent / chip.interconnect,
  }
  seconds["at_best"] = max(seconds.values())
  if cycles:
    seconds["kernels"] = kernel_cycles / chip.clock
    estimate = cycles / chip.clock + seconds["kernels"]
    seconds["compiler_estimate"] = estimate + seconds["interconnect"]
  return seconds


def _multiply_adds(output, operand, contracted):
  """FLOPs of a sum of products over the `contracted` axes of `operand`."""
  terms = math.prod(operand.aval.shape[axis] for axis in contracted)
  return 2 * math.prod(output.aval.shape) * terms
