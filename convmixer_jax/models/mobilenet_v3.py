"""An isotropic MobileNetV3, in the style of Sandler et al. (arXiv 1909.03205).

The block of MobileNetV3 (Howard et al., 2019) at constant width and resolution,
after a patch embedding. A ConvMixer has neither the inverted bottleneck nor the
squeeze-and-excite.

  stem    embeds each p x p patch     [B, H, W, 3] -> [B, H/p, W/p, dim]
  block   1 x 1 convolution to expansion * dim: mixes channels
          depthwise k x k convolution: mixes locations, one channel at a time
          squeeze-and-excite: scales each channel by a factor that depends on
            the means of all of them
          1 x 1 convolution back to dim; the block's input is added
  head    1 x 1 convolution to expansion * dim, mean over locations, linear to
            head_dim, linear -> [B, num_classes]

Every convolution is followed by BatchNorm, and by h-swish except for the last
of a block. The table of that paper is not at hand. These choices are ours: the
same expansion and kernel size, squeeze-and-excite and h-swish in all blocks;
the head's widths; weights that start as PyTorch's do.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.models import layers
from convmixer_jax.models import stack

SQUEEZE = 4  # The expanded width over that of squeeze-and-excite.


class Block(nn.Module):
  """One block: [B, H, W, dim] -> the same shape. See MobileNetV3."""

  conv: Any  # layers.Conv and layers.PointwiseConv.
  pointwise_conv: Any
  norm: Any
  kernel_size: int
  expansion: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    k, dim = self.kernel_size, x.shape[-1]
    wide = self.expansion * dim
    conv = self.pointwise_conv(wide, name="expand")
    y = nn.hard_swish(self.norm(name="expand_norm")(x, train, conv=conv))

    conv = self.conv(wide, (k, k), feature_group_count=wide, name="depthwise")
    y = nn.hard_swish(self.norm(name="depthwise_norm")(y, train, conv=conv))

    s = y.astype(jnp.float32).mean((1, 2))
    s = nn.relu(layers.dense(wide // SQUEEZE, wide, name="squeeze")(s))
    s = nn.hard_sigmoid(layers.dense(wide, wide // SQUEEZE, name="excite")(s))
    y *= s[:, None, None].astype(y.dtype)

    conv = self.pointwise_conv(dim, name="project")
    return self.norm(name="project_norm")(y, train, conv=conv, residual=x)


class MobileNetV3(nn.Module):
  """Isotropic MobileNetV3.

  Attributes:
    dim: width between the blocks.
    depth: number of blocks.
    patch_size: side of a patch and stride of the stem; see `ConvMixer`.
    kernel_size: side of the depthwise kernels; may be even.
    num_classes: size of the last layer.
    expansion: width inside a block over dim.
    head_dim: width of the layer before the last.
    bn_group_size: see `ops.BatchNorm`.
    scan: run the blocks under one `nn.scan`; see `stack.apply_blocks`.
    remat: see `stack.apply_blocks`.
    dtype: of the computation; parameters and logits are float32.
    implementation: see `ops.depthwise_conv`.
  """

  dim: int
  depth: int
  patch_size: int
  kernel_size: int
  num_classes: int
  expansion: int = 6
  head_dim: int = 1280
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
    """Returns logits [B, num_classes], or features; see `ConvMixer`."""
    conv = functools.partial(layers.Conv, use_bias=False, dtype=self.dtype)
    pointwise_conv = functools.partial(
      layers.PointwiseConv, use_bias=False, dtype=self.dtype
    )
    norm = functools.partial(
      ops.BatchNorm, self.bn_group_size, implementation=self.implementation
    )
    p = self.patch_size
    stem = conv(self.dim, (p, p), strides=p, padding="VALID", name="stem")
    x = nn.hard_swish(norm(name="stem_norm")(images, train, conv=stem))
    x = stack.apply_blocks(
      self,
      functools.partial(
        Block, conv, pointwise_conv, norm, self.kernel_size, self.expansion
      ),
      self.depth,
      x,
      train,
      num_blocks=num_blocks,
    )
    if return_features:
      return x
    wide = self.expansion * self.dim
    last = pointwise_conv(wide, name="last")
    x = nn.hard_swish(norm(name="last_norm")(x, train, conv=last))
    x = x.astype(jnp.float32).mean((1, 2))
    x = nn.hard_swish(layers.dense(self.head_dim, wide, name="neck")(x))
    return layers.dense(self.num_classes, self.head_dim, name="head")(x)

  def check(self, image_size: int) -> None:
    """Raises UserError if an image of that side has no whole patch."""
    layers.check_patch(self.patch_size, image_size)


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = MobileNetV3
VARIANTS: dict[str, dict[str, Any]] = {
  "mobilenetv3_isotropic_192_12": dict(
    dim=192, depth=12, patch_size=16, kernel_size=5
  ),
  "mobilenetv3_isotropic_64_8": dict(
    dim=64, depth=8, patch_size=4, kernel_size=5, expansion=4, head_dim=256
  ),
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """timm's default; no weights are published."""
  del name
  return layers.IMAGENET


# timm has no such model; these are its names for MobileNetV3's layers.
TORCH_NAMES = (
  ("conv_stem", "stem", "conv"),
  ("bn1", "stem_norm", "norm"),
  ("blocks.{i}.conv_pw", "block_{i}/expand", "pointwise"),
  ("blocks.{i}.bn1", "block_{i}/expand_norm", "norm"),
  ("blocks.{i}.conv_dw", "block_{i}/depthwise", "conv"),
  ("blocks.{i}.bn2", "block_{i}/depthwise_norm", "norm"),
  ("blocks.{i}.se.conv_reduce", "block_{i}/squeeze", "pointwise"),
  ("blocks.{i}.se.conv_expand", "block_{i}/excite", "pointwise"),
  ("blocks.{i}.conv_pwl", "block_{i}/project", "pointwise"),
  ("blocks.{i}.bn3", "block_{i}/project_norm", "norm"),
  ("conv_last", "last", "pointwise"),
  ("bn2", "last_norm", "norm"),
  ("conv_head", "neck", "pointwise"),
  ("classifier", "head", "linear"),
)
timm_module = str


num_patches = layers.any_number
at_resolution = layers.any_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a MobileNetV3."""
  block = params.get("block_0", {})
  if "squeeze" not in block:
    return None
  dim, wide = block["expand"]["kernel"].shape
  return layers.sizes(params) | {
    "kernel_size": block["depthwise"]["kernel"].shape[0],
    "expansion": wide // dim,
    "head_dim": params["neck"]["kernel"].shape[-1],
  }


def flops(model: MobileNetV3, image_size: int) -> int:
  """FLOPs of the convolutions and linear layers; the rest is about 1 %."""
  dim, wide = model.dim, model.expansion * model.dim
  locations = (image_size // model.patch_size) ** 2
  block = 2 * dim * wide + model.kernel_size**2 * wide
  excite = 2 * wide * wide // SQUEEZE
  stem = 3 * model.patch_size**2 * dim
  head = model.head_dim * (wide + model.num_classes)
  total = locations * (stem + model.depth * block + dim * wide)
  return 2 * (total + model.depth * excite + head)


def describe(model: MobileNetV3) -> str:
  """'MobileNetV3-192/12 (isotropic), patch 16, kernel 5'."""
  name = f"MobileNetV3-{model.dim}/{model.depth} (isotropic)"
  return f"{name}, patch {model.patch_size}, kernel {model.kernel_size}"
