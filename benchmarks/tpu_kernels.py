"""What the TPU compiler schedules for the kernels of ops.tpu, without a TPU.

  python -m benchmarks.tpu_kernels --kind v5e --json

A TPU's core issues one VLIW bundle a cycle, in order. So the bundles of all
blocks of images, of what is done once for 128 channels, and once for a call,
over the clock rate, are the time of a kernel's arithmetic if it does not wait
for memory. Beside it stand the times of its bytes at the memory's full
bandwidth and of its products at the peak rate; it needs the largest of the
three. These are estimates: nothing runs. Needs libtpu, and no TPU.
"""

import functools
import json
import os
from pathlib import Path
import re
import tempfile

import jax
import jax.numpy as jnp

import benchmarks
from convmixer_jax import cli
from convmixer_jax.ops import tpu
from convmixer_jax.ops import tpu_blocks
from convmixer_jax.plan import cost
from convmixer_jax.plan import topology

SHAPES = [  # B, H, W, C, k, activation
  (64, 32, 32, 1536, 9, "gelu"),
  (64, 32, 32, 768, 7, "relu"),
  (64, 16, 16, 256, 5, "gelu"),
  (512, 16, 16, 256, 5, "gelu"),
]

_FLAGS = cli.Flags()
_KIND = _FLAGS.enum(
  "kind", "TPU to compile for: --kind v6e.", "v5e", enum_values=["v5e", "v6e"]
)
_JSON = benchmarks.define_json(_FLAGS)


def main() -> None:
  """Compiles each kernel for one chip and reads its schedule."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )
    devices = topology.open_topology(f"{_KIND.value}:1x1")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [
      _row(Path(folder), devices, shape, name, fused)
      for shape in SHAPES
      for name in ("forward", "backward")
      for fused in (False, True)
    ]
  if _JSON.value:
    print(json.dumps({"rows": rows} | benchmarks.provenance(), indent=2))
    return
  bundles = f"{'bundles: block':>16}{'channels':>10}{'call':>10}"
  times = f"{'ms: schedule':>17}{'bytes':>7}{'products':>10}"
  print(f"{'kernel':26}{'shape':26}k{bundles}{times}")
  for row in rows:
    print(
      f"{row['kernel']:26}{row['shape']!s:26}{row['k']}"
      f" {row['block']:15,.0f} {row['channels']:9,.0f} {row['call']:9,.0f}"
      f" {row['schedule_ms']:16.3f} {row['bytes_ms']:6.3f}"
      f" {row['products_ms']:9.3f}"
    )


def _row(folder, devices, shape, name, fused):
  *image, k, activation = shape
  batch, height, width, depth = image
  sharding = jax.sharding.SingleDeviceSharding(devices[0])
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding
  )
  maps, kernel = array(height, width, batch, depth), array(k, k, depth)
  bias = array(depth, dtype=jnp.float32)
  by_image = array(batch, depth, dtype=jnp.float32)
  if name == "forward":
    args = (maps, kernel, bias) if fused else (maps, kernel)
    function = tpu.forward
    if fused:
      function = functools.partial(function, activation=activation)
  else:
    args, function = (maps, kernel, maps), tpu.backward
    if fused:
      norm = tpu.Norm(maps, bias, by_image, by_image, by_image)
      args = *args, norm
      function = functools.partial(
        function, activation=activation, residual=True
      )
  for path in folder.glob("*"):
    path.unlink()
  traced = jax.jit(function).trace(*args)
  text = traced.lower().compile().as_text()
  line = next(x for x in text.splitlines() if "tpu_custom_call" in x)
  called = re.search(r"%([\w.-]+) = ", line)[1]
  block, channels, call = _bundles(folder, called, name == "backward")
  chip = topology.CHIPS[devices[0].device_kind]
  at = tpu_blocks.of_maps(maps, kernel)
  parts = at.blocks // at.per_channels
  moved = sum(_bytes(a) for a in jax.tree.leaves((args, traced.out_info)))
  return {
    "kernel": name + (f", {activation}, BatchNorm" if fused else ""),
    "shape": image,
    "k": k,
    "block": block,
    "channels": channels,
    "call": call,
    "schedule_ms": 1e3
    * (at.blocks * block + parts * channels + call)
    / chip.clock,
    "bytes_ms": 1e3 * moved / chip.bandwidth,
    "products_ms": 1e3 * cost.flops(traced.jaxpr.jaxpr) / chip.flops,
  }


def _bytes(array):
  return array.size * array.dtype.itemsize


def _bundles(folder, name, backward):
  """Bundles of a block, once for 128 channels, and once for a call.

  The kernel's loops are, in the order of the code: the bands; what the first
  and the last step do; what the others do, for even and for odd blocks; and in
  the backward kernel the sums of the kernel's gradient. See tpu_kernels for
  their unrolling.
  """
  (path,) = (
    path
    for path in folder.glob(f"*-{name}-*final_bundles.txt")
    if "analysis" not in path.name
  )
  loops, begin, total = [], None, 0
  for line in path.read_text().splitlines():
    bundle = re.match(r" *(0x[0-9a-f]+|0) *(LB)? *: (>*)", line)
    if bundle is None:
      continue
    total = int(bundle[1], 16) + 1
    if bundle[2] and len(bundle[3]) == 2:
      begin = total - 1
    elif begin is not None and re.search(r"sbr.rel \(!%p", line):
      loops.append(total + 4 - begin)  # And four that follow the branch.
      begin = None
  bands, *ends, even, odd = loops[:-1] if backward else loops
  sums = loops[-1] if backward else 0
  block = 8 * max(even, odd) + total - sum(loops)
  return block, 16 * (bands + sums), 4 * sum(ends)


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
