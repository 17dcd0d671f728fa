"""ResMLP (Touvron et al., "ResMLP: Feedforward networks", 2021).

An MLP-Mixer without norms: tokens are mixed by one linear layer, and what each
branch adds is scaled by a learned factor for each channel (LayerScale).

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, N, dim]
  block   affine, linear over all N tokens, LayerScale: mixes locations
          affine, MLP, LayerScale: mixes channels
          each adds its result to its input
  head    affine, mean over tokens, linear -> [B, num_classes]

The token layer's kernel is [N, N], so a model has one image size.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.models import layers
from convmixer_jax.models import tokens


class Affine(nn.Module):
  """x * scale + bias for each channel, in place of a norm."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, channels)
    bias = self.param("bias", nn.initializers.zeros, channels)
    return x * scale.astype(self.dtype) + bias.astype(self.dtype)


class Block(nn.Module):
  """[B, N, dim] -> the same shape. See ResMlp's attributes."""

  dim: int
  layer_scale: float
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, noise: tokens.Noise | None = None
  ) -> jax.Array:
    kernel_init = nn.initializers.xavier_uniform()
    scaled = functools.partial(tokens.scaled, self, self.layer_scale)
    mix = nn.Dense(
      x.shape[1], kernel_init=kernel_init, dtype=self.dtype, name="tokens"
    )
    y = Affine(self.dtype, name="token_affine")(x)
    y = scaled(mix(y.swapaxes(1, 2)).swapaxes(1, 2), "token_scale")
    x += tokens.drop_path(y, noise, 0)

    mlp = tokens.Mlp(
      4 * self.dim, kernel_init, nn.initializers.normal(1e-6),
      dropout=self.dropout, dtype=self.dtype, name="channel_mlp",
    )  # fmt: skip
    y = Affine(self.dtype, name="channel_affine")(x)
    y = scaled(mlp(y, noise, 1), "channel_scale")
    return x + tokens.drop_path(y, noise, 1)


class ResMlp(nn.Module):
  """ResMLP.

  Attributes:
    dim: width of every token.
    depth: number of blocks.
    patch_size: side of a patch; it divides the image's.
    num_classes: size of the head.
    layer_scale: what LayerScale starts as.
    dropout: share of the MLPs' activations that training drops.
    drop_path: probability with which training drops a branch of an image, the
      same in all blocks.
    scan: run the blocks under one `nn.scan`; see `stack.apply_blocks`.
    remat: see `stack.apply_blocks`.
    dtype: of the computation; parameters and logits are float32.
  """

  dim: int
  depth: int
  patch_size: int
  num_classes: int
  layer_scale: float = 1e-4
  dropout: float = 0.0
  drop_path: float = 0.0
  scan: bool = False
  remat: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    train: bool,
    return_features: bool = False,
    num_blocks: int | None = None,
  ) -> jax.Array:
    """Returns logits [B, num_classes], or features; see `ConvMixer`."""
    block = functools.partial(
      Block, self.dim, self.layer_scale, self.dropout, self.dtype
    )
    norm = Affine(self.dtype, name="affine")
    return tokens.mlp_logits(
      self, images, train, block, norm, return_features, num_blocks
    )

  def check(self, image_size: int) -> None:
    """Raises UserError unless patches fill an image of that side."""
    tokens.check_square(self, image_size)


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = ResMlp


def _size(dim, depth, patch_size, layer_scale):
  return dict(
    dim=dim, depth=depth, patch_size=patch_size, layer_scale=layer_scale
  )


# timm's names; patch_size=8 makes the paper's /8 models of the first three.
VARIANTS: dict[str, dict[str, Any]] = {
  "resmlp_12_224": _size(384, 12, 16, 1e-4),
  "resmlp_24_224": _size(384, 24, 16, 1e-5),
  "resmlp_36_224": _size(384, 36, 16, 1e-6),
  "resmlp_big_24_224": _size(768, 24, 8, 1e-6),
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What published weights expect of images."""
  del name
  return layers.IMAGENET


TORCH_NAMES = (
  ("stem.proj", "stem", "conv"),
  ("blocks.{i}.norm1", "block_{i}/token_affine", "affine"),
  ("blocks.{i}.linear_tokens", "block_{i}/tokens", "linear"),
  ("blocks.{i}.ls1", "block_{i}/token_scale", "array"),
  ("blocks.{i}.norm2", "block_{i}/channel_affine", "affine"),
  ("blocks.{i}.mlp_channels.fc{j}", "block_{i}/channel_mlp/fc{j}", "linear"),
  ("blocks.{i}.ls2", "block_{i}/channel_scale", "array"),
  ("norm", "affine", "affine"),
  ("head", "head", "linear"),
)
timm_module = str
num_patches = tokens.num_patches
at_resolution = tokens.one_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a ResMLP."""
  if "token_affine" not in params.get("block_0", {}):
    return None
  return layers.sizes(params)


def flops(model: ResMlp, image_size: int) -> int:
  """FLOPs of the linear layers; the rest is under 1 %."""
  n, dim = (image_size // model.patch_size) ** 2, model.dim
  block = n * n * dim + n * 8 * dim**2
  stem = n * 3 * model.patch_size**2 * dim
  return 2 * (stem + model.depth * block + dim * model.num_classes)


def describe(model: ResMlp) -> str:
  """'ResMLP-384/24, patch 16'."""
  return f"ResMLP-{model.dim}/{model.depth}, patch {model.patch_size}"
