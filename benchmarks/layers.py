"""Where the time of jitted functions goes, by layer of the model."""

import collections
from collections.abc import Callable
import gzip
import json
from pathlib import Path
import re
from typing import Any

import jax

RUNS = 3


def milliseconds(run: Callable[[], Any], folder: str) -> dict[str, float]:
  """Traces a function that has already been compiled.

  Args:
    run: called `RUNS` times.
    folder: gets the trace, for TensorBoard or Perfetto.

  Returns:
    Milliseconds a run, the largest first, of names such as 'backward
    block/mlp/fc/dot_general': the pass, the layer, and jax's operation. Layers
    whose names differ in numbers alone are summed. What XLA fuses has the name
    of the last operation; what it rewrites may have only XLA's name. Operations
    that run at the same time are all counted.
  """
  with jax.profiler.trace(folder, create_perfetto_trace=True):
    for _ in range(RUNS):
      jax.block_until_ready(run())
  traces = Path(folder).rglob("perfetto_trace.json.gz")
  newest = max(traces, key=lambda path: path.stat().st_mtime)
  events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
  names = _names()
  total = collections.Counter()
  for event in events:
    args = event.get("args", {})
    operation = args.get("hlo_op", "")
    # A loop's time is also that of the operations within.
    if operation and not re.match("while|call|conditional", operation):
      name = names.get((args.get("hlo_module"), operation), operation)
      total[name] += event["dur"] / 1e3 / RUNS
  return dict(total.most_common())


def _names() -> dict[tuple[str, str], str]:
  """(module, operation) of all compiled programs -> `milliseconds`' names."""
  names = {}
  for executable in jax.devices()[0].client.live_executables():
    for module in executable.hlo_modules():
      for line in module.to_string().splitlines():
        if match := re.match(
          r'\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]+)"', line
        ):
          names[module.name, match[1]] = _layer(match[2])
  return names


def _layer(op_name: str) -> str:
  """'jit(f)/transpose(jvp(ViT))/block_0/x' -> 'backward block/x'."""
  backward = "transpose(jvp(" in op_name
  parts = [part for part in op_name.split("/") if "(" not in part]
  layer = re.sub(r"_?\d+(?=/|_)", "", "/".join(parts))
  return f"{'backward' if backward else 'forward'} {layer}"
