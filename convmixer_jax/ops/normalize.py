"""BatchNorm's functions of images: forward, tangents and gradients.

`affine` normalises by given factors, `conv_affine` does so after a convolution,
in one pass, and `groups` computes the statistics of groups of images.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.interpreters import ad
import jax.numpy as jnp

from convmixer_jax.ops import derivative
from convmixer_jax.ops import native
from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu
from convmixer_jax.ops.depthwise import depthwise_conv
from convmixer_jax.ops.pointwise import pointwise_conv


def _gelu(x):
  """The exact GELU as PyTorch computes it.

  linen's is written with erfc, which takes three times as long on a CPU.
  """
  return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


# Named scopes of what may need communication between devices: sums over groups
# of images, in both passes, and means over the groups. `plan` looks for them.
STATISTICS = "statistics"
AVERAGES = "running_averages"

# native.cc and tpu_kernels have those of native.ACTIVATIONS.
ACTIVATIONS = {"identity": lambda x: x, "relu": nn.relu, "gelu": _gelu}


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


def _affine_backward(static, args, _, grad):
  x, bias, scale, _, residual = args
  zeros = jnp.zeros_like(scale)
  grad_offset, grad_scale = _grad_sums(static, x, bias, zeros, grad)
  grad_x, grad_bias = input_grad(static, x, bias, scale, zeros, zeros, grad)
  grad_residual = None if residual is None else grad
  return grad_x, grad_bias.sum(0), grad_scale, grad_offset, grad_residual


affine = derivative.differentiable(
  _affine_forward, derivative.tangent_of(_affine_forward), _affine_backward
)


# --- The same of a convolution, in one pass; scale, offset: [C].

# Operation -> its name, with all of this in its last store, in native.cc.
FUSED: dict[Any, str] = {
  depthwise_conv: "depthwise_norm",
  pointwise_conv: "pointwise_norm",
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def conv_affine(static, operation, x, kernel, bias, scale, offset, residual):
  """act(operation(x, kernel) + bias) * scale + offset + residual."""
  has_residual = residual is not None

  def plain(act, *args):
    del act  # `affine` applies it.
    args = args if has_residual else (*args[:-1], None)
    return (_two_passes(static, operation, *args),)

  name = FUSED[operation]
  args = x, kernel, bias, scale, offset, residual if has_residual else x
  (y,) = _dispatch(static, name, plain, *args, has_residual=has_residual)
  return y


def _two_passes(static, operation, x, kernel, bias, scale, offset, residual):
  """The same in two passes, which can be differentiated."""
  y = operation(x, kernel, implementation=static[0])
  by_image = lambda v: jnp.broadcast_to(v, (y.shape[0], y.shape[-1]))
  return affine(static, y, bias, by_image(scale), by_image(offset), residual)


conv_affine.defjvp(
  lambda static, operation, args, tangents: jax.jvp(
    functools.partial(_two_passes, static, operation), args, tangents
  )
)


# --- The same with the statistics of each group.


def _by_group(x, group):
  return x.reshape(-1, group, x.shape[-1])


def _statistics(group, pixels, means, squares):
  """Of images' moments [B, C]: groups' means and variances [B / group, C]."""
  means, squares = _by_group(means, group), _by_group(squares, group)
  with jax.named_scope(STATISTICS):
    mean = means.mean(1)
    between = jnp.square(means - mean[:, None]).mean(1)
    return mean, squares.mean(1) / pixels + between


def _normalized(static, x, bias, scale, offset, residual, mean, var):
  static, group, epsilon = static
  inverse = lax.rsqrt(var + epsilon)
  by_image = lambda v: jnp.repeat(v, group, axis=0)
  factor = by_image(inverse * scale)
  shift = by_image(offset - mean * inverse * scale)
  return affine(static, x, bias, factor, shift, residual)


def _groups_forward(static, x, bias, scale, offset, residual, center):
  of_images = moments(static[0], x, bias, center)
  pixels = x.shape[1] * x.shape[2]
  mean, var = _statistics(static[1], pixels, *of_images)
  y = _normalized(static, x, bias, scale, offset, residual, mean, var)
  return y, mean, var


def _groups_backward(static, args, kept, grads):
  x, bias, scale, _, residual, center = args
  one_pass = static[0][0] == "pallas" or partition.on_gpu()
  factors = _input_grad_factors(static, x, bias, scale, kept, grads, one_pass)
  p, q, r, grad_scale, grad_offset = factors
  grad_x, grad_bias = input_grad(static[0], x, bias, p, q, r, grads[0])
  return (
    grad_x,
    grad_bias.sum(0),
    grad_scale,
    grad_offset,
    None if residual is None else grads[0],
    None if center is None else jnp.zeros_like(center),
  )


def _input_grad_factors(static, x, bias, scale, kept, grads, one_pass=False):
  """p, q and r of `input_grad`, and the gradients of scale and offset."""
  static, group, epsilon = static
  mean, var = kept
  grad, grad_mean, grad_var = grads
  inverse = lax.rsqrt(var + epsilon)
  by_image = lambda v: jnp.repeat(v, group, axis=0)
  grad_sums = _grad_sums(static, x, bias, by_image(mean), grad, one_pass)
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
  return p, q, r, (inverse * products).sum(0), sums.sum(0)


# Returns y, and the groups' means and (biased) variances, [B / group, C]. The
# last argument is None or `center` of `moments`.
groups = derivative.differentiable(
  _groups_forward,
  derivative.tangent_of(_groups_forward),
  _groups_backward,
  keep=lambda y: y[1:],
)


# --- The same after a depthwise convolution, for TPUs. Static is that of
# `groups`, and whether the convolution's input is added to the result.


def _conv_groups_plain(static, x, kernel, bias, scale, offset):
  static, residual = static
  y = depthwise_conv(x, kernel, implementation=static[0][0])
  args = y, bias, scale, offset, x if residual else None, None
  return *groups(static, *args), y, x


def _conv_groups_forward(static, x, kernel, bias, scale, offset):
  static, residual = static
  how, group, _ = static
  # The kernels need x in memory. So that XLA adds this x and computes it only
  # once, it must not know how x was computed.
  x = lax.optimization_barrier(x)

  def plain(x, kernel, bias):
    y = depthwise_conv(x, kernel)
    return y, *moments(how, y, bias)

  y, *of_images = lax.platform_dependent(
    x,
    kernel,
    bias,
    tpu=functools.partial(tpu.conv_moments, how[1]),
    default=plain,
  )
  mean, var = _statistics(group, x.shape[1] * x.shape[2], *of_images)
  residual = x if residual else None
  z = _normalized(static, y, bias, scale, offset, residual, mean, var)
  return z, mean, var, y, x


def _conv_groups_backward(static, args, kept, grads):
  instantiated = tuple(map(ad.instantiate_zeros, grads))
  if not all(isinstance(grad, ad.Zero) for grad in grads[3:]):
    # Of y and x, which `conv_groups` does not return: a second derivative.
    composed = functools.partial(_conv_groups_plain, static)
    return jax.vjp(composed, *args)[1](instantiated)
  static, residual = static
  _, kernel, bias, scale, _ = args
  *kept, y, x = kept
  grads = instantiated[:3]
  p, q, r, grad_scale, grad_offset = _input_grad_factors(
    static, y, bias, scale, kept, grads
  )

  def plain(x, kernel, grad, y, bias, p, q, r):
    grad_y, grad_bias = input_grad(static[0], y, bias, p, q, r, grad)
    grad_x, grad_kernel = jax.vjp(depthwise_conv, x, kernel)[1](grad_y)
    return grad_x + grad if residual else grad_x, grad_kernel, grad_bias

  fused = functools.partial(tpu.conv_norm_vjp, static[0][1], residual)
  function = derivative.with_derivatives_of(
    plain, lambda *args: lax.platform_dependent(*args, tpu=fused, default=plain)
  )
  args = x, kernel, grads[0], y, bias, p, q, r
  grad_x, grad_kernel, grad_bias = function(*args)
  return grad_x, grad_kernel, grad_bias.sum(0), grad_scale, grad_offset


_conv_groups = derivative.differentiable(
  _conv_groups_forward,
  derivative.tangent_of(_conv_groups_plain),
  _conv_groups_backward,
  keep=lambda y: y[1:],
  symbolic_zeros=True,
)


def conv_groups(*args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(static, x, kernel, bias, scale, offset) -> what `groups` returns."""
  return _conv_groups(*args)[:3]


