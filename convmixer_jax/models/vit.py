"""ViT (Dosovitskiy et al., 2021) and DeiT (Touvron et al., 2021).

Attention mixes locations. Tokens are the patches of the image, N of them, and a
class token before them:

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, N + 1, dim]
          adds a learned position embedding to every token
  block   LayerNorm, self-attention: mixes locations, each head by weights of
            its own, which depend on the image
          LayerNorm, MLP: mixes channels, one token at a time
          each adds its result to its input
  head    LayerNorm, the class token, linear -> [B, num_classes]

Only the position embeddings depend on the image size; `at_resolution` fits them
to another.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convmixer_jax.errors import UserError
from convmixer_jax.models import layers
from convmixer_jax.models import stack
from convmixer_jax.models import tokens


class Block(nn.Module):
  """[B, N + 1, dim] -> the same shape. See ViT's attributes."""

  heads: int
  linear: Any  # nn.Dense and tokens.Mlp, with their draws.
  mlp: Any
  norm: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, noise: tokens.Noise | None = None
  ) -> jax.Array:
    dim = x.shape[-1]
    y = self.linear(3 * dim, name="qkv")(self.norm(name="attention_norm")(x))
    y = y.reshape(*x.shape[:2], 3, self.heads, dim // self.heads)
    y = self.linear(dim, name="projection")(_attention(y).reshape(x.shape))
    x += tokens.drop_path(y, noise, 0)

    y = self.mlp(4 * dim, name="mlp")(self.norm(name="mlp_norm")(x), noise, 1)
    return x + tokens.drop_path(y, noise, 1)


def _attention(qkv):
  """Softmax attention of each head: [B, N, 3, heads, C] -> [B, N, heads, C].

  The same as jax.nn.dot_product_attention, in the order of dimensions whose
  products XLA computes faster on CPUs.
  """
  q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # [B, heads, N, C]
  weights = (q @ k.swapaxes(2, 3)).astype(jnp.float32)
  weights = nn.softmax(weights / math.sqrt(q.shape[-1])).astype(v.dtype)
  return (weights @ v).transpose(0, 2, 1, 3)


class ViT(nn.Module):
  """Vision transformer.

  Attributes:
    dim: width of every token.
    depth: number of blocks.
    heads: number of attention heads; it divides dim.
    patch_size: side of a patch; it divides the image's.
    num_classes: size of the head.
    dropout: share of the MLPs' activations that training drops.
    drop_path: probability with which training drops a branch of an image in the
      last block; it rises linearly from 0 in the first.
    scan: run the blocks under one `nn.scan`; see `stack.apply_blocks`.
    remat: see `stack.apply_blocks`.
    dtype: of the computation; parameters and logits are float32.
  """

  dim: int
  depth: int
  heads: int
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
    init = nn.initializers.normal(0.02)
    linear = functools.partial(nn.Dense, kernel_init=init, dtype=self.dtype)
    mlp = functools.partial(
      tokens.Mlp, kernel_init=init, dropout=self.dropout, dtype=self.dtype
    )
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

    fan_in = self.patch_size**2 * images.shape[-1]
    uniform = layers.torch_uniform(fan_in)
    x = tokens.embed(self, images, kernel_init=uniform, bias_init=uniform)
    class_init = nn.initializers.normal(1e-6)
    class_token = self.param("class_token", class_init, (1, 1, self.dim))
    shape = (x.shape[0], *class_token.shape[1:])  # len() needs a known batch.
    class_token = jnp.broadcast_to(class_token.astype(x.dtype), shape)
    x = jnp.concatenate([class_token, x], axis=1)
    x += self.param("positions", init, (1, *x.shape[1:])).astype(x.dtype)
    last = max(self.depth - 1, 1)
    x = stack.apply_blocks(
      self,
      functools.partial(Block, self.heads, linear, mlp, norm),
      self.depth,
      x,
      train,
      num_blocks=num_blocks,
      noise=tokens.noise(
        self, train, [self.drop_path * i / last for i in range(self.depth)]
      ),
    )
    if return_features:
      return tokens.as_map(x[:, 1:])
    x = norm(name="norm")(x)[:, 0].astype(jnp.float32)
    return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)

  def check(self, image_size: int) -> None:
    """Raises UserError unless patches fill the image and heads the width."""
    tokens.check_square(self, image_size)
    if self.dim % self.heads:
      raise UserError(
        f"config.model.heads={self.heads}: must divide config.model.dim="
        f"{self.dim}"
      )


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = ViT


