"""Speed and error of the depthwise convolution's implementations, by shape.

  python -m benchmarks.implementations --json
  python -m benchmarks.implementations --shapes 64x32x32x1536x9 \\
      --dtypes bfloat16,float32 --against available --out op.json

Times all implementations that this platform has, forward and both gradients, on
random numbers. Without --shapes these are maps from a single small image to the
paper's models; the choice of 'auto' is based on the result. Errors are those of
a few channels beside float64, relative to the largest value. Each row also has
two lower bounds of its time: that of reading the inputs and writing the results
once, at the speed of a large copy, and that of the products, at the speed of a
large product of matrices of bfloat16.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import functools
import itertools
import json
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from benchmarks import peer as peer_lib
from convmixer_jax import cli
from convmixer_jax import ops
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

SHAPES = [  # B, H, W, C, k
  (1, 2, 2, 4, 3),
  (1, 8, 8, 3, 3),
  (1, 8, 8, 16, 5),
  (1, 16, 16, 256, 5),
  (1, 32, 32, 768, 7),
  (1, 64, 64, 1, 9),
  (1, 128, 128, 32, 3),
  (8, 32, 32, 256, 1),
  (32, 4, 4, 64, 2),
  (64, 1, 1, 256, 3),
  (64, 8, 8, 128, 9),
  (64, 16, 16, 256, 5),
  (256, 4, 4, 20, 3),
  (8, 32, 32, 768, 7),
]
WORKS = {"forward": "depthwise", "gradients": "depthwise_grad"}
CHECKED = 8  # Channels whose errors are computed.
TOGETHER = 8  # Short convolutions in a program; see `timed_convolution`.
SHORT = 2e-4  # Seconds; a call from Python may take a tenth of that.

_FLAGS = cli.Flags()
_SHAPES = _FLAGS.words(
  "shapes",
  "Batch, height, width, channels and kernel size of each case: --shapes"
  " 64x32x32x768x7,64x16x16x256x5. Default: 14 shapes.",
)
_DTYPES = _FLAGS.words(
  "dtypes", "Data types: --dtypes bfloat16,float32.", "float32"
)
_AGAINST = peer_lib.define_against(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)
_OUT = benchmarks.define_out(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  peer_lib.share_gpu(_AGAINST.value)
  shapes = [*map(_shape, _SHAPES.value)] if _SHAPES.value else SHAPES
  for name in _DTYPES.value:
    if name not in ("float32", "bfloat16"):
      raise UserError(f"--dtypes={name}: must be float32 or bfloat16")
  record = benchmarks.saved(_OUT.value, "rows")
  every = benchmarks.implementations_here()
  rows = [row for row in record.get("rows", ()) if row.keys() >= {*every}]
  known = [[row["dtype"], row["shape"], row["k"], row["work"]] for row in rows]
  largest = max(map(np.prod, (shape[:4] for shape in shapes)))
  record |= {"unit": "microseconds", "rows": rows} | benchmarks.provenance()
  record["rates"] = rates = record.get("rates") or _rates(int(largest))
  with contextlib.ExitStack() as stack:
    if peer := peer_lib.start(_AGAINST.value):
      stack.enter_context(peer)
      record |= peer.facts
    for dtype, (*image, k) in itertools.product(_DTYPES.value, shapes):
      todo = [w for w in WORKS if [dtype, image, k, w] not in known]
      arrays = _arrays(image, k) if todo else {}
      fresh = True  # Whether PyTorch does not have these arrays yet.
      for work in todo:
        row = {"shape": image, "k": k, "dtype": dtype, "work": work}
        row["floors"] = _floors(image, k, dtype, work, rates)
        row |= _measured(arrays, dtype, work, peer, fresh)
        fresh = False
        rows.append(row)
        benchmarks.save(record, _OUT.value, complete=False)
  benchmarks.save(record, _OUT.value)
  if _JSON.value:
    print(json.dumps(record, indent=2))
  else:
    _print_table(rows)


def _shape(text):
  """'64x16x16x256x5' -> (64, 16, 16, 256, 5)."""
  try:
    sizes = [int(word) for word in text.split("x")]
  except ValueError:
    sizes = []
  if len(sizes) != 5 or min(sizes) < 1:
    raise UserError(
      f"--shapes={text}: give batch, height, width, channels and kernel size,"
      " as in 64x16x16x256x5"
    )
  return tuple(sizes)


def _arrays(image, k):
  rng = np.random.default_rng(0)
  normal = functools.partial(rng.standard_normal, dtype=np.float32)
  kernel = normal((k, k, image[-1])) / np.float32(k)
  return {"x": normal(image), "kernel": kernel, "grad": normal(image)}


def _rates(size):
  """Bytes a second of a copy, and FLOP/s of a product of matrices."""
  x = jnp.ones(size, jnp.float32)
  copy = _timed(lambda x: -x, (x,))
  side = 1024 if jax.default_backend() == "cpu" else 8192
  key = jax.random.key(0)
  a, b = jax.random.normal(key, (2, side, side), jnp.bfloat16)
  product = _timed(lambda a, b: a @ b, (a, b))
  best = lambda run: min(run() for _ in range(5))
  return {
    "copy_bytes_per_second": benchmarks.digits(2 * x.nbytes / best(copy)),
    "bfloat16_flop_per_second": benchmarks.digits(2 * side**3 / best(product)),
  }


def _floors(image, k, dtype, work, rates):
  """Lower bounds in microseconds; see the module's docstring."""
  size, taps = int(np.prod(image)), k * k * image[-1]
  # Images and kernels that are read or written.
  passes = (2 * size + taps) if work == "forward" else (3 * size + 2 * taps)
  count = 1 if work == "forward" else 2
  num_bytes = passes * jnp.dtype(dtype).itemsize
  seconds = {
    "bytes": num_bytes / rates["copy_bytes_per_second"],
    "products": 2 * count * size * k * k / rates["bfloat16_flop_per_second"],
  }
  return {name: benchmarks.digits(1e6 * s) for name, s in seconds.items()}


