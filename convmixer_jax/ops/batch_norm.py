"""A convolution's bias, activation, BatchNorm and residual, as one operation.

BatchNorm has PyTorch's constants, and statistics over groups of the batch.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.ops import native
from convmixer_jax.ops import normalize
from convmixer_jax.ops import tpu
from convmixer_jax.ops.depthwise import depthwise_conv


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
  activation. At inference the convolution's last store does everything else. In
  training, a depthwise convolution's kernels for TPUs do much of it.

  Attributes:
    group_size: images per group; 0 means the whole batch, over all devices
      ("synchronised" BatchNorm).
    activation: key of `normalize.ACTIVATIONS`.
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
    operation, residual_is_x = None, residual is x
    if conv is None:
      kernel, bias = x, jnp.zeros(x.shape[-1])
    else:
      operation, x, kernel, bias = conv.operands(x)
      if train:
        fused = (
          self.implementation == "pallas"
          and operation is depthwise_conv
          and (residual is None or residual_is_x)
          and tpu.supported(x, kernel, self.activation)
        )
      else:
        fused = operation in normalize.FUSED
      if not fused:
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
        return normalize.conv_affine(static, operation, *args)
      by_image = lambda v: jnp.broadcast_to(v, (batch, channels))
      scale, offset = by_image(scale), by_image(offset)
      return normalize.affine(static, x, bias, scale, offset, residual)

    group = self.group_size or batch
    if group < 1 or batch % group:
      raise ValueError(f"a batch of {batch} is not whole groups of {group}")
    static = static, group, self.epsilon
    if operation is not None:
      static = static, residual_is_x
      args = x, kernel, bias, scale, offset
      y, mean, var = normalize.conv_groups(static, *args)
    else:
      center = running_mean.value if self.implementation == "pallas" else None
      args = x, bias, scale, offset, residual, center
      y, mean, var = normalize.groups(static, *args)
    if not self.is_initializing():
      n = group * x.shape[1] * x.shape[2]
      with jax.named_scope(normalize.AVERAGES):
        new = mean, var * (n / max(n - 1, 1))
        for running, value in zip((running_mean, running_var), new):
          step = (1 - self.momentum) * (value.mean(0) - running.value)
          running.value += step.astype(running.value.dtype)
    return y
