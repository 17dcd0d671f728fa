"""BatchNorm with PyTorch's constants and with statistics over groups."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
  """Normalises [B, H, W, C] over batch and space, as PyTorch's BatchNorm2d.

  Unlike linen's: the running variance is the unbiased one, n / (n - 1), and the
  batch may be cut into groups of consecutive images that each have their own
  statistics, as the paper's ten GPUs with 64 images each did. The running
  averages then move by the mean of the groups' statistics. Where every group
  lies on one device, the normalisation needs no communication.

  Attributes:
    group_size: images per group; 0 means the whole batch, on however many
      devices it lies ("synchronised" BatchNorm).
    momentum: weight of the old running value (PyTorch's momentum is one minus
      this).
    epsilon: added to the variance.
    dtype: of the result; statistics are always float32. None: the input's.
  """

  group_size: int = 0
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    batch, *_, channels = x.shape
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    dtype = self.dtype or x.dtype

    if not train:
      inverse = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
      y = (x.astype(jnp.float32) - running_mean.value) * inverse + bias
      return y.astype(dtype)

    group = self.group_size or batch
    if batch % group:
      raise ValueError(f"a batch of {batch} is not whole groups of {group}")
    grouped = x.astype(jnp.float32).reshape(batch // group, group, *x.shape[1:])
    axes = (1, 2, 3)
    mean = grouped.mean(axes, keepdims=True)  # [groups, 1, 1, 1, C]
    centred = grouped - mean
    var = jnp.square(centred).mean(axes, keepdims=True)
    if not self.is_initializing():
      n = group * x.shape[1] * x.shape[2]
      unbiased = var * (n / max(n - 1, 1))
      for running, new in ((running_mean, mean), (running_var, unbiased)):
        new = new.mean(0).reshape(channels)
        running.value += (1 - self.momentum) * (new - running.value)
    y = centred * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
    return y.reshape(x.shape).astype(dtype)
