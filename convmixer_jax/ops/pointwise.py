"""Pointwise (1 x 1) convolution: a matrix product."""

import jax
import jax.numpy as jnp

from convmixer_jax.ops import native


def pointwise_conv(
  x: jax.Array, kernel: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Multiplies the channels of each pixel by a matrix.

  Differentiable in both arguments, in both modes and to any order.

  Args:
    x: [B, H, W, C], float.
    kernel: [C, D], of x's dtype.
    implementation: see `depthwise_conv`; 'shift' and 'xla' are the same here.

  Returns:
    [B, H, W, D], of x's dtype.

  Raises:
    ValueError: unknown implementation, or mismatched shapes or dtypes.
  """
  if (
    x.ndim != 4
    or kernel.ndim != 2
    or kernel.shape[0] != x.shape[3]
    or kernel.dtype != x.dtype
  ):
    raise ValueError(
      "pointwise_conv takes x [B, H, W, C] and kernel [C, D] of one dtype, not"
      f" {x.dtype}{x.shape} and {kernel.dtype}{kernel.shape}"
    )
  return _pointwise(implementation or "auto", x, kernel)


_pointwise = native.bilinear("pointwise", jnp.dot)
