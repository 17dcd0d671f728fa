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
timm's. In bfloat16, PyTorch's models run under autocast or with weights of
bfloat16, whichever is faster when it is not compiled. The benchmark fails if
the results of both sides do not agree.
"""

import contextlib
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from benchmarks import layers
from benchmarks import peer as peer_lib
from benchmarks import work
from convmixer_jax import cli
from convmixer_jax import models
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError
from convmixer_jax.ops import native

_OURS = "ours"  # The row of the first of --implementation.
_WARMUP = 3  # Rounds that are not counted, while allocators settle.
_LEAST = 0.1  # Seconds; on accelerators shorter work is timed several times.
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
_IMPLEMENTATION = _FLAGS.words(
  "implementation",
  "Implementations of our operations, of which the first is compared with"
  " PyTorch: --implementation auto,xla. Of"
  f" {', '.join(native.IMPLEMENTATIONS)}; xla is plain Flax. --implementation"
  " all is auto and all others that this platform has.",
  "auto",
)
_AGAINST = peer_lib.define_against(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)
_OUT = benchmarks.define_out(_FLAGS)
_PROFILE = _FLAGS.string(
  "profile",
  "Folder for a trace of three more runs, for TensorBoard or Perfetto:"
  " --profile /tmp/trace. Also prints the layers that take longest.",
)


def main() -> None:
  """Runs what the flags say; see --help."""
  peer_lib.share_gpu(_AGAINST.value)
  names = _implementations()
  works = {}
  for way, name in names.items():
    own = None if name == "auto" else name  # None suits all families.
    model, batch, size = _MODEL(implementation=own)
    works[way] = work.make_work(_MODE.value, model, batch, size)
  _, arrays, flops = works[_OURS]
  rows = {}
  record = {
    "mode": _MODE.value,
    "model": benchmarks.title(model),
    "batch": batch,
    "image_size": size,
    "repeats": _REPEATS.value,
    "rows": rows,
  } | benchmarks.provenance()
  timers, results = {}, {}

  def add(way, make):
    """Prepares one way to do the work; its speed so far goes to --out."""
    try:
      results[way], facts, timers[way] = make()
      rows[way] = facts | {"difference": _difference(results, way)}
      if _OUT.value:
        times = [timers[way]() for _ in range(3)]
        rows[way] |= _speed(times, batch, flops)
    except Exception as e:  # Of a compiler, or out of memory.
      if way == _OURS:
        raise
      timers.pop(way, None)
      rows[way] = {"failed": first_line(e)[:300]}
    benchmarks.save(record, _OUT.value, complete=False)

  with contextlib.ExitStack() as stack:
    add(_OURS, functools.partial(_make_ours, works[_OURS][0]))
    if peer := peer_lib.start(_AGAINST.value):
      stack.enter_context(peer)
      record |= peer.facts
      peer.load(*_work_of_peer(model, arrays, size))
      for way in peer_lib.WAYS:
        add(way, functools.partial(_make_theirs, peer, way))
    for way in [*works][1:]:  # Last: some compile for minutes.
      add(way, functools.partial(_make_ours, works[way][0]))
    timed = functools.partial(
      benchmarks.by_turns, timer=operator.call, pause=peer_lib.pause(peer)
    )
    if peer:
      kept = _fast_enough(timed(timers, 1, warmup=0))
      for way in timers.keys() - kept:
        rows[way]["dropped"] = True
      timers = {way: timers[way] for way in kept}
    times = timed(timers, _REPEATS.value, warmup=_WARMUP)
  for way, values in times.items():
    rows[way] |= _speed(values, batch, flops)
  if best := min(
    (way for way in times if way in peer_lib.WAYS),
    key=lambda way: np.median(times[way]),
    default=None,
  ):
    ratios = np.divide(times[best], times[_OURS])
    ratio = np.median(times[best]) / np.median(times[_OURS])
    record["faster_way"] = best
    record["ratio"] = benchmarks.digits(ratio)
    record["ratio_of_each_repeat"] = benchmarks.summary(ratios)
  if _PROFILE.value:
    ms = layers.milliseconds(works[_OURS][0], _PROFILE.value)
    record["milliseconds_of_layers"] = {
      name: benchmarks.digits(ms[name]) for name in [*ms][:_MOST_LAYERS]
    }
  benchmarks.save(record, _OUT.value)
  if _JSON.value:
    print(json.dumps(record, indent=2))
  else:
    _print_table(record)
  _check(rows, TOLERANCE[jnp.dtype(model.dtype).name])


def _implementations():
  """Name of a row -> the implementation of our operations in it."""
  names = _IMPLEMENTATION.value
  if names == ["all"]:
    auto = models.operations(_MODEL()[0])
    names = [
      "auto",
      *(n for n in benchmarks.implementations_here() if n != auto),
    ]
  for name in names:
    if name not in native.IMPLEMENTATIONS:
      raise UserError(
        f"--implementation={name}: must be all, or of"
        f" {', '.join(native.IMPLEMENTATIONS)}"
      )
  return {_OURS: names[0], **{f"{_OURS}, {name}": name for name in names[1:]}}


def _make_ours(run):
  """The first result, what to record, and a function that times a call."""
  result = np.asarray(jax.tree.leaves(jax.block_until_ready(run()))[0])
  calls = _calls(lambda: benchmarks.seconds(run))
  return result, {}, lambda: benchmarks.seconds(run, calls)


def _make_theirs(peer, way):
  answer, results = peer.make(way)
  if "error" in answer:
    raise RuntimeError(answer["error"])
  calls = _calls(lambda: peer.seconds(way))
  return results[0], answer, lambda: peer.seconds(way, calls)


def _calls(timer):
  """How many calls to time at once, so that Python's part does not count."""
  if jax.default_backend() == "cpu":
    return 1
  return max(1, int(_LEAST / timer()))


