"""RandAugment in two dialects: timm's and torchvision's.

A policy is a string:

  rand-m9-mstd0.5-inc1      timm's: 2 operations of 15, each applied with
                            probability 0.5, at a magnitude from N(9, 0.5)
                            clipped to [0, 10]; inc1: all grow with it
  torchvision-n2-m12        torchvision's RandAugment(2, 12): 14 operations and
                            the identity among them, always applied, of 31 bins

timm's also has n (number of operations), p (probability) and mmax; both may end
in a colon and the operations to draw from: rand-m9-inc1:Rotate,ShearX.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from convmixer_jax.augment import color
from convmixer_jax.augment import geometry
from convmixer_jax.errors import UserError

GEOMETRIC_OPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

# (level [B], sign [B], (height, width)) -> argument [B], of apply_ops's.
_Argument = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]


def _share(most: float) -> _Argument:
  return lambda level, sign, size: sign * level * most


def _none(level, sign, size):
  return jnp.zeros_like(level)


# A policy's operation -> (what is done, its argument). Levels are in [0, 1].
_TIMM_ENHANCE: _Argument = lambda level, sign, size: jnp.maximum(
  0.1, 1 + sign * (level * 0.9)
)
TIMM: Mapping[str, tuple[str, _Argument]] = {
  "AutoContrast": ("AutoContrast", _none),
  "Equalize": ("Equalize", _none),
  "Invert": ("Invert", _none),
  "Rotate": ("Rotate", _share(30.0)),
  "PosterizeIncreasing": (
    "Posterize",
    lambda level, sign, size: 4 - jnp.floor(level * 4),
  ),
  "SolarizeIncreasing": (
    "Solarize",
    lambda level, sign, size: 256 - jnp.floor(level * 256),
  ),
  "SolarizeAdd": (
    "SolarizeAdd",
    lambda level, sign, size: jnp.minimum(128, jnp.floor(level * 110)),
  ),
  "ColorIncreasing": ("Color", _TIMM_ENHANCE),
  "ContrastIncreasing": ("Contrast", _TIMM_ENHANCE),
  "BrightnessIncreasing": ("Brightness", _TIMM_ENHANCE),
  "SharpnessIncreasing": ("Sharpness", _TIMM_ENHANCE),
  "ShearX": ("ShearX", _share(0.3)),
  "ShearY": ("ShearY", _share(0.3)),
  "TranslateXRel": (
    "TranslateX",
    lambda level, sign, size: sign * level * 0.45 * size[1],
  ),
  "TranslateYRel": (
    "TranslateY",
    lambda level, sign, size: sign * level * 0.45 * size[0],
  ),
}
_ENHANCE: _Argument = lambda level, sign, size: 1 + sign * level * 0.9
# Whole pixels, and the other way round than timm's.
_translate = lambda side: (
  lambda level, sign, size: -sign * jnp.floor(level * (150 / 331 * size[side]))
)
TORCHVISION: Mapping[str, tuple[str, _Argument]] = {
  "Identity": ("Identity", _none),
  "ShearX": ("ShearX", _share(0.3)),
  "ShearY": ("ShearY", _share(0.3)),
  "TranslateX": ("TranslateX", _translate(1)),
  "TranslateY": ("TranslateY", _translate(0)),
  "Rotate": ("Rotate", _share(30.0)),
  "Brightness": ("Brightness", _ENHANCE),
  "Color": ("Color", _ENHANCE),
  "Contrast": ("Contrast", _ENHANCE),
  "Sharpness": ("Sharpness", _ENHANCE),
  "Posterize": (
    "Posterize",
    lambda level, sign, size: 8 - jnp.round(level * 4),
  ),
  "Solarize": (
    "Solarize",
    # Of a value x, x < 255 - 255 level: whole thresholds, rounded up.
    lambda level, sign, size: jnp.ceil(255 - 255 * level),
  ),
  "AutoContrast": ("AutoContrast", _none),
  "Equalize": ("Equalize", _none),
}


@dataclasses.dataclass(frozen=True)
class Policy:
  """What `parse` read.

  Attributes:
    ops: of the dialect; drawn uniformly, with replacement.
    num_ops: drawn for each image.
    prob: of applying one that was drawn.
    mean: of the level, in [0, 1].
    std: of the level.
    high: highest level.
    smooth: resample bilinearly or bicubically, by a fair coin; otherwise the
      nearest pixel is taken.
  """

  ops: Mapping[str, tuple[str, _Argument]]
  num_ops: int
  prob: float
  mean: float
  std: float
  high: float
  smooth: bool


def parse(policy: str) -> Policy:
  """Reads a policy such as 'rand-m9-mstd0.5-inc1' or 'torchvision-n2-m12'.

  Raises:
    UserError: naming the part that does not parse.
  """
  settings, colon, names = policy.partition(":")
  dialect, *parts = settings.split("-")
  if dialect not in _DIALECTS:
    raise _error(policy, dialect, f"it starts with {' or '.join(_DIALECTS)}")
  ops, known = _DIALECTS[dialect]
  values = {}
  for part in parts:
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
    name = match and match[1]
    if name not in known or name in values:
      raise _error(policy, part, f"{dialect} has {', '.join(known)}, once each")
    value, (low, high) = float(match[2]), known[name]
    if not low <= value <= high:
      raise _error(policy, part, f"{name} is from {low} to {high}")
    if name == "n" and value % 1:
      raise _error(policy, part, "n is whole")
    values[name] = value
  for name in ("m", "inc") if dialect == "rand" else ("m",):
    if name not in values:
      raise _error(policy, settings, f"{name} is missing")
  if colon:
    for name in names.split(","):
      if name not in ops:
        raise _error(policy, name, f"the operations are {', '.join(ops)}")
    ops = {name: ops[name] for name in names.split(",")}
  timm = dialect == "rand"
  bins = 10.0 if timm else 30.0
  return Policy(
    ops,
    num_ops=int(values.get("n", 2)),
    prob=values.get("p", 0.5 if timm else 1.0),
    mean=values["m"] / bins,
    std=values.get("mstd", 0.0) / bins,
    high=values.get("mmax", bins) / bins,
    smooth=timm,
  )


# dialect -> (operations, setting -> range)
_DIALECTS = {
  "rand": (
    TIMM,
    {
      "m": (0, 30),
      "n": (1, 15),
      "p": (0, 1),
      "mstd": (0, 10),
      "mmax": (0, 30),
      "inc": (1, 1),  # timm's other set, in which some shrink, is not here.
    },
  ),
  "torchvision": (TORCHVISION, {"m": (0, 30), "n": (1, 14)}),
}


def _error(policy, part, text):
  return UserError(f"config.augment.randaugment={policy}: {part!r}: {text}")


def apply_policy(
  key: jax.Array, images: jax.Array, policy: Policy, fill: Sequence[int]
) -> jax.Array:
  """Applies random operations, drawn anew for each image.

  Args:
    key: PRNG key.
    images: uint8 [B, H, W, 3].
    policy: from `parse`.
    fill: RGB of what a geometric operation brings in from outside.

  Returns:
    uint8 [B, H, W, 3].
  """
  batch, height, width, _ = images.shape

  def layer(images, key):
    chosen, args, bicubic = draw(key, policy, batch, (height, width))
    return apply_ops(images, chosen, args, fill, bicubic), None

  # A scan, to compile the operations once.
  images, _ = jax.lax.scan(layer, images, jax.random.split(key, policy.num_ops))
  return images


def draw(
  key: jax.Array, policy: Policy, batch: int, size: tuple[int, int]
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array | None]:
  """Draws one operation for each of `batch` images of height and width `size`.

  Returns:
    chosen, args and bicubic; see `apply_ops`.
  """
  op_key, prob_key, level_key, sign_key, filter_key = jax.random.split(key, 5)
  drawn = jax.random.randint(op_key, (batch,), 0, len(policy.ops))
  applied = jax.random.bernoulli(prob_key, policy.prob, (batch,))
  level = policy.mean + policy.std * jax.random.normal(level_key, (batch,))
  level = jnp.clip(level, 0, policy.high)
  sign = jax.random.rademacher(sign_key, (batch,), jnp.float32)
  bicubic = jax.random.bernoulli(filter_key, shape=(batch,))
  chosen, args = {}, jnp.zeros(batch)
  for i, (op, argument) in enumerate(policy.ops.values()):
    chosen[op] = (drawn == i) & applied
    args = jnp.where(chosen[op], argument(level, sign, size), args)
  return chosen, args, bicubic if policy.smooth else None


def apply_ops(
  images: jax.Array,
  chosen: Mapping[str, jax.Array],
  args: jax.Array,
  fill: Sequence[int],
  bicubic: jax.Array | None,
) -> jax.Array:
  """Applies to each image the operation that is chosen for it, if any is.

  Args:
    images: uint8 [B, H, W, 3].
    chosen: operation -> bool [B]: one of `color.TABLE_OPS`,
      `color.ENHANCE_OPS`, `GEOMETRIC_OPS` or 'Identity'.
    args: [B]. Rotate: degrees, counter-clockwise. ShearX, ShearY: pixels per
      pixel. TranslateX, TranslateY: pixels, to the left and up. Others: see
      `color`.
    fill: see `apply_policy`.
    bicubic: see `geometry.affine`.

  Returns:
    uint8 [B, H, W, 3].
  """
  of = lambda ops: {op: chosen[op] for op in ops if op in chosen}
  if table_ops := of(color.TABLE_OPS):
    images = color.lookup(images, table_ops, args)
  if enhance_ops := of(color.ENHANCE_OPS):
    images = color.enhance(images, enhance_ops, args)
  if geometric_ops := of(GEOMETRIC_OPS):
    arg_of = lambda op: jnp.where(geometric_ops.get(op, False), args, 0.0)
    angle = arg_of("Rotate") * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = images.shape[2] / 2, images.shape[1] / 2
    xx, xy = cos, arg_of("ShearX") - sin
    yx, yy = arg_of("ShearY") + sin, cos
    dx = arg_of("TranslateX") + x - cos * x + sin * y
    dy = arg_of("TranslateY") + y - sin * x - cos * y
    matrix = jnp.stack([xx, xy, dx, yx, yy, dy], -1).reshape(-1, 2, 3)
    moved = geometry.affine(images, matrix, fill, bicubic)
    any_chosen = sum(geometric_ops.values()) > 0
    images = jnp.where(any_chosen[:, None, None, None], moved, images)
  return images
