"""Which implementation of the depthwise convolution is the fastest, by shape.

  python -m benchmarks.implementations --json

Times 'native', 'shift' and 'xla' in turn, the forward pass and both gradients,
from a single small image to the paper's models. What 'auto' picks rests on it.
"""

import json
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tqdm

import benchmarks
from convmixer_jax import cli
from convmixer_jax import ops

IMPLEMENTATIONS = ("native", "shift", "xla")
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

_FLAGS = flags.FlagValues()
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  rng = np.random.default_rng(0)
  rows = []
  for shape in tqdm.tqdm(SHAPES, disable=not sys.stderr.isatty()):
    *image, k = shape
    x, grad = (jnp.asarray(rng.normal(size=image), jnp.float32) for _ in "xg")
    kernel = jnp.asarray(rng.normal(size=(k, k, image[-1])), jnp.float32)
    for work in ("forward", "gradients"):
      runs = {
        name: _compiled(name, work, x, kernel, grad) for name in IMPLEMENTATIONS
      }
      # Calls of a few microseconds are timed many at a time.
      calls = max(1, int(2e-3 / min(map(_once, runs.values()))))
      times = {name: [] for name in runs}
      for _ in range(_REPEATS.value):
        for name, run in runs.items():
          times[name].append(_once(run, calls) / calls)
      medians = {name: np.median(values) for name, values in times.items()}
      rows.append(
        {
          "shape": image,
          "k": k,
          "work": work,
          "fastest": min(medians, key=medians.get),
          **{
            n: benchmarks.summary(1e6 * np.array(t)) for n, t in times.items()
          },
        }
      )
  if _JSON.value:
    record = {"unit": "microseconds", "rows": rows} | benchmarks.provenance()
    print(json.dumps(record, indent=2))
    return
  table = rich.table.Table("x", "k", "", *(f"{n}, us" for n in IMPLEMENTATIONS))
  for row in rows:
    medians = (f"{row[name]['median']:.4g}" for name in IMPLEMENTATIONS)
    table.add_row(str(row["shape"]), str(row["k"]), row["work"], *medians)
  rich.console.Console().print(table)


def _compiled(implementation, work, x, kernel, grad):
  """Returns a function that does the work `calls` times, the last awaited."""

  def conv(x, kernel):
    return ops.depthwise_conv(x, kernel, implementation=implementation)

  if work == "forward":
    function = jax.jit(lambda x, kernel, grad: conv(x, kernel))
  else:
    function = jax.jit(
      lambda x, kernel, grad: jax.vjp(conv, x, kernel)[1](grad)
    )

  def run(calls=1):
    for _ in range(calls):
      result = function(x, kernel, grad)
    return result

  return run


def _once(run, calls=1):
  return benchmarks.seconds(run, repeats=1, calls=calls)[0]


if __name__ == "__main__":
  cli.run(main, _FLAGS)
