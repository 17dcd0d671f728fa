"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022).

A patch embedding, `depth` identical blocks at constant width and resolution,
global average pooling and a linear head:

  stem    cuts the image into p x p patches and embeds each one
          [B, H, W, 3] -> [B, H/p, W/p, dim]
  block   depthwise k x k convolution: mixes locations, one channel at a time,
            with a residual connection around it
          pointwise convolution: mixes channels, one location at a time
  head    mean over locations, then one linear layer -> [B, num_classes]

Every convolution is followed by the activation and then by BatchNorm, in this
order. Weights start as PyTorch's do, uniform in +-1/sqrt(fan_in).
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.models import stack

ACTIVATIONS = ("gelu", "relu")
NORMS = ("batch", "layer")


def _init(fan_in: int) -> dict[str, nn.initializers.Initializer]:
  """PyTorch's default for kernel and bias, for layers with that fan-in."""

  def uniform(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return {"kernel_init": uniform, "bias_init": uniform}


def _depthwise(x, kernel, strides, padding, **kwargs):
  """`ops.depthwise_conv` in the form in which `nn.Conv` calls its convolution.

  The padding that nn.Conv would ask for, SAME, is the op's own. The call is
  left to the norm, which at inference does its own work on the way.
  """
  del strides, padding, kwargs
  return functools.partial(ops.depthwise_conv, x, kernel[:, :, 0, :])


def _pointwise(x, kernel, *args, **kwargs):
  """Likewise for `nn.Dense`."""
  del args, kwargs
  return functools.partial(ops.pointwise_conv, x, kernel)


class BiasApart(nn.Module):
  """A layer that leaves its bias to be added with the activation.

  Attributes:
    make_layer: of linen; the variables are the layer's own.
  """

  make_layer: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[Any, jax.Array]:
    """Returns the result without the bias, or its call; and the bias."""
    layer = self.make_layer(use_bias=False)
    nn.share_scope(self, layer)
    y = layer(x)  # Whose kernel is the first parameter drawn, as in linen.
    return y, self.param("bias", layer.bias_init, (layer.features,))


class Block(nn.Module):
  """One ConvMixer block: [B, H, W, dim] -> the same shape."""

  dim: int
  kernel_size: int
  activation: str
  norm: str
  depthwise_residual: bool
  pointwise_residual: bool
  bn_group_size: int
  dtype: Any
  implementation: str | None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    k = self.kernel_size
    y = BiasApart(
      functools.partial(
        nn.Conv,
        self.dim,
        (k, k),
        feature_group_count=self.dim,
        conv_general_dilated=_depthwise,
        dtype=self.dtype,
        **_init(k * k),
      ),
      name="depthwise",
    )(x)
    residual = x if self.depthwise_residual else None
    x = _activate_and_norm(self, y, train, "depthwise_norm", residual)
    y = BiasApart(
      functools.partial(
        nn.Dense,
        self.dim,
        dot_general=_pointwise,
        dtype=self.dtype,
        **_init(self.dim),
      ),
      name="pointwise",
    )(x)
    residual = x if self.pointwise_residual else None
    return _activate_and_norm(self, y, train, "pointwise_norm", residual)


def _activate_and_norm(module, layer, train, name, residual=None):
  """norm(activation(x + bias)) + residual, of what `BiasApart` returned.

  Called inside `module`'s compact method, whose submodule the norm is.
  """
  x, bias = layer
  if module.norm == "batch":
    return ops.BatchNorm(
      module.bn_group_size,
      module.activation,
      implementation=module.implementation,
      name=name,
    )(x, train, bias=bias, residual=residual)
  if callable(x):
    x = x(implementation=module.implementation)
  y = ops.ACTIVATIONS[module.activation](x.astype(jnp.float32) + bias)
  y = nn.LayerNorm(epsilon=1e-5, dtype=module.dtype, name=name)(y)
  return y if residual is None else y + residual


class ConvMixer(nn.Module):
  """ConvMixer-dim/depth.

  Attributes:
    dim: width of every block (the paper's h).
    depth: number of blocks (the paper's d).
    patch_size: side of a patch and stride of the stem. Rows and columns that do
      not fill a patch are dropped, as in PyTorch.
    kernel_size: side of the depthwise kernels; may be even.
    num_classes: size of the head.
    activation: 'gelu' (exact, not the tanh approximation) or 'relu'.
    norm: 'batch', or 'layer' over the channels of each location.
    depthwise_residual: the residual around the depthwise stage (the paper's).
    pointwise_residual: one around the pointwise stage too (an ablation).
    bn_group_size: see `ops.BatchNorm`.
    scan: run the blocks under one `nn.scan`, which compiles faster and stacks
      their variables; see `stack.apply_blocks`.
    remat: None, or what a block keeps for its backward pass; a name from
      `stack.REMAT_POLICIES`.
    dtype: of the computation; parameters and logits are float32.
    implementation: see `ops.depthwise_conv`.
  """

  dim: int
  depth: int
  patch_size: int
  kernel_size: int
  num_classes: int
  activation: str = "gelu"
  norm: str = "batch"
  depthwise_residual: bool = True
  pointwise_residual: bool = False
  bn_group_size: int = 0
  scan: bool = False
  remat: str | None = None
  dtype: Any = jnp.float32
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    train: bool,
    return_features: bool = False,
    num_blocks: int | None = None,
  ) -> jax.Array:
    """Returns logits, or a map of features.

    Args:
      images: [B, H, W, C], normalised floats.
      train: normalise by batch statistics and update the running ones (apply
        with mutable=['batch_stats']).
      return_features: stop before the head, which pools by the mean over both
        axes.
      num_blocks: with return_features, stop after so many blocks, 0 to depth;
        None is all of them.

    Returns:
      [B, num_classes] float32, or features [B, H // p, W // p, dim]. H and W
      need not be those of training.
    """
    if num_blocks is not None and not (
      return_features and 0 <= num_blocks <= self.depth
    ):
      raise ValueError(
        f"num_blocks={num_blocks}: must be from 0 to {self.depth}, with"
        " return_features"
      )
    p = self.patch_size
    y = BiasApart(
      functools.partial(
        nn.Conv,
        self.dim,
        (p, p),
        strides=p,
        padding="VALID",
        dtype=self.dtype,
        **_init(p * p * images.shape[-1]),
      ),
      name="stem",
    )(images)
    x = _activate_and_norm(self, y, train, "stem_norm")

    block = Block
    if self.remat is not None:
      block = stack.rematerialized(Block, self.remat, self.scan)
    block = functools.partial(
      block,
      self.dim,
      self.kernel_size,
      self.activation,
      self.norm,
      self.depthwise_residual,
      self.pointwise_residual,
      self.bn_group_size,
      self.dtype,
      self.implementation,
    )
    x = stack.apply_blocks(
      self,
      block,
      self.depth,
      x,
      train,
      scan=self.scan,
      num_blocks=num_blocks,
    )
    if return_features:
      return x

    x = x.astype(jnp.float32).mean((1, 2))
    return nn.Dense(self.num_classes, name="head", **_init(self.dim))(x)
