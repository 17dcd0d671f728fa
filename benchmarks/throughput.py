"""Images per second of a model or of one of its stages, beside PyTorch.

  python -m benchmarks.throughput --model convmixer_256_8 --patch_size 2 \\
      --kernel_size 5 --image_size 32 --num_classes 10 --batch 64 \\
      --mode train --against torch
  python -m benchmarks.throughput --model convmixer_1536_20 --batch 4 \\
      --mode infer --dtype bfloat16 --json

Images and weights are random. A training step is forward, backward, clipping,
AdamW and BatchNorm's update, without augmentation. With --against torch,
PyTorch does the same work on the same arrays in the same rounds: both memory
formats, eager and under torch.compile. Of these, the ways that take twice as
long as the best in the first round are dropped. Models other than ConvMixer are
timm's. The benchmark fails if the results of both sides do not agree.
"""

import contextlib
import functools
import json
import operator
from pathlib import Path
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from benchmarks import layers
from benchmarks import work
from convmixer_jax import cli
from convmixer_jax import models
from convmixer_jax.errors import UserError

WAYS = ("contiguous", "channels_last", "contiguous compiled",
        "channels_last compiled")  # fmt: skip
_WARMUP = 3  # Rounds that are not counted, while allocators settle.
_PAUSE = 0.3  # Seconds in which the threads of the other side go to sleep.
_MOST_LAYERS = 40  # In the output of --profile.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}

_FLAGS = cli.Flags()
_MODEL = benchmarks.define_model(_FLAGS)
_MODE = _FLAGS.enum(
  "mode",
  "What to time: --mode infer. The last three are single stages of a block: the"
  " depthwise convolution, both of its gradients, and the pointwise"
  " convolution with bias and GELU.",
  "train",
  enum_values=work.MODES,
)
_IMPLEMENTATION = _FLAGS.enum(
  "implementation",
  "Implementation of our operations: --implementation xla is plain Flax.",
  enum_values=["auto", "xla", "shift", "native"],
)
_AGAINST = _FLAGS.enum(
  "against",
  "--against torch also times PyTorch, alternating with ours.",
  enum_values=["torch"],
)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)
_PROFILE = _FLAGS.string(
  "profile",
  "Folder for a trace of three more runs, for TensorBoard or Perfetto:"
  " --profile /tmp/trace. Also prints the layers that take longest.",
)


def main() -> None:
  """Runs what the flags say; see --help."""
  model, batch, size = _MODEL(implementation=_IMPLEMENTATION.value)
  run, arrays, flops = work.make_work(_MODE.value, model, batch, size)
  result = np.asarray(jax.tree.leaves(jax.block_until_ready(run()))[0])

  timed = functools.partial(
    benchmarks.by_turns, timer=operator.call, pause=_PAUSE
  )
  timers = {"ours": functools.partial(benchmarks.seconds, run)}
  versions = {}
  with contextlib.ExitStack() as stack:
    if _AGAINST.value:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      peer = _start_peer(Path(folder), model, arrays, size)
      stack.callback(peer.kill)
      versions = json.loads(_answer(peer))
      _check(Path(folder), result, TOLERANCE[jnp.dtype(model.dtype).name])
      timers |= {way: lambda way=way: float(_answer(peer, way)) for way in WAYS}
      first = timed(timers, 1, warmup=0)
      timers = {way: timers[way] for way in _fast_enough(first)}
    times = timed(timers, _REPEATS.value, warmup=_WARMUP)
  rows = {
    way: {
      "seconds": benchmarks.summary(values),
      "images_per_second": benchmarks.digits(batch / np.median(values)),
      "gflop_per_second": benchmarks.digits(flops / np.median(values) / 1e9),
    }
    for way, values in times.items()
  }
  record = {
    "mode": _MODE.value,
    "model": benchmarks.title(model),
    "batch": batch,
    "image_size": size,
    "repeats": _REPEATS.value,
    "rows": rows,
  }
  if _AGAINST.value:
    best = min(
      (way for way in times if way != "ours"),
      key=lambda way: np.median(times[way]),
    )
    ratios = np.divide(times[best], times["ours"])
    ratio = np.median(times[best]) / np.median(times["ours"])
    record["faster_way"] = best
    record["ratio"] = benchmarks.digits(ratio)
    record["ratio_of_each_repeat"] = benchmarks.summary(ratios)
  if _PROFILE.value:
    ms = layers.milliseconds(run, _PROFILE.value)
    record["milliseconds_of_layers"] = {
      name: benchmarks.digits(ms[name]) for name in [*ms][:_MOST_LAYERS]
    }
  record |= benchmarks.provenance() | versions
  if _JSON.value:
    print(json.dumps(record, indent=2))
  else:
    _print_table(record)


