"""Pointwise (1x1) convolution: a product of matrices."""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pointwise(implementation, x, kernel):
  return native.dispatch(
    implementation,
    x,
    kernel,
    native=lambda *args: native.call("pointwise", *args)[0],
    shift=jnp.dot,
    xla=jnp.dot,
  )


def _forward(implementation, x, kernel):
  return _pointwise(implementation, x, kernel), (x, kernel)


def _backward(implementation, residuals, grad):
  plain = lambda x, kernel, grad: jax.vjp(jnp.dot, x, kernel)[1](grad)
  return native.dispatch(
    implementation,
    *residuals,
    grad,
    native=lambda *args: tuple(native.call("pointwise_vjp", *args)),
    shift=plain,
    xla=plain,
  )


_pointwise.defvjp(_forward, _backward)
