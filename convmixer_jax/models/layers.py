"""Layers that model families share.

A convolution is an argument of the norm that follows it:

  x = norm(name="a_norm")(x, train, conv=Conv(dim, (3, 3), ..., name="a"))

is norm(activation(convolution(x) + bias)). So the norm can fuse all of it at
inference (see `ops.BatchNorm`), and x is always an array.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.errors import UserError

# timm's default preprocessing. mean and std are those of ImageNet's channels,
# for pixels from 0 to 1.
IMAGENET = {
  "image_size": 224,
  "crop_pct": 0.875,
  "mean": (0.485, 0.456, 0.406),
  "std": (0.229, 0.224, 0.225),
}

# The same for weights from Google.
GOOGLE = IMAGENET | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

Operands = tuple[Callable[..., jax.Array], jax.Array, jax.Array, jax.Array]


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for kernels and biases: uniform in +-1/sqrt(fan_in)."""

  def init(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, fan_in: int, **kwargs: Any) -> nn.Dense:
  """A linear layer that starts as PyTorch's does."""
  init = torch_uniform(fan_in)
  return nn.Dense(features, kernel_init=init, bias_init=init, **kwargs)


class Conv(nn.Module):
  """A convolution with `nn.Conv`'s attributes, parameters and shapes.

  Weights start as PyTorch's do. Three kinds are supported:

    depthwise  feature_group_count = features = C, any square kernel, stride 1,
               SAME; even kernels pad one more row and column at the bottom and
               right. Computed by `ops.depthwise_conv`.
    patches    strides = kernel_size, VALID: rows and columns that do not fill a
               patch are dropped.
    full       strides = 1, SAME, over all channels.

  Attributes:
    features: output channels.
    kernel_size: two equal sides.
    strides: 1, or the side of a patch.
    padding: 'VALID' for patches, otherwise 'SAME'.
    feature_group_count: 1 or `features`.
    use_bias: False has no bias.
    dtype: of the computation; parameters are float32.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: str = "SAME"
  feature_group_count: int = 1
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def operands(self, x: jax.Array) -> Operands:
    """Returns operation, x, kernel and bias; see `ops.Convolution`."""
    size, groups = self.kernel_size, self.feature_group_count
    s, square = self.strides, len(size) == 2 and size[0] == size[1] > 0
    kind = s, self.padding, groups
    depthwise = groups == self.features == x.shape[-1]
    depthwise = depthwise and kind == (1, "SAME", groups)
    patches = size == (s, s) and kind == (s, "VALID", 1)
    if not square or not (depthwise or patches or kind == (1, "SAME", 1)):
      raise ValueError(
        "Conv must be depthwise (feature_group_count = features = C, a square"
        " kernel, strides=1, padding='SAME'), of patches (strides = both sides"
        " of the kernel, padding='VALID', feature_group_count=1) or full (a"
        " square kernel, strides=1, padding='SAME', feature_group_count=1), not"
        f" features={self.features}, kernel_size={size}, strides={s},"
        f" padding={self.padding}, feature_group_count={groups} for x {x.shape}"
      )
    shape = (*size, x.shape[-1] // groups, self.features)
    init = torch_uniform(math.prod(shape[:3]))
    kernel = self.param("kernel", init, shape).astype(self.dtype)
    bias = _bias(self, init)
    x = x.astype(self.dtype)
    if depthwise:
      return ops.depthwise_conv, x, kernel[:, :, 0, :], bias
    return functools.partial(_conv, s, self.padding), x, kernel, bias

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H', W', features]."""
    operation, x, kernel, bias = self.operands(x)
    return operation(x, kernel) + bias.astype(self.dtype)


def _bias(conv, init):
  shape = (conv.features,)
  return conv.param("bias", init, shape) if conv.use_bias else jnp.zeros(shape)


def _conv(strides, padding, x, kernel, *, implementation=None):
  """XLA's own on every platform."""
  del implementation
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(strides, strides),
    padding=padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


class PointwiseConv(nn.Module):
  """A 1 x 1 convolution with `nn.Dense`'s attributes, parameters and shapes.

  Attributes:
    features: output channels.
    use_bias: False has no bias.
    kernel_init: of the weights; None: as PyTorch's. The bias is as PyTorch's.
    dtype: of the computation; parameters are float32.
  """

  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def operands(self, x: jax.Array) -> Operands:
    """Returns operation, x, kernel and bias; see `ops.Convolution`."""
    init = torch_uniform(x.shape[-1])
    shape = x.shape[-1], self.features
    kernel = self.param("kernel", self.kernel_init or init, shape)
    bias = _bias(self, init)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    return ops.pointwise_conv, x, kernel, bias

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, features]."""
    operation, x, kernel, bias = self.operands(x)
    return operation(x, kernel) + bias.astype(self.dtype)


class LayerNorm(nn.LayerNorm):
  """norm(activation(conv(x))) + residual over the channels of each location.

  Called like `ops.BatchNorm`, which it can replace. The result has x's dtype;
  linen's attribute `dtype` is refused.
  """

  epsilon: float = 1e-5
  activation: str = "identity"
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool,
    *,
    conv: ops.Convolution | nn.Module | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Returns [B, H', W', D]; see `ops.BatchNorm` for the arguments."""
    del train
    if self.dtype is not None:
      raise ValueError(f"LayerNorm(dtype={self.dtype}): it has x's dtype")
    bias = 0.0
    if conv is not None:
      operation, x, kernel, bias = conv.operands(x)
      x = operation(x, kernel, implementation=self.implementation)
    dtype = x.dtype
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
    x = ops.ACTIVATIONS[self.activation](x + bias)
    y = super().__call__(x).astype(dtype)
    return y if residual is None else y + residual


def check_patch(patch_size: int, image_size: int) -> None:
  """Raises UserError if an image of that side has no whole patch."""
  if patch_size > image_size:
    raise UserError(
      f"config.model.patch_size={patch_size}: larger than"
      f" data.image_size={image_size}"
    )


def sizes(params: Mapping[str, Any]) -> dict[str, Any]:
  """dim, depth, patch_size and num_classes of equal blocks after patches.

  num_classes is None if there is no head. Raises LookupError or ValueError if a
  tensor is missing or has another rank; see `models.infer`.
  """
  patch_size, _, _, dim = params["stem"]["kernel"].shape
  return {
    "dim": dim,
    "depth": sum(module.startswith("block_") for module in params),
    "patch_size": patch_size,
    "num_classes": (
      params["head"]["kernel"].shape[-1] if "head" in params else None
    ),
  }


def any_number(params: Mapping[str, Any]) -> None:
  """`num_patches` of families whose variables do not depend on it."""
  del params


def any_resolution(
  params: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Mapping[str, Any]:
  """`at_resolution` of families whose variables do not depend on it."""
  del wanted
  return params
