"""Pointwise (1x1) convolution: a product of matrices."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from convmixer_jax.ops import native

# By which policies of jax.checkpoint know the result.
PRODUCT = "pointwise"


def pointwise_conv(
  x: jax.Array, kernel: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Mixes the channels of each location.

  Args:
    x: [B, H, W, C], float.
    kernel: [C, D], of x's dtype.
    implementation: see `depthwise_conv`; 'shift' is plain XLA here.

  Returns:
    [B, H, W, D], of x's dtype; differentiable in both (reverse mode).

  Raises:
    ValueError: unknown implementation, or shapes or dtypes that do not fit.
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
  y = _pointwise(implementation or "auto", x, kernel)
  return jax.ad_checkpoint.checkpoint_name(y, PRODUCT)


_pointwise = native.bilinear("pointwise", jnp.dot)
