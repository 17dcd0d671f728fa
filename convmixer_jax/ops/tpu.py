"""Depthwise convolution on a TPU's matrix units.

The kernels compute `banded`'s products. They can also do what follows the
convolution in a train step: the activation and the sums over images that
BatchNorm needs, in both passes.
"""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from convmixer_jax.ops import banded
from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu_kernels
from convmixer_jax.ops.tpu_kernels import Steps

_LANES, _WORD = tpu_kernels.LANES, tpu_kernels.WORD
_KINDS = "TPU v5 lite", "TPU v6 lite"  # Those with 128 MiB on the chip.
_VMEM = 120 * 2**20  # Bytes, of these.


def _layout(x, kernel, flipped=False):
  at = banded.layout(*x.shape[:2], kernel, flipped)
  return Steps(*dataclasses.astuple(at), x.dtype)


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


def supported(x: Any, kernel: Any, norm: bool = False) -> bool:
  """Whether `conv` and `conv_vjp`, or these with a norm, can run on x."""
  floats = jnp.bfloat16, jnp.float32
  if x.dtype not in floats or 0 in x.shape or not available():
    return False
  at = _layout(jax.ShapeDtypeStruct(x.shape[1:], x.dtype), kernel)
  # The backward kernel has blocks of images, two of each, their words, the
  # bands, and the sums of the kernel's gradient.
  size = _LANES**2 * jnp.dtype(at.dtype).itemsize
  blocks = (11 if norm else 8) * at.lanes * size
  bands = at.window * (size + 4 * _LANES**2)
  return at.pixels <= _LANES and blocks + bands < _VMEM


def _padded(x, at: Steps):
  """[H, W, B, C] -> whole groups, steps and lanes of channels, with zeros."""
  height, width, batch, channels = x.shape
  padding = [
    (0, at.groups * at.rows - height),
    (0, at.row - width),
    (0, -batch % at.images),
    (0, -channels % _LANES),
  ]
  return jnp.pad(x, padding) if any(after for _, after in padding) else x


def _cut(y, shape):
  """The inverse of `_padded`."""
  return y[tuple(map(slice, shape))]


def _by_lane(values, at: Steps):
  """[B, C] -> [steps, C, lanes]: an image's value at each of its groups."""
  values = values.astype(jnp.float32).T
  channels, batch = values.shape
  values = jnp.pad(values, [(0, -channels % _LANES), (0, -batch % at.images)])
  values = values.reshape(len(values), -1, 1, at.images)
  values = jnp.broadcast_to(values, (*values.shape[:2], at.groups, at.images))
  return values.reshape(*values.shape[:2], at.lanes).transpose(1, 0, 2)


def _by_image(values, shape):
  """The inverse of `_by_lane`."""
  _, _, batch, channels = shape
  values = values.transpose(0, 2, 1).reshape(-1, values.shape[1])
  return values[:batch, :channels]


def _specs(at: Steps):
  """Blocks of images, of [C, n], of [steps, C, lanes], and of constants."""
  shape = at.groups * at.rows, at.row, at.images, _LANES
  images = pl.BlockSpec(shape, lambda c, b: (0, 0, b, c))
  rows = lambda n: pl.BlockSpec((_LANES, n), lambda c, b: (c, 0))
  by_lane = pl.BlockSpec((None, _LANES, at.lanes), lambda c, b: (b, c, 0))
  constant = lambda a: pl.BlockSpec(a.shape, lambda c, b: (0, 0))
  return images, rows, by_lane, constant


def _call(kernel, at: Steps, images, args, results, scratch, interpret):
  """Runs a kernel; args and results are (array or shape, block) each.

  `plan` knows the kernels by their names.
  """
  activation = kernel.keywords["activation"]
  name = kernel.func.__name__ + (f"_{activation}" if activation else "")
  *_, batch, channels = images.shape
  arrays, in_specs = zip(*args)
  shapes, out_specs = zip(*results)
  return pl.pallas_call(
    kernel,
    grid=(channels // _LANES, batch // at.images),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=shapes,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      vmem_limit_bytes=_VMEM, dimension_semantics=("parallel", "arbitrary")
    ),
    name=f"depthwise_{name}",
    interpret=interpret,
  )(*arrays)


def _scratch(at: Steps, arrays):
  words = pltpu.VMEM((_LANES // 8, at.words * 8, at.lanes), _WORD)
  bands = pltpu.VMEM((_LANES, at.words, at.window), _WORD)
  return [words] * arrays + [bands]


def _broadcast(bias, at: Steps):
  bias = jnp.pad(bias.astype(jnp.float32), (0, -len(bias) % _LANES))
  return jnp.broadcast_to(bias[:, None], (len(bias), at.lanes))


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
  at = _layout(x, kernel)
  images, rows, by_lane, constant = _specs(at)
  steps, first_rows, mask = _padded(x, at), at.first_words(kernel), at.mask()
  args = [
    (first_rows, rows(first_rows.shape[1])),
    (mask, constant(mask)),
    (steps, images),
  ]
  results = [(jax.ShapeDtypeStruct(steps.shape, x.dtype), images)]
  *_, batch, channels = steps.shape
  if activation:
    shape = batch // at.images, channels, at.lanes
    values = jax.ShapeDtypeStruct(shape, jnp.float32)
    args += [(_broadcast(bias, at), rows(at.lanes)), *_inside(at, constant)]
    results += [(values, by_lane)] * 2
  body = functools.partial(tpu_kernels.forward, at=at, activation=activation)
  y, *moments = _call(
    body, at, steps, args, results, _scratch(at, 1), interpret
  )
  by_image = [_by_image(m[..., : at.images], x.shape) for m in moments]
  return _cut(y, x.shape), *by_image


def _inside(at: Steps, constant):
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
  at = _layout(x, kernel, flipped=True)
  images, rows, by_lane, constant = _specs(at)
  first_rows, mask = at.first_words(kernel[::-1, ::-1]), at.mask()
  row_block = rows(first_rows.shape[1])
  reversed_mask = at.is_tap()[::-1].astype(jnp.float32)
  steps = _padded(x, at)
  args = [
    (first_rows, row_block),
    (mask, constant(mask)),
    (reversed_mask, constant(reversed_mask)),
    (steps, images),
    (_padded(grad, at), images),
  ]
  *_, batch, channels = steps.shape
  results = [
    (jax.ShapeDtypeStruct(steps.shape, x.dtype), images),
    (jax.ShapeDtypeStruct(first_rows.shape, jnp.float32), row_block),
  ]
  scratch = _scratch(at, 2)
  scratch += [pltpu.VMEM((_LANES, _LANES, at.window), jnp.float32)]
  if norm is not None:
    args += [(_padded(norm.y, at), images)]
    args += [(_broadcast(norm.bias, at), rows(at.lanes))]
    args += [(_by_lane(v, at), by_lane) for v in (norm.p, norm.q, norm.r)]
    args += _inside(at, constant)
    shape = batch // at.images, channels, at.lanes
    results += [(jax.ShapeDtypeStruct(shape, jnp.float32), by_lane)]
    scratch += scratch[:1]
  body = functools.partial(
    tpu_kernels.backward, at=at, activation=activation, residual=residual
  )
  grad_x, grad_row, *grad_bias = _call(
    body, at, steps, args, results, scratch, interpret
  )
  taps = at.taps(grad_row.T[:, : x.shape[-1]], before=1)
  return (
    _cut(grad_x, x.shape),
    taps[::-1, ::-1],
    *(_by_image(g[..., : at.images], x.shape) for g in grad_bias),
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
