"""Depthwise convolution on NVIDIA GPUs: depthwise.cu, called from JAX arrays.

`nvrtc` compiles depthwise.cu to PTX, for one shape at a time. The PTX is part
of the XLA program, and the GPU's driver compiles it for the card. `forward` and
`gradients` can be jitted, also within `jax.shard_map`, but not differentiated,
vmapped, or partitioned by XLA; `conv` and `conv_vjp` can be vmapped and
partitioned too.
"""

import functools
from pathlib import Path
import re
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from convmixer_jax.ops import derivative
from convmixer_jax.ops import nvrtc
from convmixer_jax.ops import partition

MAX_KERNEL_SIZE = 15

# Compute capability -> the smallest kernels for which depthwise.cu was measured
# to be faster than XLA: benchmarks/results/implementations_h200.json (5, 7, 9).
FASTER_FROM = {"9.0": 5}

_SOURCE = Path(__file__).with_name("depthwise.cu")
_THREADS = 256
# The most shared memory of a block of threads, on the smallest of these cards.
_MAX_BYTES = 99 * 1024
_MAX_GRID = 65535
_TILE_ROWS = 32
# Blocks of threads that an H100 runs at a time: two on each of 132 cores.
_NUM_BLOCKS = 264


class Kernel(NamedTuple):
  """A kernel of depthwise.cu for one shape, and how to launch it."""

  name: str
  macros: tuple[tuple[str, int], ...]  # See depthwise.cu.
  grid: tuple[int, int, int]
  num_bytes: int  # Of shared memory.


def available() -> bool:
  """Whether `partition.device()` can run these kernels, and NVRTC is there.

  That is a GPU of compute capability 8.0 or later. A warning says why
  depthwise.cu cannot be compiled.
  """
  new_enough = re.fullmatch(r"([89]|\d\d+)\.\d+", _capability())
  return new_enough is not None and _compiles()


@functools.cache
def _compiles():
  try:
    ptx(convolve_kernel((1, 4, 4, 8), 1, flip=False))
    return True
  except (OSError, RuntimeError) as e:
    lines = str(e).strip().splitlines() or [type(e).__name__]
    logging.warning(
      "ops/depthwise.cu could not be compiled (%s). Depthwise convolutions run"
      " in plain XLA, which is slower. Install NVRTC, for example with"
      " `pip install nvidia-cuda-nvrtc`.",
      next((line for line in lines if "error" in line), lines[0]),
    )
    return False


def is_faster(dtype: Any, k: int) -> bool:
  """Whether 'auto' takes these kernels for k x k on `partition.device()`."""
  least = FASTER_FROM.get(_capability())
  return least is not None and k >= least and jnp.dtype(dtype) == jnp.bfloat16


def _capability():
  return str(getattr(partition.device(), "compute_capability", ""))


def supported(
  x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array | jax.ShapeDtypeStruct
) -> bool:
  """Whether `forward` and `gradients` take these types and shapes.

  Args:
    x: [B, H, W, C]: bfloat16, C a multiple of 8.
    kernel: [k, k, C]: bfloat16, k at most MAX_KERNEL_SIZE.
  """
  k, shape = kernel.shape[0], x.shape
  if (
    x.dtype != jnp.bfloat16
    or kernel.dtype != jnp.bfloat16
    or not k <= MAX_KERNEL_SIZE
    or 0 in shape
    or shape[3] % 8
  ):
    return False
  kernels = convolve_kernel(shape, k, flip=False), grad_kernel(shape, k)
  return all(
    max(kernel.grid[1:]) <= _MAX_GRID and kernel.num_bytes <= _MAX_BYTES
    for kernel in kernels
  )


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`depthwise_conv`, of arrays that are `supported`.

  Sums are in float32. An infinity or NaN in x may spread to outputs up to three
  pixels farther than the kernel reaches.

  Args:
    x: [B, H, W, C].
    kernel: [k, k, C].

  Returns:
    [B, H, W, C].
  """
  return _convolve(x, kernel, flip=False)


def gradients(
  x: jax.Array, kernel: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The gradients of <grad, forward(x, kernel)>; equal in every run.

  Args:
    x: [B, H, W, C].
    kernel: [k, k, C].
    grad: [B, H, W, C].

  Returns:
    The gradients of x, and of kernel in float32.
  """
  k = kernel.shape[0]
  call = grad_kernel(x.shape, k)
  parts = jax.ShapeDtypeStruct((call.grid[1], *kernel.shape), jnp.float32)
  sums = _launch(call, parts, x, grad).sum(0)
  return _convolve(grad, kernel, flip=True), sums


def _convolve(x, kernel, flip):
  call = convolve_kernel(x.shape, kernel.shape[0], flip)
  return _launch(call, jax.ShapeDtypeStruct(x.shape, x.dtype), x, kernel)