def _size(dim, heads, patch_size, depth=12):
  return dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size)


VARIANTS: dict[str, dict[str, Any]] = {
  "deit_tiny_patch16_224": _size(192, 3, 16),
  "deit_small_patch16_224": _size(384, 6, 16),
  "deit_base_patch16_224": _size(768, 12, 16),
  "vit_tiny_patch16_224": _size(192, 3, 16),
  "vit_small_patch32_224": _size(384, 6, 32),
  "vit_small_patch16_224": _size(384, 6, 16),
  "vit_small_patch8_224": _size(384, 6, 8),
  "vit_base_patch32_224": _size(768, 12, 32),
  "vit_base_patch16_224": _size(768, 12, 16),
  "vit_base_patch8_224": _size(768, 12, 8),
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What published weights expect of images; DeiT's if nothing is known."""
  google = name is not None and name.startswith("vit")
  return (layers.GOOGLE if google else layers.IMAGENET) | {"crop_pct": 0.9}


TORCH_NAMES = (
  ("patch_embed.proj", "stem", "conv"),
  ("cls_token", "class_token", "array"),
  ("pos_embed", "positions", "array"),
  ("blocks.{i}.norm1", "block_{i}/attention_norm", "norm"),
  ("blocks.{i}.attn.qkv", "block_{i}/qkv", "linear"),
  ("blocks.{i}.attn.proj", "block_{i}/projection", "linear"),
  ("blocks.{i}.norm2", "block_{i}/mlp_norm", "norm"),
  ("blocks.{i}.mlp.fc{j}", "block_{i}/mlp/fc{j}", "linear"),
  ("norm", "norm", "norm"),
  ("head", "head", "linear"),
)
timm_module = str


def num_patches(params: Mapping[str, Any]) -> int | None:
  """Number of patches that the position embeddings are for."""
  positions = params.get("positions")
  if positions is None or len(positions.shape) != 3:
    return None  # `weights.match` says what is wrong.
  return positions.shape[1] - 1


def at_resolution(
  params: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Interpolates the position embeddings, as timm does: bicubic, antialiased.

  That of the class token stays.
  """
  there, here = map(num_patches, (params, wanted))
  if there == here or there is None or math.isqrt(there) ** 2 != there:
    return params
  old, new = params["positions"], wanted["positions"]
  grid = tokens.as_map(jnp.asarray(old[:, 1:]))
  side = math.isqrt(new.shape[1] - 1)
  shape = (1, side, side, old.shape[2])
  grid = jax.image.resize(grid, shape, "cubic", antialias=True)
  grid = grid.reshape(1, -1, old.shape[2])
  return params | {"positions": np.concatenate([old[:, :1], grid], axis=1)}


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a ViT.

  No shape tells the heads; all published sizes have 64 channels in each.
  """
  if "class_token" not in params:
    return None
  sizes = layers.sizes(params)
  return sizes | {"heads": max(sizes["dim"] // 64, 1)}


def flops(model: ViT, image_size: int) -> int:
  """FLOPs of the linear layers and of attention; the rest is under 1 %."""
  n, dim = (image_size // model.patch_size) ** 2 + 1, model.dim
  block = n * 12 * dim**2 + 2 * n * n * dim
  stem = (n - 1) * 3 * model.patch_size**2 * dim
  return 2 * (stem + model.depth * block + dim * model.num_classes)


def describe(model: ViT) -> str:
  """'ViT-384/12, 6 heads, patch 16'."""
  name = f"ViT-{model.dim}/{model.depth}, {model.heads} heads"
  return f"{name}, patch {model.patch_size}"
