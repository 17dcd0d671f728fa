"""Images a second of a model or of one of its stages, beside PyTorch's.

  python -m benchmarks.throughput --model convmixer_256_8 --patch_size 2 \\
      --kernel_size 5 --image_size 32 --num_classes 10 --batch 64 \\
      --mode train --against torch
  python -m benchmarks.throughput --model convmixer_1536_20 --batch 4 \\
      --mode infer --dtype bfloat16 --json

Images and weights are random. A train step is forward, backward, clipping,
AdamW and BatchNorm's update, without augmentation. PyTorch runs the same
weights and images in turn with ours, in both memory formats, eager and under
torch.compile, but for ways that take twice as long as its best at first.
Before that, both sides' results must agree.
"""

import contextlib
import functools
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

import benchmarks
from convmixer_jax import cli
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import optim
from convmixer_jax import step as step_lib
from convmixer_jax.errors import UserError

MODES = ("train", "infer", "depthwise", "depthwise_grad", "pointwise")
WAYS = ("contiguous", "channels_last", "contiguous compiled",
        "channels_last compiled")  # fmt: skip
_WARMUP = 3  # Rounds that are not counted: allocators settle.
_PAUSE = 0.3  # Seconds, in which the threads of the other side go to sleep.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}

_FLAGS = flags.FlagValues()
_MODEL = benchmarks.define_model(_FLAGS)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  MODES,
  "The work: --mode infer. The last three are a block's stages alone: the"
  " depthwise convolution, both of its gradients, and the pointwise"
  " convolution with bias and GELU.",
  flag_values=_FLAGS,
)
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation",
  None,
  ["auto", "xla", "shift", "native"],
  "Of our operations: --implementation xla is plain Flax.",
  flag_values=_FLAGS,
)
_AGAINST = flags.DEFINE_enum(
  "against",
  None,
  ["torch"],
  "--against torch measures PyTorch in turn with ours.",
  flag_values=_FLAGS,
)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "Write a trace of three more runs, for TensorBoard or Perfetto:"
  " --profile /tmp/trace.",
  flag_values=_FLAGS,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  model, batch, size = _MODEL(implementation=_IMPLEMENTATION.value)
  run, arrays, flops = make_work(_MODE.value, model, batch, size)
  result = np.asarray(jax.tree.leaves(jax.block_until_ready(run()))[0])

  times = {"ours": []}
  with contextlib.ExitStack() as stack:
    timers = {"ours": lambda: benchmarks.seconds(run, repeats=1, warmup=0)[0]}
    versions = {}
    if _AGAINST.value:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      peer = _start_peer(Path(folder), model, arrays)
      stack.callback(peer.kill)
      versions = json.loads(_answer(peer))
      _check(Path(folder), result, TOLERANCE[jnp.dtype(model.dtype).name])
      for way in WAYS:
        times[way] = []
        timers[way] = lambda way=way: float(_answer(peer, way))
    rounds = range(-_WARMUP, _REPEATS.value)
    for i in rich.progress.track(
      rounds, "measuring", console=rich.console.Console(stderr=True)
    ):
      if i == 1 - _WARMUP:
        times = _in_the_running(times)
      if i == 0:
        times = {way: [] for way in times}
      for way, values in times.items():
        time.sleep(_PAUSE)
        values.append(timers[way]())
  if _PROFILE.value:
    with jax.profiler.trace(_PROFILE.value):
      for _ in range(3):
        jax.block_until_ready(run())

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
    "model": benchmarks.describe(model),
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
  record |= benchmarks.provenance() | versions
  if _JSON.value:
    print(json.dumps(record, indent=2))
  else:
    _print_table(record)


def _in_the_running(times):
  """Without the ways that took twice as long as PyTorch's best just now."""
  last = {way: values[-1] for way, values in times.items()}
  best = min([t for way, t in last.items() if way != "ours"], default=0.0)
  return {
    way: values
    for way, values in times.items()
    if way == "ours" or last[way] < 2 * best
  }