# --- The passes over images that the functions above use.


def _dispatch(static, name, plain, *args, more=(), **attributes):
  implementation, activation = static
  plain = fused = functools.partial(plain, ACTIVATIONS[activation])
  if activation in native.ACTIVATIONS:
    attributes["activation"] = native.ACTIVATIONS.index(activation)
    call = functools.partial(native.call, name, **attributes)
    fused = derivative.with_derivatives_of(
      plain, lambda *all_args: tuple(call(*all_args[: len(args)]))
    )
  return native.dispatch(
    implementation, *args, *more, native=fused, shift=plain, xla=plain
  )


def _apart(x):
  """x for a pass of its own, whose activation no other pass shares.

  XLA for GPUs would write it in float32: it takes erf for slower than memory.
  """
  return lax.optimization_barrier(x) if partition.on_gpu() else x


def moments(static, x, bias, center=None):
  """Mean and sum of squared differences from it of act(x + bias): [B, C].

  With a number near the mean, XLA needs one pass instead of two. On GPUs that
  is the mean of the first row, otherwise `center` [C] if it is given.
  """

  def plain(act, x, bias, center=None):
    activated = lambda x: act(native.widened(x) + bias)
    a = activated(_apart(x))
    near = activated(x[:, :1]).mean((1, 2)) if partition.on_gpu() else center
    if near is not None:
      a -= near[..., None, None, :]
      total, squares = a.sum((1, 2)), (a * a).sum((1, 2))
      mean = total / (x.shape[1] * x.shape[2])
      return mean + near, jnp.maximum(squares - total * mean, 0)
    mean = a.mean((1, 2), keepdims=True)
    return mean[:, 0, 0], jnp.square(a - mean).sum((1, 2))

  more = () if center is None else (center,)
  return _dispatch(static, "moments", plain, x, bias, more=more)


