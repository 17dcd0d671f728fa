"""Depthwise convolution, with several implementations.

All of them compute the same function and take the same kernel, so that a model
does not depend on which one runs.
"""

import jax
from jax import lax
import jax.numpy as jnp

from convmixer_jax.ops import banded
from convmixer_jax.ops import cuda
from convmixer_jax.ops import derivative
from convmixer_jax.ops import native
from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu


def depthwise_conv(
  x: jax.Array, kernel: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Convolves each channel with its own k x k kernel, stride 1, SAME padding.

  If k is even, the extra row and column of padding are at the bottom and at the
  right, as in PyTorch's `padding="same"`. Differentiable in both arguments, in
  both modes and to any order.

  Args:
    x: [B, H, W, C], float.
    kernel: [k, k, C], of x's dtype.
    implementation: one of
      'xla': XLA's convolution with `feature_group_count=C`.
      'shift': a sum of k*k shifted products. On CPUs, XLA compiles it to vector
        code, and its grouped convolution to scalar code.
      'native': native.cc, for float32 and bfloat16 on CPUs; 'shift' if it
        cannot be compiled.
      'banded': products with banded matrices; see `banded`.
      'pallas': such products in kernels for TPUs (v5e and v6e), where there are
        some for the shape (see `tpu.supported`); otherwise, and on other
        platforms, as 'auto'. `BatchNorm` then fuses more with them in training.
        They have not run on a TPU yet.
      'cuda': such products in depthwise.cu on NVIDIA's GPUs, where it can be
        compiled and `cuda.supported`; otherwise 'xla'. On other platforms as
        'auto'.
      'auto' or None: 'native' on CPUs. On GPUs 'cuda' where it was measured to
        be faster, `cuda.FASTER_FROM`, otherwise 'xla'. On TPUs 'xla'. See
        docs/speed.md.
      With 'banded', 'pallas' and 'cuda', an infinity or NaN spreads farther
      than the kernel reaches.

  Returns:
    [B, H, W, C], of x's dtype.

  Raises:
    ValueError: unknown implementation, or mismatched shapes or dtypes.
  """
  if (
    x.ndim != 4
    or kernel.ndim != 3
    or not kernel.shape[0] == kernel.shape[1] > 0
    or kernel.shape[2] != x.shape[3]
    or kernel.dtype != x.dtype
  ):
    raise ValueError(
      "depthwise_conv takes x [B, H, W, C] and kernel [k, k, C] of one dtype,"
      f" not {x.dtype}{x.shape} and {kernel.dtype}{kernel.shape}"
    )
  if native.chosen(implementation, x.dtype, len(kernel)) == "cuda":
    implementation = "cuda"
  return _depthwise(implementation or "auto", x, kernel)


def _same_padding(k: int) -> tuple[int, int]:
  return (k - 1) // 2, k // 2


def _xla(x, kernel):
  return lax.conv_general_dilated(
    x,
    kernel[:, :, None, :],
    window_strides=(1, 1),
    padding=[_same_padding(kernel.shape[0])] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def _windows(x, k, padding):
  """Yields x [N, H, W, C], shifted by each offset of the kernel.

  In float32, or in float64 if x is.
  """
  _, height, width, _ = x.shape
  x = jnp.pad(native.widened(x), [(0, 0), padding, padding, (0, 0)])
  # Without the barrier, XLA would compute x again for every window.
  x = lax.optimization_barrier(x)
  for i in range(k):
    for j in range(k):
      yield x[:, i : i + height, j : j + width]


def _correlate(x, kernel, padding):
  k, _, channels = kernel.shape
  taps = native.widened(kernel).reshape(k * k, channels)
  total = sum(w * tap for w, tap in zip(_windows(x, k, padding), taps))
  # Without the barrier, XLA would compute the sum again for every reduction of
  # it, as in BatchNorm.
  return lax.optimization_barrier(total.astype(x.dtype))


def _shift(x, kernel):
  return _correlate(x, kernel, _same_padding(kernel.shape[0]))


def _shift_vjp(x, kernel, grad):
  k = kernel.shape[0]
  padding = _same_padding(k)
  grad_x = _correlate(grad, kernel[::-1, ::-1], padding[::-1])

  # The kernel's gradient is a sum over batch and space. On CPUs, XLA compiles
  # sums over leading axes to scalar code. Adding one image at a time to k*k
  # accumulators gives vector code, which is six times faster. Each device has
  # its own accumulators, so that a sharded batch is not gathered.
  def one_image_per_device(sums, image):
    x, grad = image  # [devices, H, W, C] each
    grad = native.widened(grad)
    windows = _windows(x, k, padding)
    return [s + w * grad for s, w in zip(sums, windows)], None

  by_image = [jnp.moveaxis(partition.by_device(a), 1, 0) for a in (x, grad)]
  zeros = jnp.zeros_like(native.widened(by_image[0][0]))
  zeros = [zeros] * (k * k)
  zeros, _ = derivative.varying((zeros, by_image))
  sums, _ = lax.scan(one_image_per_device, zeros, by_image)
  grad_kernel = jnp.stack([s.sum((0, 1, 2)) for s in sums])
  return grad_x, grad_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _where(supported, op, vjp):
  """An op and its derivative for what it supports, and XLA's for the rest."""
  xla_vjp = lambda x, kernel, grad: jax.vjp(_xla, x, kernel)[1](grad)
  choose = lambda ours, xlas: (
    lambda *args: (ours if supported(*args[:2]) else xlas)(*args)
  )
  return choose(op, _xla), choose(vjp, xla_vjp)


_depthwise = native.bilinear(
  "depthwise",
  _xla,
  _shift,
  _shift_vjp,
  banded=(banded.forward, banded.gradients),
  pallas=_where(tpu.supported, tpu.conv, tpu.conv_vjp),
  cuda=_where(cuda.supported, cuda.conv, cuda.conv_vjp),
)