def _measured(arrays, dtype, work, peer, fresh):
  """Time and error of every implementation that runs, for one row."""
  given = [jnp.asarray(a, dtype) for a in arrays.values()]
  channels = arrays["x"].shape[-1]
  chosen = sorted({*np.linspace(0, channels - 1, CHECKED, dtype=int).tolist()})
  exact = in_float64(
    work, *(np.asarray(a[..., chosen]).astype(np.float64) for a in given)
  )
  runs, found = {}, {}

  def add(name, make):
    """Compiles one; `make` returns its results and what times it."""
    try:
      results, runs[name] = make()
      errors = map(_error, results, exact)
      names = ("y",) if work == "forward" else ("x", "kernel")
      found[name] = {"error": dict(zip(names, errors))}
    except Exception as e:  # Of a compiler, or out of memory.
      runs.pop(name, None)
      found[name] = {"failed": first_line(e)[:300]}

  for name in benchmarks.implementations_here():
    function = _function(name, work)

    def ours(function=function):
      results = jax.jit(function)(*given)
      picked = [np.asarray(y[..., chosen], np.float64) for y in results]
      return picked, timed_convolution(function, *given)

    add(name, ours)
  if peer:
    settings = {"mode": WORKS[work], "dtype": dtype, "channels": chosen}
    for i, way in enumerate(peer_lib.WAYS):

      def theirs(way=way, first=i == 0):
        if first:
          peer.load(settings, arrays if fresh else None)
        answer, results = peer.make(way)
        if "error" in answer:
          raise RuntimeError(answer["error"])
        calls = _calls(peer.seconds(way, 3))
        return results, lambda: peer.seconds(way, calls)

      add(f"torch {way}", theirs)
  times = benchmarks.by_turns(
    runs,
    _REPEATS.value,
    timer=operator.call,
    pause=peer_lib.pause(peer),
    label=f"{[*arrays['x'].shape]} {dtype} {work}",
  )
  for name, seconds in times.items():
    found[name] |= benchmarks.summary(1e6 * seconds)
  ours = {n: np.median(s) for n, s in times.items() if n[:6] != "torch "}
  return {"fastest": min(ours, key=ours.get, default=None)} | found