def _speed(times, batch, flops):
  return {
    "seconds": benchmarks.summary(times),
    "images_per_second": benchmarks.digits(batch / np.median(times)),
    "gflop_per_second": benchmarks.digits(flops / np.median(times) / 1e9),
  }


def _fast_enough(times):
  """Ours, and PyTorch's ways that take less than twice the time of its best."""
  theirs = [times[way] for way in times if way in peer_lib.WAYS]
  return [
    way
    for way in times
    if way not in peer_lib.WAYS or times[way] < 2 * min(theirs)
  ]


def _work_of_peer(model, arrays, image_size):
  """The arguments of `Peer.load`."""
  # Imported here, since it needs safetensors, which not every machine has.
  from convmixer_jax import interop

  arrays = dict(arrays)
  if variables := arrays.pop("variables", None):
    weights = interop.to_torch(variables)
    arrays |= {f"w.{name}": value for name, value in weights.items()}
  settings = {"mode": _MODE.value, "dtype": jnp.dtype(model.dtype).name}
  if isinstance(model, models.ConvMixer):
    settings["activation"] = model.activation
    settings["sizes"] = [model.dim, model.depth, model.patch_size,
                         model.kernel_size, model.num_classes]  # fmt: skip
  else:
    settings["timm"] = _timm_model(model, image_size)
  return settings, arrays


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


def _difference(results, way):
  """From our result, relative to its largest value."""
  ours = results[_OURS].astype(np.float32)
  difference = np.abs(results[way].astype(np.float32) - ours).max()
  return benchmarks.digits(difference / np.abs(ours).max())


def _check(rows, tolerance):
  """Raises RuntimeError unless all ways gave the same result."""
  for way, row in rows.items():
    if not row.get("difference", 0) <= tolerance:
      raise RuntimeError(
        f"{way}: the result differs from ours by {row['difference']:.1e} of the"
        f" largest value; at most {tolerance:.0e} is expected"
      )


def _print_table(record):
  print(f"{record['mode']}, {record['model']}, batch {record['batch']}")
  columns = ("images/s", "ms", "min", "max", "GFLOP/s")
  print(" " * 24 + "".join(f"{column:>10}" for column in columns))
  for way, row in record["rows"].items():
    if "seconds" not in row:
      if "failed" in row:
        print(f"{way:24}  failed: {row['failed']}")
      continue
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
