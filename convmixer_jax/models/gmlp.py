"""gMLP (Liu et al., "Pay Attention to MLPs", 2021).

One MLP a block, with a gate that mixes locations inside it. Tokens are the
patches of the image, N of them:

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, N, dim]
  block   LayerNorm; linear to 6 dim, GELU: mixes channels
          gate: half of the channels, mixed over all N tokens by one linear
            layer, multiply the other half
          linear back to dim; the block's input is added
  head    LayerNorm, mean over tokens, linear -> [B, num_classes]

The gate's kernel is [N, N], so a model has one image size.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.models import layers
from convmixer_jax.models import tokens

RATIO = 6  # Width of the first linear layer over dim.


class Gate(nn.Module):
  """[B, N, 2 C] -> [B, N, C]: starts as u * (1 + almost nothing)."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    u, v = jnp.split(x, 2, axis=-1)
    v = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(v)
    mix = nn.Dense(
      x.shape[1],
      kernel_init=nn.initializers.normal(1e-6),
      bias_init=nn.initializers.ones,
      dtype=self.dtype,
      name="tokens",
    )
    return u * mix(v.swapaxes(1, 2)).swapaxes(1, 2)


class Block(nn.Module):
  """[B, N, dim] -> the same shape. See GMlp's attributes."""

  mlp: Any  # tokens.Mlp, with its draws, and the gate between its layers.
  norm: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, noise: tokens.Noise | None = None
  ) -> jax.Array:
    y = self.norm(name="norm")(x)
    y = self.mlp(RATIO * x.shape[-1], name="mlp")(y, noise, 0)
    return x + tokens.drop_path(y, noise, 0)


class GMlp(nn.Module):
  """gMLP.

  Attributes:
    dim: width of every token.
    depth: number of blocks.
    patch_size: side of a patch; it divides the image's.
    num_classes: size of the head.
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
    mlp = functools.partial(
      tokens.Mlp,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
      between=functools.partial(Gate, self.dtype, name="gate"),
      dropout=self.dropout,
      dtype=self.dtype,
    )
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    block = functools.partial(Block, mlp, norm)
    return tokens.mlp_logits(
      self, images, train, block, norm(name="norm"), return_features, num_blocks
    )

  def check(self, image_size: int) -> None:
    """Raises UserError unless patches fill an image of that side."""
    tokens.check_square(self, image_size)


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = GMlp
VARIANTS: dict[str, dict[str, Any]] = {
  f"gmlp_{size}16_224": dict(dim=dim, depth=30, patch_size=16)
  for size, dim in (("ti", 128), ("s", 256), ("b", 512))
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What published weights expect of images."""
  del name
  return layers.GOOGLE


_MLP = "blocks.{i}.mlp_channels", "block_{i}/mlp"
TORCH_NAMES = (
  ("stem.proj", "stem", "conv"),
  ("blocks.{i}.norm", "block_{i}/norm", "norm"),
  (f"{_MLP[0]}.fc{{j}}", f"{_MLP[1]}/fc{{j}}", "linear"),
  (f"{_MLP[0]}.gate.norm", f"{_MLP[1]}/gate/norm", "norm"),
  (f"{_MLP[0]}.gate.proj", f"{_MLP[1]}/gate/tokens", "linear"),
  ("norm", "norm", "norm"),
  ("head", "head", "linear"),
)
timm_module = str
num_patches = tokens.num_patches
at_resolution = tokens.one_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a gMLP."""
  if "gate" not in params.get("block_0", {}).get("mlp", {}):
    return None
  return layers.sizes(params)


def flops(model: GMlp, image_size: int) -> int:
  """FLOPs of the linear layers; the rest is under 1 %."""
  n, dim = (image_size // model.patch_size) ** 2, model.dim
  hidden = RATIO * dim
  block = n * (dim * hidden + n * hidden // 2 + hidden // 2 * dim)
  stem = n * 3 * model.patch_size**2 * dim
  return 2 * (stem + model.depth * block + dim * model.num_classes)


def describe(model: GMlp) -> str:
  """'gMLP-256/30, patch 16'."""
  return f"gMLP-{model.dim}/{model.depth}, patch {model.patch_size}"
