"""What RandAugment would take on a TPU, by the schedule of its compiler.

  python -m benchmarks.tpu_policy --config configs/imagenet.py

Compiles crop, flip and RandAugment of a config for one chip, and lists what
reads or counts pixels at computed places. The compiler has no estimate for
these operations. Their loops handle one pixel after the other, and a core
issues one VLIW bundle of instructions a cycle, in order; so the bundles in a
loop over the pixels that it handles are the cycles of a pixel. These are
estimates: nothing runs. Needs libtpu, and no TPU. Prints JSON.
"""

import collections
import json
import math
import os
from pathlib import Path
import re
import tempfile

import jax
import jax.numpy as jnp

import benchmarks
from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import ops
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.plan import hlo
from convmixer_jax.plan import topology

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_BATCH = _FLAGS.positive("batch", "Images of the chip: --batch 64.", 64)


def main() -> None:
  """Compiles the policy and reads the schedules of its loops."""
  config = cli.required(_CONFIG)
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )
    devices = topology.open_topology("v5e:1x1")
    jax.config.update("jax_enable_compilation_cache", False)
    size = config.data.image_size
    data = sources.describe(
      config.data.name, config.data.dir, config.data.train_split, size
    )
    policy = augment.make_policy(
      config.augment, mean=config.data.mean, crop=data.crop_on_device
    )
    images = jax.ShapeDtypeStruct(
      (_BATCH.value, size, size, 3),
      jnp.uint8,
      sharding=jax.sharding.SingleDeviceSharding(devices[0]),
    )
    run = jax.jit(lambda images: policy(jax.random.key(0), images))
    with ops.portable():
      program = hlo.Program(run.lower(images).compile().as_text())
    clock = topology.CHIPS[devices[0].device_kind].clock
    # `augment` works on an eighth of the pixels at a time.
    least = _BATCH.value * size**2 // 8
    rows = [*_rows(program, Path(folder), clock, least)]
  result = {
    "images": list(images.shape),
    "rest_ms": 1e3 * (program.cycles() or 0) / clock,
    "by_pixel_ms": sum(row["ms"] for row in rows),
    "rows": rows,
  }
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _rows(program, folder, clock, least):
  """Of each operation and number of pixels: how often, and how long.

  Those of fewer than `least` are left out: they read a few numbers an image.
  """
  counts, cycles = collections.Counter(), {}
  for fusion, runs in program.instructions():
    called = fusion.find(r"\bcalls=%([\w.-]+)")
    for op in program.computations.get(called, ()):
      if op.opcode in ("gather", "scatter"):
        indexed = op if op.opcode == "gather" else op.operands[1]
        shape = re.search(r"\[([\d,]*)\]", indexed.shape)[1]
        key = op.opcode, math.prod(map(int, shape.split(",")))
        if key[1] < least:
          continue
        counts[key] += runs
        # Equal ones have one schedule.
        cycles[key] = _cycles(folder, fusion.name) or cycles.get(key)
  for (opcode, pixels), runs in counts.items():
    pixel_cycles = cycles[opcode, pixels]
    if pixel_cycles is None:
      raise UserError(f"{opcode} of {pixels} pixels: has no schedule")
    yield {
      "operation": opcode,
      "runs": runs,
      "pixels": pixels,
      "cycles_a_pixel": round(pixel_cycles, 1),
      "ms": 1e3 * runs * pixels * pixel_cycles / clock,
    }


def _cycles(folder, name):
  """Bundles of the loop over pixels, over the pixels that it handles.

  Each needs two scalars from memory: where it is, and what is there or added.
  """
  for path in folder.glob(f"*-{name}-*-final_bundles.txt"):
    if "analysis" not in path.name:
      loop = re.findall(r"^ +\w+ +\w*: +>> \{(.*)", path.read_text(), re.M)
      pixels = sum(line.count("= sld [smem:") for line in loop) // 2
      return len(loop) / pixels if pixels else None
  return None


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