def _function(implementation, work) -> Callable[..., Any]:
  """(x, kernel, grad) -> the results."""

  def conv(x, kernel):
    return ops.depthwise_conv(x, kernel, implementation=implementation)

  if work == "forward":
    return lambda x, kernel, grad: (conv(x, kernel),)
  return lambda x, kernel, grad: jax.vjp(conv, x, kernel)[1](grad)


def _timed(function, args):
  """Compiles a function; returns one that gives the seconds of a call.

  It is called several times without waiting, so that Python's part of a call is
  hidden behind the device's.
  """
  call = jax.jit(function)
  jax.block_until_ready(call(*args))
  calls = _calls(benchmarks.seconds(lambda: call(*args), 3))
  return lambda: benchmarks.seconds(lambda: call(*args), calls)


def timed_convolution(
  function: Callable[..., Any], x: jax.Array, kernel: jax.Array, grad: jax.Array
) -> Callable[[], float]:
  """Compiles function(x, kernel, grad); returns what measures its seconds.

  On accelerators, short ones are compiled to programs of `TOGETHER` calls.

  XLA would do equal calls once, and hoist them out of loops. So each of them
  has its own kernel.
  """
  timer = _timed(function, (x, kernel, grad))
  if jax.default_backend() == "cpu" or timer() > SHORT:
    return timer
  kernels, grads = ([a + i for i in range(TOGETHER)] for a in (kernel, grad))
  together = _timed(
    lambda x, *both: [function(x, *each) for each in zip(*both)],
    (x, kernels, grads),
  )
  return lambda: together() / TOGETHER


def _calls(seconds):
  """How many calls to time at once."""
  least = 2e-3 if jax.default_backend() == "cpu" else 3e-2
  return min(max(1, int(least / seconds)), 1000)


def in_float64(
  work: str, x: np.ndarray, kernel: np.ndarray, grad: np.ndarray
) -> Sequence[np.ndarray]:
  """The results of `work`, of `WORKS`, by numpy in float64."""
  k, height, width = len(kernel), *x.shape[1:3]
  padding = ((k - 1) // 2, k // 2)
  spatial = lambda before, after: ((0, 0), (before, after), (before, after))
  pad = lambda a, sizes: np.pad(a, (*spatial(*sizes), (0, 0)))
  x = pad(x, padding)
  window = lambda a, i, j: a[:, i : i + height, j : j + width]
  taps = [(i, j) for i in range(k) for j in range(k)]
  if work == "forward":
    return (sum(window(x, i, j) * kernel[i, j] for i, j in taps),)
  grads = [np.einsum("nhwc,nhwc->c", window(x, *ij), grad) for ij in taps]
  grad = pad(grad, padding[::-1])
  flipped = kernel[::-1, ::-1]
  x_grad = sum(window(grad, i, j) * flipped[i, j] for i, j in taps)
  return x_grad, np.reshape(grads, kernel.shape)


def _error(ours, exact):
  largest = np.abs(exact).max()
  return benchmarks.digits(np.abs(ours - exact).max() / largest)


def _print_table(rows):
  for row in rows:
    print(f"{row['shape']} k {row['k']} {row['dtype']} {row['work']}, us")
    floors = row["floors"]
    print(f"  floors: {floors['bytes']} bytes, {floors['products']} products")
    for name, value in row.items():
      if isinstance(value, dict) and "median" in value:
        error = ", ".join(f"{n} {e:.1e}" for n, e in value["error"].items())
        print(
          f"  {name:28}{value['median']:10.4g} ({value['least']:.4g} to"
          f" {value['greatest']:.4g}), error {error}"
        )
      elif isinstance(value, dict) and "failed" in value:
        print(f"  {name:28}failed: {value['failed']}")


if __name__ == "__main__":
  cli.run(main, _FLAGS)
