"""Speed of the depthwise convolution's implementations, by shape.

  python -m benchmarks.implementations --json

Times 'native', 'shift' and 'xla', forward and both gradients, from a single
small image to the paper's models. The choice of 'auto' is based on the result.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

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

_FLAGS = cli.Flags()
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  rng = np.random.default_rng(0)
  rows = []
  for shape in SHAPES:
    *image, k = shape
    x, grad = (jnp.asarray(rng.normal(size=image), jnp.float32) for _ in "xg")
    kernel = jnp.asarray(rng.normal(size=(k, k, image[-1])), jnp.float32)
    for work in ("forward", "gradients"):
      runs = {
        name: _compiled(name, work, x, kernel, grad) for name in IMPLEMENTATIONS
      }
      # Calls that take microseconds are timed many at a time.
      calls = max(1, int(2e-3 / min(map(benchmarks.seconds, runs.values()))))
      times = benchmarks.by_turns(
        runs,
        _REPEATS.value,
        timer=functools.partial(benchmarks.seconds, calls=calls),
        label=f"{shape} {work}",
      )
      medians = {name: np.median(values) for name, values in times.items()}
      rows.append(
        {
          "shape": image,
          "k": k,
          "work": work,
          "fastest": min(medians, key=medians.get),
          **{n: benchmarks.summary(1e6 * t) for n, t in times.items()},
        }
      )
  if _JSON.value:
    record = {"unit": "microseconds", "rows": rows} | benchmarks.provenance()
    print(json.dumps(record, indent=2))
    return
  print(f"{'x':24}k {'us':12}" + "".join(f"{n:>8}" for n in IMPLEMENTATIONS))
  for row in rows:
    medians = (f"{row[name]['median']:8.4g}" for name in IMPLEMENTATIONS)
    print(f"{row['shape']!s:24}{row['k']} {row['work']:12}" + "".join(medians))


def _compiled(implementation, work, x, kernel, grad):
  """Returns a function that does the work once; it is compiled already."""

  def conv(x, kernel):
    return ops.depthwise_conv(x, kernel, implementation=implementation)

  if work == "forward":
    function = jax.jit(lambda x, kernel, grad: conv(x, kernel))
  else:
    function = jax.jit(
      lambda x, kernel, grad: jax.vjp(conv, x, kernel)[1](grad)
    )

  jax.block_until_ready(function(x, kernel, grad))
  return lambda: function(x, kernel, grad)


if __name__ == "__main__":
  cli.run(main, _FLAGS)
