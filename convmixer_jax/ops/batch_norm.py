"""A convolution's bias, activation, BatchNorm and residual, as one operation.

BatchNorm has PyTorch's constants, and statistics over groups of the batch.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.ops import derivative
from convmixer_jax.ops import native
from convmixer_jax.ops.depthwise import depthwise_conv
from convmixer_jax.ops.pointwise import pointwise_conv


def _gelu(x):
  """The exact GELU as PyTorch computes it.

  linen's is written with erfc, which takes three times as long on a CPU.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# Named scopes of what may need communication between devices: sums over groups
# of images, in both passes, and means over the groups. `plan` looks for them.
STATISTICS = "statistics"
AVERAGES = "running_averages"

# The order is native.cc's.
ACTIVATIONS = {"identity": lambda x: x, "relu": nn.relu, "gelu": _gelu}


class Convolution(NamedTuple):
  """A convolution that the norm after it computes: see `BatchNorm`.

  Layers with a method `operands` work too; see `models.layers.Conv`.
  """

  operation: Callable[..., jax.Array]  # (x, kernel, implementation=...) -> y
  kernel: jax.Array
  bias: jax.Array

  def operands(self, x: jax.Array) -> tuple[Any, ...]:
    """Returns operation, x, kernel and bias."""
    return self.operation, x, self.kernel, self.bias


