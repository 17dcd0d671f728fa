"""MLP-Mixer (Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture", 2021).

ConvMixer's ancestor. Tokens are the patches of the image, N of them:

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, N, dim]
  block   token MLP: mixes locations by dense layers over all N tokens, the same
            for every channel
          channel MLP: mixes channels, one token at a time
          each normalises its input first and adds its result to it
  head    LayerNorm, mean over tokens, linear -> [B, num_classes]

The token MLP's kernels have N rows, so a model has one image size.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.models import layers
from convmixer_jax.models import tokens


class Block(nn.Module):
  """[B, N, dim] -> the same shape. See MlpMixer's attributes."""

  mlp: Any  # tokens.Mlp, with its dtype and draws.
  norm: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, noise: tokens.Noise | None = None
  ) -> jax.Array:
    dim = x.shape[-1]
    y = self.norm(name="token_norm")(x).swapaxes(1, 2)  # [B, dim, N]
    y = self.mlp(dim // 2, name="token_mlp")(y, noise, 0).swapaxes(1, 2)
    x += tokens.drop_path(y, noise, 0)

    y = self.norm(name="channel_norm")(x)
    y = self.mlp(4 * dim, name="channel_mlp")(y, noise, 1)
    return x + tokens.drop_path(y, noise, 1)


class MlpMixer(nn.Module):
  """MLP-Mixer.

  Attributes:
    dim: width of every token; a multiple of 2.
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

MODEL = MlpMixer
VARIANTS: dict[str, dict[str, Any]] = {
  f"mixer_{size}{patch_size}_224": dict(
    dim=dim, depth=depth, patch_size=patch_size
  )
  for size, dim, depth in (("s", 512, 8), ("b", 768, 12), ("l", 1024, 24))
  for patch_size in (32, 16)
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What published weights expect of images."""
  del name
  return layers.GOOGLE


TORCH_NAMES = (
  ("stem.proj", "stem", "conv"),
  ("blocks.{i}.norm1", "block_{i}/token_norm", "norm"),
  ("blocks.{i}.mlp_tokens.fc{j}", "block_{i}/token_mlp/fc{j}", "linear"),
  ("blocks.{i}.norm2", "block_{i}/channel_norm", "norm"),
  ("blocks.{i}.mlp_channels.fc{j}", "block_{i}/channel_mlp/fc{j}", "linear"),
  ("norm", "norm", "norm"),
  ("head", "head", "linear"),
)
timm_module = str
num_patches = tokens.num_patches
at_resolution = tokens.one_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not an MLP-Mixer."""
  if "token_mlp" not in params.get("block_0", {}):
    return None
  return layers.sizes(params)


def flops(model: MlpMixer, image_size: int) -> int:
  """FLOPs of the linear layers; the rest is under 1 %."""
  n, dim = (image_size // model.patch_size) ** 2, model.dim
  token_mlp, channel_mlp = 2 * dim * n * (dim // 2), 2 * n * dim * 4 * dim
  stem = n * 3 * model.patch_size**2 * dim
  blocks = model.depth * (token_mlp + channel_mlp)
  return 2 * (stem + blocks + dim * model.num_classes)


def describe(model: MlpMixer) -> str:
  """'MLP-Mixer-768/12, patch 16'."""
  return f"MLP-Mixer-{model.dim}/{model.depth}, patch {model.patch_size}"
