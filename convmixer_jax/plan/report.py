"""A plan as text."""

from typing import Any

from convmixer_jax.plan import gpus

_PARTS = {
  "parameters": "parameters",
  "batch_stats": "BatchNorm's averages",
  "ema": "moving averages",
  "optimizer": "optimiser",
  "batch": "images",
  "activations": "activations and the rest",
  "program": "program",
}


def report(result: dict[str, Any]) -> str:
  """The text that the command prints for the result of `plan.plan`."""
  model, dtype = result["description"], result["dtype"]
  group = result["bn_group_size"]
  group = f"groups of {group} images" if group else "the whole batch"
  norms = {"batch": f"BatchNorm over {group}", "layer": "LayerNorm"}
  norm = norms.get(result["norm"])
  scan = "scanned" if result["scan"] else None
  details = filter(None, (model, dtype, norm, scan, result["remat"]))
  per_device = result["batch_size"] // result["num_devices"]
  lines = [
    ", ".join(details),
    f"{result['num_devices']:,} x {result['device']}, batch"
    f" {result['batch_size']:,}: {per_device:,} images a device",
    "",
    f"memory a device: {fit(result)}",
  ]
  row = lambda name, text: lines.append(f"  {name:27} {text}")
  for key, name in _PARTS.items():
    if size := result["memory_split_bytes"].get(key):
      row(name, _quantity(size, "B", 1024))
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
  if (result.get("topology") or "").partition(":")[0] in gpus.GPUS:
    lines.append(
      "cuDNN, cuBLAS and Triton choose their algorithms on the machine itself:"
      " their workspaces and times may differ"
    )
  if seconds is None:
    return "\n".join([*lines, f"the run: {run}"])
  rate = result["batch_size"] / seconds["at_best"]
  lines.append(
    f"at best: {_duration(seconds['at_best'])} a step, {rate:,.0f} images/s;"
    f" the run, {run}: {long_time(hours['at_best'])}"
  )
  for name in ("arithmetic", "memory", "interconnect"):
    row(name, _duration(seconds[name]))
  if "compiler_estimate" in seconds:
    lines.append(
      "by the compiler's own estimates:"
      f" {_duration(seconds['compiler_estimate'])} a step; the run:"
      f" {long_time(hours['compiler_estimate'])}"
    )
    if seconds.get("kernels"):
      row("kernels, by their schedule", _duration(seconds["kernels"]))
  return "\n".join(lines)


def fit(result: dict[str, Any]) -> str:
  """'fits, 9.22 of 15.75 GiB' for the result of `plan.plan`."""
  needed, available = (
    "unknown" if n is None else f"{n / 2**30:.2f}"
    for n in (result["memory_bytes"], result["memory_available_bytes"])
  )
  fits = "fits" if result["fits"] else "does not fit"
  return f"{fits}, {needed} of {available} GiB"


def _quantity(value, unit, base=1000):
  """12345678, 'B' -> '12.35 MB'; in base 1024 '11.77 MiB'."""
  power = next(n for n in range(7) if abs(value) < base ** (n + 1))
  prefix = ("", "k", "M", "G", "T", "P", "E")[power]
  if base == 1024 and power:
    prefix = prefix.upper() + "i"
  return f"{value / base**power:.4g} {prefix}{unit}"


def _duration(seconds):
  """0.01234 -> '12.3 ms'."""
  power = next((n for n in range(3) if seconds * 1000**n >= 1), 2)
  return f"{seconds * 1000**power:.3g} {('s', 'ms', 'us')[power]}"


def long_time(hours: float) -> str:
  """0.05 -> '3.0 minutes'."""
  for factor, unit in ((1, "hours"), (60, "minutes")):
    if factor * hours >= 1:
      return f"{factor * hours:,.1f} {unit}"
  return f"{3600 * hours:.1f} seconds"
