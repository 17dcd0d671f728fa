"""Depthwise convolution on a TPU's matrix units.

The kernels compute `banded`'s products. They can also do what follows the
convolution in a train step: the activation and the sums over images that
BatchNorm needs, in both passes.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu_blocks
from convmixer_jax.ops import tpu_kernels
from convmixer_jax.ops.tpu_blocks import Blocks

_LANES, _WORD = tpu_blocks.LANES, tpu_blocks.WORD
_KINDS = "TPU v5 lite", "TPU v6 lite"  # Those with 128 MiB on the chip.
_VMEM = 120 * 2**20  # Bytes, of these.


def available() -> bool:
  """Whether the TPUs have enough memory; True where there are none."""
  device = partition.device()
  return device.platform != "tpu" or device.device_kind in _KINDS


def compiler_options(device: Any) -> dict[str, Any]:
  """Options of XLA's compiler for a program on a device that has the kernels.

  XLA's own operations get 48 MiB of the chip's memory for their blocks instead
  of 16. A product then reads each operand once, and can compute what comes
  before and after it. docs/speed.md has what that gains by estimate.
  """
  if device.platform != "tpu" or device.device_kind not in _KINDS:
    return {}
  return {"xla_tpu_scoped_vmem_limit_kib": 48 * 2**10}


def supported(x: Any, kernel: Any, activation: str | None = None) -> bool:
  """Whether `conv` and `conv_vjp` can run on x, [B, H, W, C].

  With an activation: whether `conv_moments` and `conv_norm_vjp` can.
  """
  floats = jnp.bfloat16, jnp.float32
  if x.dtype not in floats or 0 in x.shape or not available():
    return False
  if activation is not None and activation not in tpu_kernels.ACTIVATIONS:
    return False
  at = tpu_blocks.of_maps(jax.eval_shape(_maps, x), kernel)
  if at.pixels > _LANES or at.lanes > _LANES:
    return False
  # Of 128 channels and pixels, the backward kernel has blocks of images (two of
  # each array), their words (two of each array that is read, on whole lanes),
  # the bands, and the sums of the kernel's gradient in float32.
  read = 2 if activation is None else 3
  columns = 2 * (read + 1) * at.lanes + 2 * read * _LANES + at.window
  column = _LANES**2 * jnp.dtype(at.dtype).itemsize
  return columns * column + at.window * _LANES**2 * 4 < _VMEM


def _call(kernel, at: Blocks, args, results, scratch, interpret):
  """Runs a kernel; args and results are (array or shape, block) each.

  `plan` knows the kernels by their names.
  """
  activation = kernel.keywords["activation"]
  name = kernel.func.__name__ + (f"_{activation}" if activation else "")
  arrays, in_specs = zip(*args)
  shapes, out_specs = zip(*results)
  return pl.pallas_call(
    kernel,
    grid=(at.blocks + 2,),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=shapes,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      vmem_limit_bytes=_VMEM, dimension_semantics=("arbitrary",)
    ),
    name=f"depthwise_{name}",
    interpret=interpret,
  )(*arrays)


def _scratch(at: Blocks, arrays):
  words = pltpu.VMEM((_LANES // 8, at.words * 8, at.lanes), _WORD)
  bands = pltpu.VMEM((_LANES, at.words, at.window), _WORD)
  return [words] * (2 * arrays) + [bands]


def forward(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None = None,
  activation: str | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, ...]:
  """Depthwise convolution, and moments of what follows it.

  Args:
    x: [H, W, B, C], as TPUs have the network's values in memory; bfloat16 or
      float32. `supported` says which.
    kernel: [k, k, C].
    bias: [C].
    activation: None: y alone.
    interpret: on a CPU.

  Returns:
    y [H, W, B, C], and with an activation the mean of activation(y + bias) over
    each image, and the sum of squared differences from it: float32 [B, C].
  """
  at = tpu_blocks.of_maps(x, kernel)
  images, rows, by_lane, constant = at.specs()
  maps, first_rows, mask = at.padded(x), at.first_words(kernel), at.mask()
  args = [
    (first_rows, rows(first_rows.shape[1])),
    (mask, constant(mask)),
    (maps, images(0)),
  ]
  results = [(jax.ShapeDtypeStruct(maps.shape, x.dtype), images(2))]
  if activation:
    args += [(at.on_lanes(bias), rows(at.lanes)), *_inside(at, constant)]
    results += [(at.by_lane_shape, by_lane)] * 2
  body = functools.partial(tpu_kernels.forward, at=at, activation=activation)
  y, *moments = _call(body, at, args, results, _scratch(at, 1), interpret)
  if activation:
    moments = at.of_images(*moments)
  return at.cut(y), *moments


def _inside(at: Blocks, constant):
  if at.is_whole:
    return []
  inside = at.is_pixel().astype(jnp.float32)
  return [(inside, constant(inside))]


class Norm(NamedTuple):
  """What follows the convolution: see `normalize.input_grad`."""

  y: jax.Array  # The convolution's result.
  bias: jax.Array  # [C]
  p: jax.Array  # [B, C], like q and r.
  q: jax.Array
  r: jax.Array


def backward(
  x: jax.Array,
  kernel: jax.Array,
  grad: jax.Array,
  norm: Norm | None = None,
  activation: str | None = None,
  *,
  residual: bool = False,
  interpret: bool = False,
) -> tuple[jax.Array, ...]:
  """Gradients of a convolution, and of the activation and norm after it.

  Args:
    x: see `forward`.
    kernel: see `forward`.
    grad: of y; with `norm`, of the norm's result. [H, W, B, C].
    norm: None: the convolution alone.
    activation: with `norm`.
    residual: x was added to the norm's result; its gradient is included.
    interpret: on a CPU.

  Returns:
    The gradients of x, and of the kernel in float32; with `norm`, of the bias
    too, by image: float32 [B, C].
  """
  at = tpu_blocks.of_maps(x, kernel, flipped=True)
  images, rows, by_lane, constant = at.specs()
  first_rows, mask = at.first_words(kernel[::-1, ::-1]), at.mask()
  row_block = rows(first_rows.shape[1])
  reversed_mask = at.is_tap()[::-1].astype(jnp.float32)
  maps = at.padded(x)
  args = [
    (first_rows, row_block),
    (mask, constant(mask)),
    (reversed_mask, constant(reversed_mask)),
    (maps, images(0)),
    (at.padded(grad), images(0)),
  ]
  results = [
    (jax.ShapeDtypeStruct(maps.shape, x.dtype), images(2)),
    (jax.ShapeDtypeStruct(first_rows.shape, jnp.float32), row_block),
  ]
  scratch = _scratch(at, 2)
  scratch += [pltpu.VMEM((_LANES, _LANES, at.window), jnp.float32)]
  if norm is not None:
    args += [(at.padded(norm.y), images(0))]
    args += [(at.on_lanes(norm.bias), rows(at.lanes))]
    args += [(at.by_lane(v), by_lane) for v in (norm.p, norm.q, norm.r)]
    args += _inside(at, constant)
    results += [(at.by_lane_shape, by_lane)]
    scratch += scratch[:2]
  body = functools.partial(
    tpu_kernels.backward, at=at, activation=activation, residual=residual
  )
  grad_x, grad_row, *grad_bias = _call(
    body, at, args, results, scratch, interpret
  )
  taps = at.taps(grad_row.T[:, : x.shape[-1]], before=1)
  return (
    at.cut(grad_x),
    taps[::-1, ::-1],
    *(at.by_group(g).sum(0) for g in grad_bias),
  )


# --- The same on each device's share of a batch, of arrays [B, H, W, C].


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`forward`'s y."""
  (y,) = _forward_op(None)(_maps(x), kernel)
  return _batch(y)


