"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022).

A patch embedding, `depth` identical blocks at constant width and resolution,
global average pooling and a linear head:

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, H/p, W/p, dim]
  block   depthwise k x k convolution: mixes locations, one channel at a time,
            with a residual connection around it
          pointwise convolution: mixes channels, one location at a time
  head    mean over locations, then one linear layer -> [B, num_classes]

Every convolution is followed by the activation, by BatchNorm and, if there is
one, by the addition of the residual, in this order. A norm takes the
convolution before it and the residual, so that all of it can be one operation;
see `layers`. Weights start as PyTorch's do, uniform in +-1/sqrt(fan_in).
"""

from collections.abc import Mapping
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.models import layers
from convmixer_jax.models import stack

NORMS = {"batch": ops.BatchNorm, "layer": layers.LayerNorm}


class Block(nn.Module):
  """One block: [B, H, W, dim] -> the same shape. See ConvMixer's attributes."""

  conv: Any  # layers.Conv and layers.PointwiseConv, with their features;
  pointwise_conv: Any  # an entry of NORMS, with the activation.
  norm: Any
  kernel_size: int
  depthwise_residual: bool
  pointwise_residual: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    k, dim = self.kernel_size, x.shape[-1]
    conv = self.conv((k, k), feature_group_count=dim, name="depthwise")
    residual = x if self.depthwise_residual else None
    x = self.norm(name="depthwise_norm")(x, train, conv=conv, residual=residual)

    conv = self.pointwise_conv(name="pointwise")
    residual = x if self.pointwise_residual else None
    return self.norm(name="pointwise_norm")(
      x, train, conv=conv, residual=residual
    )


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
    pooled_stem: the stem's convolution has stride 1, and a mean over each p x p
      window follows it (an ablation: is it the patches?).
    bn_group_size: see `ops.BatchNorm`.
    scan: run the blocks under one `nn.scan`; see `stack.apply_blocks`.
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
  pooled_stem: bool = False
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
      images: [B, H, W, C], normalised floats; H and W may change between calls.
      train: normalise by batch statistics and update the running ones (apply
        with mutable=['batch_stats']).
      return_features: stop before pooling and the head.
      num_blocks: with return_features, stop after this number of blocks, 0 to
        depth; None is all of them.

    Returns:
      [B, num_classes] float32, or features [B, H // p, W // p, dim] in `dtype`.
    """
    if num_blocks is not None and not return_features:
      raise ValueError(f"num_blocks={num_blocks}: needs return_features")
    # What all layers share.
    conv = functools.partial(layers.Conv, self.dim, dtype=self.dtype)
    norm = functools.partial(
      NORMS[self.norm],
      activation=self.activation,
      implementation=self.implementation,
    )
    if self.norm == "batch":
      norm = functools.partial(norm, group_size=self.bn_group_size)

    p = self.patch_size
    strides, padding = (1, "SAME") if self.pooled_stem else (p, "VALID")
    stem = conv((p, p), strides=strides, padding=padding, name="stem")
    x = norm(name="stem_norm")(images, train, conv=stem)
    if self.pooled_stem:
      x = nn.avg_pool(x, (p, p), (p, p))
    block = functools.partial(
      Block,
      conv,
      functools.partial(layers.PointwiseConv, self.dim, dtype=self.dtype),
      norm,
      self.kernel_size,
      depthwise_residual=self.depthwise_residual,
      pointwise_residual=self.pointwise_residual,
    )
    x = stack.apply_blocks(
      self, block, self.depth, x, train, num_blocks=num_blocks
    )
    if return_features:
      return x
    x = x.astype(jnp.float32).mean((1, 2))
    return layers.dense(self.num_classes, self.dim, name="head")(x)

  def check(self, image_size: int) -> None:
    """Raises UserError if an image of that side has no whole patch."""
    layers.check_patch(self.patch_size, image_size)


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = ConvMixer


def _size(dim, depth, patch_size, kernel_size, **more):
  more |= dict(patch_size=patch_size, kernel_size=kernel_size)
  return dict(dim=dim, depth=depth, **more)


# Every size of the paper's tables, named dim_depth; the published three have
# timm's names. 256_8 and 128_4 are the CIFAR-10 models. Other patch and kernel
# sizes of a table are overrides.
VARIANTS: dict[str, dict[str, Any]] = {
  "convmixer_1536_20": _size(1536, 20, 7, 9),
  "convmixer_768_32": _size(768, 32, 7, 7, activation="relu"),
  "convmixer_1024_20_ks9_p14": _size(1024, 20, 14, 9),
  "convmixer_1024_16": _size(1024, 16, 7, 9),
  "convmixer_1024_12": _size(1024, 12, 7, 8),
  "convmixer_512_16": _size(512, 16, 7, 8),
  "convmixer_512_12": _size(512, 12, 7, 8),
  "convmixer_256_8": _size(256, 8, 1, 9),
  "convmixer_128_4": _size(128, 4, 1, 8),
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What published weights expect of images; the same for all variants."""
  del name
  return layers.IMAGENET | {"crop_pct": 0.96}


# timm's module, ours, and the kind of layer.
TORCH_NAMES = (
  ("stem.0", "stem", "conv"),
  ("stem.2", "stem_norm", "norm"),
  ("blocks.{i}.0.fn.0", "block_{i}/depthwise", "conv"),
  ("blocks.{i}.0.fn.2", "block_{i}/depthwise_norm", "norm"),
  ("blocks.{i}.1", "block_{i}/pointwise", "pointwise"),
  ("blocks.{i}.3", "block_{i}/pointwise_norm", "norm"),
  ("head", "head", "linear"),
)


def timm_module(module: str) -> str:
  """Renames others' modules as timm does.

  Of the paper's nn.Sequential, '3.1' -> 'blocks.0.1'; of mmpretrain,
  'backbone.stages.0.1' -> 'blocks.0.1' and 'head.fc' -> 'head'.
  """
  module = re.sub(r"^(backbone\.)?stages\.", "blocks.", module)
  module = re.sub(r"^backbone\.(?=stem\.)|(?<=^head)\.fc$", "", module)
  index, _, rest = module.partition(".")
  if not re.fullmatch("[0-9]{1,9}", index):
    return module
  if rest:
    return f"blocks.{int(index) - 3}.{rest}"
  return f"stem.{index}" if int(index) < 3 else "head"


num_patches = layers.any_number
at_resolution = layers.any_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a ConvMixer."""
  if "pointwise" not in params.get("block_0", {}):
    return None
  kernel_size, *_ = params["block_0"]["depthwise"]["kernel"].shape
  return layers.sizes(params) | {"kernel_size": kernel_size}


def flops(model: ConvMixer, image_size: int) -> int:
  """FLOPs of the convolutions and the head; the rest is under 1 %."""
  side = image_size // model.patch_size
  stem = 3 * model.patch_size**2 * model.dim
  stem *= model.patch_size**2 if model.pooled_stem else 1
  block = model.kernel_size**2 * model.dim + model.dim**2
  locations = side**2 * (stem + model.depth * block)
  return 2 * (locations + model.dim * model.num_classes)


def describe(model: ConvMixer) -> str:
  """'ConvMixer-1536/20, patch 7, kernel 9'."""
  name = f"ConvMixer-{model.dim}/{model.depth}"
  return f"{name}, patch {model.patch_size}, kernel {model.kernel_size}"