def _launch(kernel, result, *args):
  launch = {"name": kernel.name, "kernel_type": "ptx"}
  launch["kernel_data"] = ptx(kernel)
  for axis, size, threads in zip("xyz", kernel.grid, (_THREADS, 1, 1)):
    launch[f"grid_{axis}"] = np.int32(size)
    launch[f"block_{axis}"] = np.int32(threads)
  launch["shared_mem_bytes"] = np.int32(kernel.num_bytes)
  result = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", result)(*args, **launch)
  return derivative.varying((args, result))[1]


def convolve_kernel(shape: tuple[int, ...], k: int, flip: bool) -> Kernel:
  """The kernel `convolve` for x of this shape; `flip` for its gradient."""
  pieces = -(-(k + 3) // 4)

  def num_bytes(rows, blocks, images, octets):
    stride = (images * (blocks + pieces - 1) * 4 + 15) // 32 * 32 + 16
    plane = (rows + 4 * pieces - 4) * stride
    taps = (4 * pieces + 3) * (4 * pieces + 6)
    return 2 * octets * (8 * (plane + taps) + 32)

  macros, tiles, images, channels = _tiles(shape, k, 2, num_bytes)
  macros |= {"LOW": k // 2 if flip else (k - 1) // 2, "FLIP": int(flip)}
  return _kernel("convolve", macros, (channels, tiles, images))


def grad_kernel(shape: tuple[int, ...], k: int) -> Kernel:
  """The kernel `kernel_grad` for x of this shape and a k x k kernel."""
  pairs, pieces = (k + 2) // 2, (k + 10) // 8

  def num_bytes(rows, blocks, images, octets):
    row = images * (blocks + -(-(k + 3) // 4) - 1) * 4
    plane = (rows // 2 + 2 * pairs - 2) * row + rows // 2 * 32
    sums = _THREADS // 32 * pairs * pieces * 16 * 8
    return 4 * max(octets * (8 * plane + 16), sums)

  # With 16 channels, each of 8 warps has two channels' sums in its registers.
  octets = 2 if k < 10 else 1
  macros, tiles, images, channels = _tiles(shape, k, octets, num_bytes)
  # As few rounds of tiles as possible, in up to three waves of blocks.
  units, most = tiles * images, -(-3 * _NUM_BLOCKS // channels)
  rounds = lambda p: -(-channels * p // _NUM_BLOCKS) * -(-units // p)
  parts = min(range(1, min(units, most) + 1), key=rounds)
  macros |= {"LOW": (k - 1) // 2, "PARTS": parts}
  return _kernel("kernel_grad", macros, (channels, parts, 1))


def _kernel(name, macros, grid):
  return Kernel(name, (*macros.items(),), grid, macros["BYTES"])


def _tiles(shape, k, octets, num_bytes):
  """Macros, and the numbers of tiles, groups of images and of channels."""
  batch, height, width, channels = shape
  ceil = lambda a, b: -(-a // b)
  octets = min(octets, channels // 8)
  blocks = min(8, ceil(width, 4))
  # Tiles of about equal height, as large as shared memory allows.
  tiles = [
    (ceil(ceil(height, ceil(height, most)), 4) * 4, images)
    for images in range(min(8 // blocks, batch), 0, -1)
    for most in range(_TILE_ROWS, 0, -4)
  ]
  fits = lambda t: num_bytes(t[0], blocks, t[1], octets) <= _MAX_BYTES
  rows, images = next(filter(fits, tiles), tiles[-1])
  macros = dict(BATCH=batch, HEIGHT=height, WIDTH=width, CHANNELS=channels, K=k)
  macros |= dict(ROWS=rows, BLOCKS=blocks, IMAGES=images, OCTETS=octets)
  macros["BYTES"] = num_bytes(rows, blocks, images, octets)
  count = ceil(height, rows) * ceil(width, 4 * blocks)
  return macros, count, ceil(batch, images), ceil(channels, 8 * octets)


@functools.cache
def ptx(kernel: Kernel) -> str:
  """A kernel's code; see `nvrtc.ptx`."""
  macros = [f"-D{name}={value}" for name, value in kernel.macros]
  return nvrtc.ptx(_SOURCE, macros)


# --- The same on each device's share of a batch.


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`forward`."""
  return _conv(x, kernel)[0]


def conv_vjp(
  x: jax.Array, kernel: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`gradients`."""
  split = partition.by_device
  grad_x, sums = _conv_vjp(split(x), kernel, split(grad))
  return grad_x.reshape(x.shape), sums.sum(0).astype(kernel.dtype)


def _gradients_of_parts(x, kernel, grad):
  parts = [gradients(part, kernel, g) for part, g in zip(x, grad)]
  return [*map(jnp.stack, zip(*parts))]


_conv = partition.over_images(
  "n h w c, k l c -> n h w c", lambda *args: [forward(*args)]
)
_conv_vjp = partition.over_images(
  "n b h w c, k l c, n b h w c -> n b h w c, n k l c", _gradients_of_parts
)
