"""ResNet (He et al., "Deep Residual Learning", 2016), with bottlenecks.

The pyramid that isotropic models do without: four stages, each of half the
resolution and twice the width of the one before.

  stem    7 x 7 convolution, stride 2; BatchNorm; ReLU; 3 x 3 max pool, stride 2
            [B, H, W, 3] -> [B, H/4, W/4, 64]
  block   1 x 1, 3 x 3 and 1 x 1 convolutions, each followed by BatchNorm; ReLU
            after all but the last, and after the sum with the block's input
          the 3 x 3 convolution mixes locations and channels, at a quarter of
            the block's width; it has the stride (as in PyTorch, "v1.5")
  head    mean over locations, linear -> [B, num_classes]
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import ops
from convmixer_jax.errors import UserError
from convmixer_jax.models import layers

EXPANSION = 4  # Width of a block's result over that of its 3 x 3 convolution.
# He et al.'s, of all convolutions; the head starts as PyTorch's layers do.
INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(nn.Module):
  """[B, H, W, C] -> [B, H / strides, W / strides, EXPANSION * width]."""

  width: int
  strides: int
  conv: Any  # _conv and layers.PointwiseConv, without their features.
  pointwise_conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    norm, s = self.norm, self.strides
    out = EXPANSION * self.width
    conv = self.pointwise_conv(self.width, name="conv1")
    y = nn.relu(norm(name="norm1")(x, train, conv=conv))
    y = self.conv(self.width, 3, s, name="conv2")(y)
    y = nn.relu(norm(name="norm2")(y, train))
    if s > 1 or x.shape[-1] != out:
      conv = self.pointwise_conv(out, name="shortcut")
      x = norm(name="shortcut_norm")(x[:, ::s, ::s], train, conv=conv)
    # A block starts as the identity.
    conv = self.pointwise_conv(out, name="conv3")
    last = norm(scale_init=nn.initializers.zeros, name="norm3")
    return nn.relu(last(y, train, conv=conv, residual=x))


class ResNet(nn.Module):
  """ResNet.

  Attributes:
    depths: number of blocks in each stage.
    widths: of the 3 x 3 convolutions in each stage.
    num_classes: size of the head.
    patch_size: None: the stem above. Otherwise the stem embeds patches of this
      side (an ablation: is it the patches?).
    pooled_stem: the patches' convolution has stride 1, and a mean over each
      p x p window follows it.
    bn_group_size: see `ops.BatchNorm`.
    dtype: of the computation; parameters and logits are float32.
    implementation: see `ops.BatchNorm`.
  """

  depths: Sequence[int]
  widths: Sequence[int]
  num_classes: int
  patch_size: int | None = None
  pooled_stem: bool = False
  bn_group_size: int = 0
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
    conv = functools.partial(_conv, dtype=self.dtype)
    pointwise_conv = functools.partial(
      layers.PointwiseConv, use_bias=False, kernel_init=INIT, dtype=self.dtype
    )
    norm = functools.partial(
      ops.BatchNorm, self.bn_group_size, implementation=self.implementation
    )
    p = self.patch_size
    shape = (7, 2) if p is None else (p, p, "VALID")
    if self.pooled_stem:
      shape = (p, 1, "SAME")
    x = conv(64, *shape, name="stem")(images)
    x = nn.relu(norm(name="stem_norm")(x, train))
    if p is None:
      x = max_pool(x)
    elif self.pooled_stem:
      x = nn.avg_pool(x, (p, p), (p, p))
    blocks = [
      (stage, block, 2 if stage > 1 and block == 0 else 1)
      for stage, depth in enumerate(self.depths, 1)
      for block in range(depth)
    ]
    for stage, block, strides in itertools.islice(blocks, num_blocks):
      name = f"stage_{stage}_block_{block}"
      width = self.widths[stage - 1]
      x = Block(width, strides, conv, pointwise_conv, norm, name=name)(x, train)
    if return_features:
      return x
    x = x.astype(jnp.float32).mean((1, 2))
    return layers.dense(self.num_classes, x.shape[-1], name="head")(x)

  def check(self, image_size: int) -> None:
    """Raises UserError unless there is a width for each stage, and a patch."""
    if len(self.depths) != len(self.widths):
      raise UserError(
        f"config.model.depths={self.depths}: must have as many values as"
        f" config.model.widths={self.widths}"
      )
    if self.pooled_stem and self.patch_size is None:
      raise UserError("config.model.pooled_stem: needs config.model.patch_size")
    layers.check_patch(self.patch_size or 1, image_size)


def max_pool(x: jax.Array) -> jax.Array:
  """Window 3, stride 2, padding 1: [B, H, W, C] -> [B, (H+1)//2, (W+1)//2, C].

  As nn.max_pool for x >= 0: of equal values the first gets the gradient. That
  function's gradient takes several times as long on CPUs.
  """
  for axis in (2, 1):  # So that the first row comes before the first column.
    windows = (x.shape[axis] + 1) // 2
    x = jnp.pad(x, [2 * (int(axis == i),) for i in range(4)])
    parts = [
      jax.lax.slice_in_dim(x, i, i + 2 * windows - 1, 2, axis) for i in range(3)
    ]
    x = functools.reduce(_later_if_larger, parts)
  return x


def _later_if_larger(x, y):
  return jnp.where((y > x) | jnp.isnan(y), y, x)


def _conv(features, size, strides=1, padding=None, **kwargs):
  """Pads by (size - 1) / 2 on both sides, as PyTorch's ResNet does.

  SAME would pad less at the top and left where the stride is 2.
  """
  return nn.Conv(
    features,
    (size, size),
    strides,
    padding=padding or (size - 1) // 2,
    use_bias=False,
    kernel_init=INIT,
    **kwargs,
  )


# --- The family, as the rest of the code knows it: see models/__init__.py.

MODEL = ResNet
VARIANTS: dict[str, dict[str, Any]] = {
  f"resnet{depth}": dict(depths=depths, widths=(64, 128, 256, 512))
  for depth, depths in (
    (50, (3, 4, 6, 3)),
    (101, (3, 4, 23, 3)),
    (152, (3, 8, 36, 3)),
  )
}


def preprocessing(name: str | None) -> dict[str, Any]:
  """What timm's weights (tag a1_in1k) expect of images."""
  del name
  return layers.IMAGENET | {"crop_pct": 0.95}


_BLOCK = "layer{i}.{j}", "stage_{i}_block_{j}"
TORCH_NAMES = (
  ("conv1", "stem", "conv"),
  ("bn1", "stem_norm", "norm"),
  (f"{_BLOCK[0]}.conv1", f"{_BLOCK[1]}/conv1", "pointwise"),
  (f"{_BLOCK[0]}.conv2", f"{_BLOCK[1]}/conv2", "conv"),
  (f"{_BLOCK[0]}.conv3", f"{_BLOCK[1]}/conv3", "pointwise"),
  (f"{_BLOCK[0]}.bn{{k}}", f"{_BLOCK[1]}/norm{{k}}", "norm"),
  (f"{_BLOCK[0]}.downsample.0", f"{_BLOCK[1]}/shortcut", "pointwise"),
  (f"{_BLOCK[0]}.downsample.1", f"{_BLOCK[1]}/shortcut_norm", "norm"),
  ("fc", "head", "linear"),
)
timm_module = str
num_patches = layers.any_number
at_resolution = layers.any_resolution


def infer(params: Mapping[str, Any]) -> dict[str, Any] | None:
  """Arguments that the shapes imply; None if this is not a ResNet."""
  depths, widths = {}, {}
  for module, leaves in params.items():
    if match := re.fullmatch(r"stage_(\d+)_block_(\d+)", module):
      stage = int(match[1])
      depths[stage] = depths.get(stage, 0) + 1
      widths[stage] = leaves["conv2"]["kernel"].shape[-1]
  if not depths:
    return None
  side = params["stem"]["kernel"].shape[0]  # 7 is taken for the usual stem.
  head = params.get("head")
  return {
    "depths": tuple(depths[stage] for stage in sorted(depths)),
    "widths": tuple(widths[stage] for stage in sorted(widths)),
    "patch_size": None if side == 7 else side,
    "num_classes": head["kernel"].shape[-1] if head else None,
  }


def flops(model: ResNet, image_size: int) -> int:
  """FLOPs of the convolutions and the head; the rest is under 1 %."""
  half = lambda side: -(-side // 2)
  p, channels = model.patch_size, 64
  side = half(image_size) if p is None else image_size // p
  pixels = side * (p if model.pooled_stem else 1)
  total = pixels**2 * (p or 7) ** 2 * 3 * channels
  side = half(side) if p is None else side
  for stage, (depth, width) in enumerate(zip(model.depths, model.widths)):
    out = EXPANSION * width
    for block in range(depth):
      total += side**2 * channels * width
      if shrinks := stage > 0 and block == 0:
        side = half(side)
      total += side**2 * (9 * width**2 + width * out)
      if shrinks or channels != out:
        total += side**2 * channels * out
      channels = out
  return 2 * (total + channels * model.num_classes)


def describe(model: ResNet) -> str:
  """'ResNet-50'; other depths and widths are listed."""
  name = f"ResNet-{3 * sum(model.depths) + 2}"
  if tuple(model.widths) != (64, 128, 256, 512):
    name += f", widths {', '.join(map(str, model.widths))}"
  return (
    name if model.patch_size is None else f"{name}, patch {model.patch_size}"
  )
