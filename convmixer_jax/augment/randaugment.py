"""RandAugment as timm and as torchvision define it.

A policy is a string:

  rand-m9-mstd0.5-inc1      timm: 2 of 15 operations, each applied with
                            probability 0.5. The magnitude is drawn from
                            N(9, 0.5) and clipped to [0, 10]. inc1: every
                            operation gets stronger with the magnitude.
  torchvision-n2-m12        torchvision's RandAugment(2, 12): 2 of 14
                            operations, one of them the identity, always
                            applied, at magnitude 12 of 0 to 30.

timm's policies may also set n (number of operations), p (probability) and mmax
(maximum magnitude). Both kinds may end with the operations to draw from:
rand-m9-inc1:Rotate,ShearX.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import re

import jax
import jax.numpy as jnp

from convmixer_jax.augment import stages
from convmixer_jax.augment.rows import drawn
from convmixer_jax.augment.rows import Rows
from convmixer_jax.errors import UserError

# (level [B], sign [B], (height, width)) -> argument [B] of `apply_stages`. A
# level is a magnitude scaled to [0, 1].
_Argument = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]

_none = lambda level, *_: jnp.zeros_like(level)
_rotate = lambda level, sign, _: sign * level * 30.0
_shear = lambda level, sign, _: sign * level * 0.3

# timm's arguments.
_timm_enhance = lambda level, sign, _: jnp.maximum(
  0.1, 1 + sign * (level * 0.9)
)
_timm_translate = lambda side: (
  lambda level, sign, size: sign * level * 0.45 * size[side]
)
_timm_posterize = lambda level, *_: 4 - jnp.floor(level * 4)
_timm_solarize = lambda level, *_: 256 - jnp.floor(level * 256)
_timm_solarize_add = lambda level, *_: jnp.minimum(128, jnp.floor(level * 110))

# torchvision's. It translates by whole pixels, with the opposite sign. It
# inverts values that are at least 255 - 255 level. Values are integers, so that
# the ceiling gives the same.
_enhance = lambda level, sign, _: 1 + sign * level * 0.9
_translate = lambda side: (
  lambda level, sign, size: -sign * jnp.floor(level * (150 / 331 * size[side]))
)
_posterize = lambda level, *_: 8 - jnp.round(level * 4)
_solarize = lambda level, *_: jnp.ceil(255 - 255 * level)

# Name in a policy -> (operation of `apply_stages`, its argument).
TIMM: Mapping[str, tuple[str, _Argument]] = {
  "AutoContrast": ("AutoContrast", _none),
  "Equalize": ("Equalize", _none),
  "Invert": ("Invert", _none),
  "Rotate": ("Rotate", _rotate),
  "PosterizeIncreasing": ("Posterize", _timm_posterize),
  "SolarizeIncreasing": ("Solarize", _timm_solarize),
  "SolarizeAdd": ("SolarizeAdd", _timm_solarize_add),
  "ColorIncreasing": ("Color", _timm_enhance),
  "ContrastIncreasing": ("Contrast", _timm_enhance),
  "BrightnessIncreasing": ("Brightness", _timm_enhance),
  "SharpnessIncreasing": ("Sharpness", _timm_enhance),
  "ShearX": ("ShearX", _shear),
  "ShearY": ("ShearY", _shear),
  "TranslateXRel": ("TranslateX", _timm_translate(1)),
  "TranslateYRel": ("TranslateY", _timm_translate(0)),
}
TORCHVISION: Mapping[str, tuple[str, _Argument]] = {
  "Identity": ("Identity", _none),
  "ShearX": ("ShearX", _shear),
  "ShearY": ("ShearY", _shear),
  "TranslateX": ("TranslateX", _translate(1)),
  "TranslateY": ("TranslateY", _translate(0)),
  "Rotate": ("Rotate", _rotate),
  "Brightness": ("Brightness", _enhance),
  "Color": ("Color", _enhance),
  "Contrast": ("Contrast", _enhance),
  "Sharpness": ("Sharpness", _enhance),
  "Posterize": ("Posterize", _posterize),
  "Solarize": ("Solarize", _solarize),
  "AutoContrast": ("AutoContrast", _none),
  "Equalize": ("Equalize", _none),
}


@dataclasses.dataclass(frozen=True)
class Policy:
  """A parsed policy."""

  ops: Mapping[str, tuple[str, _Argument]]  # Drawn uniformly, with replacement.
  num_ops: int  # Number of operations drawn for each image.
  prob: float  # Probability that a drawn operation is applied.
  mean: float  # Mean of the level, in [0, 1].
  std: float  # Standard deviation of the level.
  high: float  # Maximum level.
  smooth: bool  # Resample bilinearly or bicubically, at random; else nearest.


def parse(policy: str) -> Policy:
  """Parses a policy; raises UserError, which names the invalid part of it."""
  settings, colon, names = policy.partition(":")
  dialect, *parts = settings.split("-")
  if dialect not in _DIALECTS:
    raise _error(policy, dialect, f"must be {' or '.join(_DIALECTS)}")
  ops, known = _DIALECTS[dialect]
  values = {}
  for part in parts:
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
    name = match and match[1]
    if name not in known or name in values:
      text = f"must be one of {', '.join(known)} with a number, once each"
      raise _error(policy, part, text)
    value, (low, high) = float(match[2]), known[name]
    if not low <= value <= high:
      raise _error(policy, part, f"{name} must be {low} to {high}")
    if name == "n" and value % 1:
      raise _error(policy, part, "n must be an integer")
    values[name] = value
  for name in ("m", "inc") if dialect == "rand" else ("m",):
    if name not in values:
      raise _error(policy, settings, f"{name} is missing")
  if colon:
    for name in names.split(","):
      if name not in ops:
        raise _error(policy, name, f"must be one of {', '.join(ops)}")
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


# First word of a policy -> (operations, setting -> its range).
_DIALECTS = {
  "rand": (
    TIMM,
    {
      "m": (0, 30),
      "n": (1, 15),
      "p": (0, 1),
      "mstd": (0, 10),
      "mmax": (0, 30),
      "inc": (1, 1),  # timm's set without inc1 is not implemented.
    },
  ),
  "torchvision": (TORCHVISION, {"m": (0, 30), "n": (1, 14)}),
}


def _error(policy, part, text):
  return UserError(f"config.augment.randaugment={policy}: {part!r}: {text}")


def apply_policy(
  key: jax.Array,
  images: jax.Array,
  policy: Policy,
  fill: Sequence[int],
  rows: Rows | None = None,
) -> jax.Array:
  """Applies random operations to each of the images, uint8 [B, H, W, 3].

  Pixels that geometric operations take from outside an image are `fill`: RGB.
  `rows` are those of the batch that the images are; None: all.
  """
  _, height, width, _ = images.shape
  keys = jax.random.split(key, policy.num_ops)
  draw_stage = lambda key: drawn(
    lambda batch: draw(key, policy, batch, (height, width)), images, rows
  )
  return stages.apply_stages(images, draw_stage, keys, fill)


def draw(
  key: jax.Array, policy: Policy, batch: int, size: tuple[int, int]
) -> stages.Stage:
  """Draws one operation for each of `batch` images; size: height and width."""
  op_key, prob_key, level_key, sign_key, filter_key = jax.random.split(key, 5)
  op_index = jax.random.randint(op_key, (batch,), 0, len(policy.ops))
  applied = jax.random.bernoulli(prob_key, policy.prob, (batch,))
  level = policy.mean + policy.std * jax.random.normal(level_key, (batch,))
  level = jnp.clip(level, 0, policy.high)
  sign = jax.random.rademacher(sign_key, (batch,), jnp.float32)
  bicubic = jax.random.bernoulli(filter_key, shape=(batch,))
  chosen, args = {}, jnp.zeros(batch)
  for i, (op, argument) in enumerate(policy.ops.values()):
    chosen[op] = (op_index == i) & applied
    args = jnp.where(chosen[op], argument(level, sign, size), args)
  return chosen, args, bicubic if policy.smooth else None