def conv_moments(
  activation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
  """`forward` with an activation."""
  y, *moments = _forward_op(activation)(_maps(x), kernel, bias)
  return _batch(y), *moments


def conv_vjp(
  x: jax.Array, kernel: jax.Array, grad: jax.Array
) -> tuple[jax.Array, ...]:
  """`backward` without a norm."""
  return _summed(_backward_op(None, False), x, kernel, grad)


def conv_norm_vjp(
  activation: str,
  residual: bool,
  x: jax.Array,
  kernel: jax.Array,
  grad: jax.Array,
  *norm: jax.Array,
) -> tuple[jax.Array, ...]:
  """`backward` with `Norm`'s arrays."""
  return _summed(_backward_op(activation, residual), x, kernel, grad, *norm)


def _maps(x):
  return x.transpose(1, 2, 0, 3)


def _batch(y):
  return y.transpose(2, 0, 1, 3)


def _forward_op(activation):
  if activation is None:
    return partition.on_shards("h w n c, k l c -> h w n c", forward)
  rule = "h w n c, k l c, c -> h w n c, n c, n c"
  return partition.on_shards(rule, lambda *args: forward(*args, activation))


def _backward_op(activation, residual):
  images = "h w n c"
  rule = f"{images}, k l c, {images} -> {images}, n k l c"
  if activation:
    rule = (
      f"{images}, k l c, {images}, {images}, c, n c, n c, n c"
      f" -> {images}, n k l c, n c"
    )

  def op(x, kernel, grad, *norm):
    norm = Norm(*norm) if norm else None
    grad_x, grad_kernel, *grad_bias = backward(
      x, kernel, grad, norm, activation, residual=residual
    )
    return grad_x, grad_kernel[None], *grad_bias

  return partition.on_shards(rule, op)


def _summed(op, x, kernel, grad, *norm):
  if norm:
    y, *rest = norm
    norm = _maps(y), *rest
  grad_x, sums, *grad_bias = op(_maps(x), kernel, _maps(grad), *norm)
  return _batch(grad_x), sums.sum(0).astype(kernel.dtype), *grad_bias