class BatchNorm(nn.Module):
  """normalize(activation(conv(x))) + residual, over batch and space.

  It differs from linen's in two ways. The running variance is the unbiased one,
  n / (n - 1). And the batch may be cut into groups of consecutive images that
  each have their own statistics, as on the paper's ten GPUs with 64 images
  each; the running averages then move by the mean of the groups' statistics.
  Where every group lies on one device, the normalisation needs no
  communication.

  The backward pass keeps the convolution's result and recomputes the
  activation. At inference the convolution's last store does everything else.

  Attributes:
    group_size: images per group; 0 means the whole batch, over all devices
      ("synchronised" BatchNorm).
    activation: key of `ACTIVATIONS`.
    momentum: weight of the old running value (PyTorch's momentum is one minus
      this).
    epsilon: added to the variance.
    scale_init: of the scale.
    implementation: see `depthwise_conv`; 'shift' is plain XLA here.
  """

  group_size: int = 0
  activation: str = "identity"
  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool,
    *,
    conv: Convolution | nn.Module | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Returns [B, H', W', D], of x's dtype, computed as `native.widened` says.

    Args:
      x: [B, H, W, C].
      train: normalise by batch statistics, and update the running ones.
      conv: the layer before, [B, H, W, C] -> [B, H', W', D]. None: no layer,
        and D = C.
      residual: [B, H', W', D].

    Raises:
      ValueError: the batch is not a multiple of `group_size`, or mismatched
        shapes.
    """
    operation = None
    if conv is None:
      kernel, bias = x, jnp.zeros(x.shape[-1])
    else:
      operation, x, kernel, bias = conv.operands(x)
      if train or operation not in _FUSED:
        x = operation(x, kernel, implementation=self.implementation)
        operation = None
    batch, channels = x.shape[0], kernel.shape[-1]
    # native.cc reads as much as these shapes say.
    added = None if residual is None else residual.shape
    if (
      x.ndim != 4
      or bias.shape != (channels,)
      or added not in (None, (*x.shape[:3], channels))
    ):
      raise ValueError(
        "BatchNorm takes images [B, H, W, C], a bias [D], and a residual [B, H,"
        f" W, D] or none, not {x.shape}, {bias.shape}, {added}; D is {channels}"
      )
    scale = self.param("scale", self.scale_init, (channels,))
    offset = self.param("bias", nn.initializers.zeros, (channels,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    dtype = native.widened(x).dtype
    bias, scale, offset = (v.astype(dtype) for v in (bias, scale, offset))
    if residual is not None:
      residual = residual.astype(x.dtype)
    static = (self.implementation or "auto", self.activation)

    if not train:
      scale *= jax.lax.rsqrt(running_var.value.astype(dtype) + self.epsilon)
      offset -= running_mean.value.astype(dtype) * scale
      if operation is not None:
        args = x, kernel, bias, scale, offset, residual
        return _conv_affine(static, operation, *args)
      by_image = lambda v: jnp.broadcast_to(v, (batch, channels))
      scale, offset = by_image(scale), by_image(offset)
      return _affine(static, x, bias, scale, offset, residual)

    group = self.group_size or batch
    if group < 1 or batch % group:
      raise ValueError(f"a batch of {batch} is not whole groups of {group}")
    y, mean, var = _normalize_groups(
      (static, group, self.epsilon), x, bias, scale, offset, residual
    )
    if not self.is_initializing():
      n = group * x.shape[1] * x.shape[2]
      with jax.named_scope(AVERAGES):
        new = mean, var * (n / max(n - 1, 1))
        for running, value in zip((running_mean, running_var), new):
          step = (1 - self.momentum) * (value.mean(0) - running.value)
          running.value += step.astype(running.value.dtype)
    return y


# --- y = act(x + bias) * scale + offset + residual; scale, offset: [B, C].


def _affine_forward(static, x, bias, scale, offset, residual):
  has_residual = residual is not None

  def plain(act, x, bias, scale, offset, residual):
    a = act(native.widened(x) + bias)
    y = a * scale[:, None, None] + offset[:, None, None]
    if has_residual:
      y += native.widened(residual)
    return (y.astype(x.dtype),)

  args = x, bias, scale, offset, residual if has_residual else x
  (y,) = _dispatch(static, "normalize", plain, *args, has_residual=has_residual)
  return y


def _affine_tangent(static, args, tangents):
  return jax.jvp(functools.partial(_affine_forward, static), args, tangents)[1]


def _affine_backward(static, args, _, grad):
  x, bias, scale, _, residual = args
  zeros = jnp.zeros_like(scale)
  grad_offset, grad_scale = _grad_sums(static, x, bias, zeros, grad)
  grad_x, grad_bias = _input_grad(static, x, bias, scale, zeros, zeros, grad)
  grad_residual = None if residual is None else grad
  return grad_x, grad_bias.sum(0), grad_scale, grad_offset, grad_residual


_affine = derivative.differentiable(
  _affine_forward, _affine_tangent, _affine_backward
)


# --- The same of a convolution, in one pass; scale, offset: [C].

# Operation -> its name, with all of this in its last store, in native.cc.
_FUSED: dict[Any, str] = {
  depthwise_conv: "depthwise_norm",
  pointwise_conv: "pointwise_norm",
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _conv_affine(static, operation, x, kernel, bias, scale, offset, residual):
  has_residual = residual is not None

  def plain(act, *args):
    del act  # `_affine` applies it.
    args = args if has_residual else (*args[:-1], None)
    return (_two_passes(static, operation, *args),)

  name = _FUSED[operation]
  args = x, kernel, bias, scale, offset, residual if has_residual else x
  (y,) = _dispatch(static, name, plain, *args, has_residual=has_residual)
  return y


def _two_passes(static, operation, x, kernel, bias, scale, offset, residual):
  """The same in two passes, which can be differentiated."""
  y = operation(x, kernel, implementation=static[0])
  by_image = lambda v: jnp.broadcast_to(v, (y.shape[0], y.shape[-1]))
  return _affine(static, y, bias, by_image(scale), by_image(offset), residual)


_conv_affine.defjvp(
  lambda static, operation, args, tangents: jax.jvp(
    functools.partial(_two_passes, static, operation), args, tangents
  )
)


# --- The same with the statistics of each group.


def _by_group(x, group):
  return x.reshape(-1, group, x.shape[-1])


def _groups_forward(static, x, bias, scale, offset, residual):
  static, group, epsilon = static
  # Of each image, [B / group, group, C].
  means, squares = (_by_group(v, group) for v in _moments(static, x, bias))
  pixels = x.shape[1] * x.shape[2]
  with jax.named_scope(STATISTICS):
    mean = means.mean(1)
    between = jnp.square(means - mean[:, None]).mean(1)
    var = squares.mean(1) / pixels + between
  inverse = jax.lax.rsqrt(var + epsilon)
  by_image = lambda v: jnp.repeat(v, group, axis=0)
  factor = by_image(inverse * scale)
  shift = by_image(offset - mean * inverse * scale)
  y = _affine(static, x, bias, factor, shift, residual)
  return y, mean, var


def _groups_tangent(static, args, tangents):
  return jax.jvp(functools.partial(_groups_forward, static), args, tangents)[1]


def _groups_backward(static, args, kept, grads):
  static, group, epsilon = static
  x, bias, scale, _, residual = args
  mean, var = kept
  grad, grad_mean, grad_var = grads
  inverse = jax.lax.rsqrt(var + epsilon)
  by_image = lambda v: jnp.repeat(v, group, axis=0)
  grad_sums = _grad_sums(static, x, bias, by_image(mean), grad)
  with jax.named_scope(STATISTICS):
    sums, products = (_by_group(v, group).sum(1) for v in grad_sums)
  # Of a = act(x + bias) and the normalised â = (a - mean) * inverse, with means
  # over the n values of a group, the gradient is
  #   inverse * scale * (grad - mean(grad) - â * mean(grad * â))
  #   + grad_mean / n + grad_var * 2 * (a - mean) / n
  #   = p * grad + q * a + r.
  n = float(group * x.shape[1] * x.shape[2])  # May exceed 32 bits.
  p = inverse * scale
  q = (2 * grad_var - p * jnp.square(inverse) * products) / n
  r = (grad_mean - p * sums) / n - q * mean
  p, q, r = map(by_image, (p, q, r))
  grad_x, grad_bias = _input_grad(static, x, bias, p, q, r, grad)
  grad_scale = (inverse * products).sum(0)
  grad_residual = None if residual is None else grad
  return grad_x, grad_bias.sum(0), grad_scale, sums.sum(0), grad_residual


# Returns y, and the groups' means and (biased) variances, [B / group, C].
_normalize_groups = derivative.differentiable(
  _groups_forward, _groups_tangent, _groups_backward, keep=lambda y: y[1:]
)


# --- The passes over images that the functions above use.


def _dispatch(static, name, plain, *args, **attributes):
  implementation, activation = static
  index = [*ACTIVATIONS].index(activation)
  plain = functools.partial(plain, ACTIVATIONS[activation])
  call = functools.partial(native.call, name, activation=index, **attributes)
  fused = jax.custom_jvp(lambda *args: tuple(call(*args)))
  fused.defjvp(
    lambda args, tangents: (fused(*args), jax.jvp(plain, args, tangents)[1])
  )
  return native.dispatch(
    implementation, *args, native=fused, shift=plain, xla=plain
  )


def _moments(static, x, bias):
  """Mean and sum of squared differences from it of act(x + bias): [B, C]."""

  def plain(act, x, bias):
    a = act(native.widened(x) + bias)
    mean = a.mean((1, 2), keepdims=True)
    return mean[:, 0, 0], jnp.square(a - mean).sum((1, 2))

  return _dispatch(static, "moments", plain, x, bias)


def _grad_sums(static, x, bias, mean, grad):
  """Sums of grad, and of grad * (act(x + bias) - mean): [B, C]."""

  def plain(act, x, bias, mean, grad):
    grad = native.widened(grad)
    centred = act(native.widened(x) + bias) - mean[:, None, None]
    return grad.sum((1, 2)), (grad * centred).sum((1, 2))

  return _dispatch(static, "grad_sums", plain, x, bias, mean, grad)


def _input_grad(static, x, bias, p, q, r, grad):
  """(p * grad + q * act(x + bias) + r) * act'(x + bias), and sums: [B, C]."""

  def plain(act, x, bias, p, q, r, grad):
    a, vjp = jax.vjp(act, native.widened(x) + bias)
    p, q, r = (v[:, None, None] for v in (p, q, r))
    (grad_x,) = vjp(native.widened(grad) * p + a * q + r)
    return grad_x.astype(x.dtype), grad_x.sum((1, 2))

  return _dispatch(static, "input_grad", plain, x, bias, p, q, r, grad)