def _fast_enough(times):
  """Ours, and PyTorch's ways that take less than twice the time of its best."""
  best = min(times[way] for way in WAYS)
  return [way for way in times if way == "ours" or times[way] < 2 * best]


def _start_peer(folder, model, arrays, image_size):
  """Starts `torch_peer` on the same arrays."""
  # Imported here, since it needs safetensors, which not every machine has.
  from convmixer_jax import interop

  arrays = dict(arrays)
  if variables := arrays.pop("variables", None):
    weights = interop.to_torch(variables)
    arrays |= {f"w.{name}": value for name, value in weights.items()}
  settings = {
    "mode": _MODE.value,
    "dtype": jnp.dtype(model.dtype).name,
    "ways": WAYS,
  }
  if isinstance(model, models.ConvMixer):
    settings["activation"] = model.activation
    settings["sizes"] = [model.dim, model.depth, model.patch_size,
                         model.kernel_size, model.num_classes]  # fmt: skip
  else:
    settings["timm"] = _timm_model(model, image_size)
  (folder / "work.json").write_text(json.dumps(settings), "utf-8")
  np.savez(folder / "work.npz", **arrays)
  return subprocess.Popen(
    # By path: as a module it would import this package, and with it jax.
    [sys.executable, "-P", Path(__file__).with_name("torch_peer.py"), folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _timm_model(model, image_size):
  """timm's name for a model, and the arguments that make it."""
  name = _FLAGS["model"].value
  if isinstance(model, models.mobilenet_v3.MODEL):
    raise UserError(f"--against=torch: {name} has no counterpart in timm")
  own = models.create_model(
    name,
    model.num_classes,
    dtype=model.dtype,
    implementation=getattr(model, "implementation", None),
  )
  if model != own:
    raise UserError(f"--against=torch: omit --patch_size; {name} has its own")
  options = {"num_classes": model.num_classes}
  if model.patch_size is not None:
    options["img_size"] = image_size
  return name, options


def _answer(peer, way=None):
  if way is not None:
    print(way, file=peer.stdin, flush=True)
  if line := peer.stdout.readline():
    return line
  raise UserError(
    "--against=torch: PyTorch's process failed; see its messages above"
  )


def _check(folder, ours, tolerance):
  for way in WAYS:
    theirs = np.load(folder / f"{way}.npy")
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error <= tolerance:
      raise RuntimeError(
        f"PyTorch, {way}: results differ by {error:.1e} of the largest value;"
        f" at most {tolerance:.0e} is expected"
      )


def _print_table(record):
  print(f"{record['mode']}, {record['model']}, batch {record['batch']}")
  columns = ("images/s", "ms", "min", "max", "GFLOP/s")
  print(" " * 24 + "".join(f"{column:>10}" for column in columns))
  for way, row in record["rows"].items():
    ms = [1e3 * value for value in row["seconds"].values()]
    values = (row["images_per_second"], *ms, row["gflop_per_second"])
    print(f"{way:24}" + "".join(f"{value:10.4g}" for value in values))
  if "ratio" in record:
    spread = record["ratio_of_each_repeat"]
    print(
      f"ours over PyTorch's {record['faster_way']}: {record['ratio']:.3g}"
      f" ({spread['least']:.3g} to {spread['greatest']:.3g})"
    )
  for name, ms in record.get("milliseconds_of_layers", {}).items():
    print(f"{ms:10.4g} ms  {name}")


if __name__ == "__main__":
  cli.run(main, _FLAGS)
