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


def flops(jaxpr: core.Jaxpr) -> int:
  """FLOPs of all products and convolutions, on all devices together.

  A multiply-add is two. Loops count as often as they run.
  """
  total, used = 0, {v for v in jaxpr.outvars if isinstance(v, core.Var)}
  for eqn in reversed(jaxpr.eqns):
    if used.isdisjoint(eqn.outvars):
      continue  # jax.vjp leaves unused operations, which XLA drops too.
    used.update(v for v in eqn.invars if isinstance(v, core.Var))
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += _multiply_adds(eqn.outvars[0], eqn.invars[0], contracted)
    elif eqn.primitive.name == "conv_general_dilated":
      _, *contracted = eqn.params["dimension_numbers"].rhs_spec
      total += _multiply_adds(eqn.outvars[0], eqn.invars[1], contracted)
    else:
      inner = [flops(j) for j in core.jaxprs_in_params(eqn.params)]
      if eqn.primitive.name == "cond":
        # The branches are one operation, written for several platforms. Where
        # a branch calls C++, its FLOPs are not visible.
        total += max(inner)
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
) -> dict[str, float]:
  """Lower bounds of a step's time by resource, and `at_best`, the largest.

  FLOPs, bytes of memory traffic and `collectives` (see `by_cause`) are of one
  device. `cycles` is the compiler's estimate, which leaves out exchanges; if it
  is not None, the result has `compiler_estimate` too.
  """
  sent = sum(row["sent_bytes"] for row in collectives)
  seconds = {
    "arithmetic": num_flops / chip.flops,
    "memory": num_bytes / chip.bandwidth,
    "interconnect": sent / chip.interconnect,
  }
  seconds["at_best"] = max(seconds.values())
  if cycles:
    seconds["compiler_estimate"] = cycles / chip.clock + seconds["interconnect"]
  return seconds


def _multiply_adds(output, operand, contracted):
  """FLOPs of a sum of products over the `contracted` axes of `operand`."""
  terms = math.prod(operand.aval.shape[axis] for axis in contracted)
  return 2 * math.prod(output.aval.shape) * terms