def _grad_sums(static, x, bias, mean, grad, one_pass=False):
  """Sums of grad, and of grad * (act(x + bias) - mean): [B, C].

  XLA computes these with the operation that computes grad, if that is one of
  its own. `one_pass` is for another: then XLA would make a pass for each sum.
  """

  def plain(act, x, bias, mean, grad):
    grad = native.widened(grad)
    centred = act(native.widened(_apart(x)) + bias) - mean[:, None, None]
    if one_pass:
      return derivative.sums_in_one_pass(grad, grad * centred)
    return grad.sum((1, 2)), (grad * centred).sum((1, 2))

  return _dispatch(static, "grad_sums", plain, x, bias, mean, grad)


def input_grad(static, x, bias, p, q, r, grad):
  """(p * grad + q * act(x + bias) + r) * act'(x + bias), and sums: [B, C]."""

  def plain(act, x, bias, p, q, r, grad):
    a, vjp = jax.vjp(act, native.widened(_apart(x)) + bias)
    p, q, r = (v[:, None, None] for v in (p, q, r))
    (grad_x,) = vjp(native.widened(grad) * p + a * q + r)
    result = grad_x.astype(x.dtype)
    if result.dtype != grad_x.dtype and partition.on_gpu():
      grad_x = native.widened(_apart(result))  # XLA would write it in float32.
    return result, grad_x.sum((1, 2))

  return _dispatch(static, "input_grad", plain, x, bias, p, q, r, grad)
