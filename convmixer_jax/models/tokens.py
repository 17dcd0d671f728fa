"""What families of tokens share; a token is a patch of the image."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.errors import UserError
from convmixer_jax.models import stack


def embed(
  model: nn.Module, images: jax.Array, **init: nn.initializers.Initializer
) -> jax.Array:
  """Embeds patches: [B, H, W, C] -> [B, H // p * W // p, model.dim].

  Called in `model`'s compact method. `init` are nn.Conv's; its own defaults
  hold for the rest.
  """
  p = model.patch_size
  stem = nn.Conv(
    model.dim, (p, p), p, padding="VALID", dtype=model.dtype, name="stem",
    **init,
  )  # fmt: skip
  x = stem(images)
  return x.reshape(x.shape[0], -1, x.shape[-1])


def mlp_logits(
  model: nn.Module,
  images: jax.Array,
  train: bool,
  block: Callable[..., nn.Module],
  norm: nn.Module,
  return_features: bool,
  num_blocks: int | None,
) -> jax.Array:
  """The forward pass of models with MLPs alone; `ConvMixer`'s arguments.

  Patch embedding, blocks, `norm`, mean over tokens, and a head that starts at
  0. Drop path has the same rate in all blocks. Called in `model`'s compact
  method.
  """
  x = embed(model, images, kernel_init=nn.initializers.lecun_normal())
  x = stack.apply_blocks(
    model, block, model.depth, x, train, num_blocks=num_blocks,
    noise=noise(model, train, [model.drop_path] * model.depth),
  )  # fmt: skip
  if return_features:
    return as_map(x)
  x = norm(x).astype(jnp.float32).mean(1)
  head_init = nn.initializers.zeros
  return nn.Dense(model.num_classes, kernel_init=head_init, name="head")(x)


def as_map(x: jax.Array) -> jax.Array:
  """Tokens of a square image as a map: [B, S * S, C] -> [B, S, S, C]."""
  side = math.isqrt(x.shape[1])
  return x.reshape(x.shape[0], side, side, x.shape[-1])


class Noise(NamedTuple):
  """The randomness of one block in training.

  Attributes:
    key: of the block.
    rate: of drop path, float32.
  """

  key: jax.Array
  rate: jax.Array


def noise(
  model: nn.Module, train: bool, rates: Sequence[float]
) -> Noise | None:
  """The randomness of all blocks; None if nothing is random.

  Args:
    model: its `dropout` is looked at, and the key is its stream 'dropout'.
    train: False: nothing is random.
    rates: of drop path, of each block.

  Returns:
    key [depth] and rate [depth]. The keys depend on the block's index alone, so
    scanned blocks draw as unrolled ones do.
  """
  if not train or not (any(rates) or model.dropout):
    return None
  key = model.make_rng("dropout")
  fold_in = jax.vmap(lambda i: jax.random.fold_in(key, i))
  return Noise(fold_in(jnp.arange(len(rates))), jnp.asarray(rates, jnp.float32))


def drop_path(x: jax.Array, noise: Noise | None, branch: int) -> jax.Array:
  """Drops a residual branch of some images, and scales it up for the others.

  Args:
    x: [B, ...], the branch's result.
    noise: of the block; None changes nothing.
    branch: its number within the block.
  """
  if noise is None:
    return x
  key = jax.random.fold_in(noise.key, 2 * branch)
  keep = 1 - noise.rate
  kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
  return x * (kept / keep).astype(x.dtype)


def scaled(
  module: nn.Module, start: float, x: jax.Array, name: str
) -> jax.Array:
  """LayerScale: a factor for each channel, in `module`'s compact method."""
  init = nn.initializers.constant(start)
  return x * module.param(name, init, x.shape[-1:]).astype(x.dtype)


class Mlp(nn.Module):
  """Linear, GELU, linear, over the last axis.

  Attributes:
    features: of the layer between.
    kernel_init: of both layers.
    bias_init: of both layers.
    between: None, or makes a module that follows GELU.
    dropout: share of the activations that training drops, after each layer.
    dtype: of the computation; parameters are float32.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  between: Callable[[], nn.Module] | None = None
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, noise: Noise | None = None, branch: int = 0
  ) -> jax.Array:
    """[..., C] -> [..., C]; see `drop_path` for `noise` and `branch`."""
    linear = lambda features, name: nn.Dense(
      features,
      kernel_init=self.kernel_init,
      bias_init=self.bias_init,
      dtype=self.dtype,
      name=name,
    )
    y = ops.ACTIVATIONS["gelu"](linear(self.features, "fc1")(x))
    y = self._drop(y, noise, (branch, 0))
    if self.between is not None:
      y = self.between()(y)
    y = linear(x.shape[-1], "fc2")(y)
    return self._drop(y, noise, (branch, 1))

  def _drop(self, x, noise, place):
    if noise is None or not self.dropout:
      return x
    key = jax.random.fold_in(noise.key, 4 * place[0] + 2 * place[1] + 1)
    kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), 0)


def check_square(model: nn.Module, image_size: int) -> None:
  """Raises UserError unless patches fill an image of that side."""
  if image_size % model.patch_size:
    raise UserError(
      f"config.model.patch_size={model.patch_size}: must divide"
      f" data.image_size={image_size}"
    )


def one_resolution(
  params: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Mapping[str, Any]:
  """`at_resolution` of families with kernels that mix all tokens.

  Returns `params`, or raises UserError if the number of tokens differs.
  """
  there, here = map(num_patches, (params, wanted))
  if there != here:
    raise UserError(
      f"is for images of {there} patches and cannot take {here}: its layers mix"
      " all patches; choose data.image_size and model.patch_size to match"
    )
  return params


def num_patches(params: Mapping[str, Any]) -> int | None:
  """Rows of the kernel that mixes tokens, or of the first of two."""
  block = params["block_0"]
  for path in (("tokens",), ("token_mlp", "fc1"), ("mlp", "gate", "tokens")):
    node = block
    for name in path:
      node = node.get(name, {})
    if "kernel" in node:
      return node["kernel"].shape[0]
  return None