def make_work(mode, model, batch, size):
  """Returns what to time, its inputs by name, and the FLOPs of one call."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  if mode in ("train", "infer"):
    x = normal(batch, size, size, 3)
    variables = benchmarks.random_variables(model, rng)
    labels = rng.integers(0, model.num_classes, batch)
    theirs = interop.to_torch(variables)
    arrays = {f"w.{name}": value for name, value in theirs.items()}
    arrays |= {"x": x, "labels": labels}
    images = jnp.asarray(x)
    tx = make_optimizer(variables["params"])
    flops = batch * models.flops(model, size)
    if mode == "infer":
      apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
      variables = jax.device_put(variables)
      return lambda: apply(variables, images), arrays, flops
    state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32),
      opt_state=tx.init(variables["params"]),
      **jax.tree.map(jnp.asarray, variables),
    )
    step = jax.jit(
      step_lib.make_train_step(model, tx, lambda _, *batch: batch, seed=0),
      donate_argnums=0,
    )
    batch = {"image": images, "label": jnp.asarray(labels)}

    def run():
      nonlocal state
      state, metrics = step(state, batch)
      return metrics["loss"], state

    return run, arrays, 3 * flops

  side, dim, k = size // model.patch_size, model.dim, model.kernel_size
  x = normal(batch, side, side, dim)
  implementation = model.implementation
  locations = batch * side * side
  if mode == "pointwise":
    kernel = normal(dim, dim) / dim**0.5
    bias = normal(dim)
    arrays = {"x": x, "kernel": kernel, "bias": bias}
    norm = ops.BatchNorm(activation="gelu", implementation=implementation)
    variables = norm.init(jax.random.key(0), jnp.asarray(x[:1]), False)
    variables = jax.tree.map(jnp.asarray, variables)

    def stage(x, kernel, bias):
      conv = functools.partial(ops.pointwise_conv, x, kernel)
      return norm.apply(variables, conv, False, bias=bias)

    flops = 2 * locations * dim**2
  else:
    kernel = normal(k, k, dim) / k
    arrays = {"x": x, "kernel": kernel}
    conv = lambda x, kernel: ops.depthwise_conv(
      x, kernel, implementation=implementation
    )
    flops = 2 * locations * dim * k**2
    stage = conv
    if mode == "depthwise_grad":
      arrays["grad"] = normal(*x.shape)
      flops *= 2
      stage = lambda x, kernel, grad: jax.vjp(conv, x, kernel)[1](grad)
  stage = jax.jit(stage)
  inputs = [jnp.asarray(a, model.dtype) for a in arrays.values()]
  return lambda: stage(*inputs), arrays, flops


def make_optimizer(params):
  """The recipe's: AdamW and a clip of the gradient's norm."""
  settings = {
    "weight_decay": 0.01,
    "decay_all": True,
    "eps": 1e-3,
    "betas": (0.9, 0.999),
    "clip_norm": 1.0,
  }
  return optim.make_optimizer(lambda count: 1e-3, params, settings)


def _start_peer(folder, model, arrays):
  """Starts `torch_peer` on the same arrays."""
  work = {
    "mode": _MODE.value,
    "dtype": jnp.dtype(model.dtype).name,
    "activation": model.activation,
    "ways": WAYS,
    "sizes": [model.dim, model.depth, model.patch_size, model.kernel_size,
              model.num_classes],
  }  # fmt: skip
  (folder / "work.json").write_text(json.dumps(work))
  np.savez(folder / "work.npz", **arrays)
  return subprocess.Popen(
    # By path: as a module it would import this package, and so jax.
    [sys.executable, "-P", Path(__file__).with_name("torch_peer.py"), folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _answer(peer, way=None):
  if way is not None:
    print(way, file=peer.stdin, flush=True)
  if line := peer.stdout.readline():
    return line
  raise UserError("--against=torch: it failed; its messages are above")


def _check(folder, ours, tolerance):
  for way in WAYS:
    theirs = np.load(folder / f"{way}.npy")
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error <= tolerance:
      raise RuntimeError(f"{way}: ours differs by {error:.1e} of the largest")


def _print_table(record):
  table = rich.table.Table("", "images/s", "ms", "least", "greatest", "GFLOP/s")
  for way, row in record["rows"].items():
    ms = [f"{1e3 * v:.4g}" for v in row["seconds"].values()]
    table.add_row(way, f"{row['images_per_second']:.4g}", *ms,
                  f"{row['gflop_per_second']:.4g}")  # fmt: skip
  console = rich.console.Console()
  console.print(f"{record['mode']}, {record['model']}, batch {record['batch']}",
                table)  # fmt: skip
  if "ratio" in record:
    spread = record["ratio_of_each_repeat"]
    console.print(
      f"ours over torch's {record['faster_way']}: {record['ratio']:.3g}"
      f" ({spread['least']:.3g} to {spread['greatest']:.3g})"
    )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
