"""Operations on the colours of images, with Pillow's results to the bit.

They work on uint8 images [B, H, W, 3]. Each image has its own operation and
factor.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Operations that blend the image with a degenerate version of it.
ENHANCE_OPS = ("Brightness", "Contrast", "Color", "Sharpness")


def lookup(
  images: jax.Array, ops: dict[str, jax.Array], arg: jax.Array
) -> jax.Array:
  """Applies one of `TABLE_OPS`, or none, to each image.

  Args:
    images: uint8 [B, H, W, 3], like the result.
    ops: name -> bool [B], the images to which it is applied.
    arg: [B], the operation's argument. Posterize: number of bits to keep, 0 to
      8. Solarize: values greater than or equal to it are inverted, 0 to 256.
      SolarizeAdd: added to values below 128. Unused by the others.
  """
  arg = jnp.floor(arg).astype(jnp.int32)[:, None, None]
  table = value = jnp.arange(256)
  for name, chosen in ops.items():
    new = TABLE_OPS[name](images, value, arg)
    table = jnp.where(chosen[:, None, None], new, table)
  batch, *_, channels = images.shape
  table = jnp.broadcast_to(table, (batch, channels, 256)).astype(jnp.uint8)
  index = images.astype(jnp.int32) + 256 * jnp.arange(channels)
  flat = jnp.take_along_axis(
    table.reshape(batch, -1), index.reshape(batch, -1), axis=1
  )
  return flat.reshape(images.shape)


def _autocontrast(images, value, _):
  """Tables [B, 3, 256] that stretch each channel to the range 0 to 255."""
  low = images.min((1, 2)).astype(jnp.int32)
  high = images.max((1, 2)).astype(jnp.int32)
  # Pillow truncates doubles, some of which lie just below a whole number.
  short = jnp.asarray(_autocontrast_shortfall())[low, high]
  short = (short[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
  short = short.reshape(*low.shape, 256).astype(jnp.int32)
  low, high = low[..., None], high[..., None]
  stretched = (value - low) * 255 // jnp.maximum(high - low, 1) - short
  return jnp.where(high > low, jnp.clip(stretched, 0, 255), value)


@functools.cache
def _autocontrast_shortfall():
  """Where rounding makes Pillow's value one less than the exact quotient.

  Returns:
    uint8 [256, 256, 32], indexed by the channel's lowest and highest value. Bit
    v % 8 of byte v // 8 is set if the result for the value v is one less.
  """
  low, high = np.mgrid[:256, :256]
  width = np.maximum(high - low, 1)
  scale = 255.0 / width
  offset = -low * scale
  bits = np.empty((256, 256, 32), np.uint8)
  for byte in range(32):
    value = np.arange(8 * byte, 8 * byte + 8)
    exact = (value - low[..., None]) * 255 // width[..., None]
    pillow = value * scale[..., None] + offset[..., None]
    differ = np.trunc(pillow) < exact
    bits[..., byte] = np.packbits(differ, axis=-1, bitorder="little")[..., 0]
  return bits


def _equalize(images, value, _):
  """Tables [B, 3, 256] that make each channel's histogram uniform."""
  histogram = _histogram(images)
  last = images.max((1, 2)).astype(jnp.int32)[..., None]
  in_last = jnp.take_along_axis(histogram, last, axis=-1)
  step = (images.shape[1] * images.shape[2] - in_last) // 255
  below = jnp.cumsum(histogram, -1) - histogram
  table = (step // 2 + below) // jnp.maximum(step, 1)
  return jnp.where(step > 0, jnp.minimum(table, 255), value)


def _histogram(images):
  """Counts the values of each channel: int32 [B, 3, 256]."""
  batch, height, _, channels = images.shape
  # In parts, because a scatter's indices take eight times the images' memory.
  parts = math.gcd(height, 8)
  parts = images.reshape(batch, parts, -1, channels).transpose(1, 0, 3, 2)
  count = jax.vmap(jax.vmap(lambda total, x: total.at[x].add(1)))
  histogram, _ = jax.lax.scan(
    lambda total, part: (count(total, part), None),
    jnp.zeros((batch, channels, 256), jnp.int32),
    parts,
  )
  return histogram


def _solarize_add(_, value, arg):
  return jnp.where(value < 128, jnp.minimum(value + arg, 255), value)


# Operations that map each value of a channel by a table: name -> function of
# images, values (0 to 255) and argument. It returns tables, [..., 256].
TABLE_OPS = {
  "AutoContrast": _autocontrast,
  "Equalize": _equalize,
  "Invert": lambda _, value, arg: 255 - value,
  "Posterize": lambda _, value, arg: value & -(1 << (8 - arg)),
  "Solarize": lambda _, value, arg: jnp.where(value < arg, value, 255 - value),
  "SolarizeAdd": _solarize_add,
}


def enhance(
  images: jax.Array, ops: dict[str, jax.Array], factor: jax.Array
) -> jax.Array:
  """Applies one of `ENHANCE_OPS`, or none, to each image.

  Args:
    images: uint8 [B, H, W, 3], like the result.
    ops: name -> bool [B], the images to which it is applied.
    factor: [B], 0 gives the degenerate image, 1 the image itself, and more
      than 1 extrapolates. The degenerate image is black for Brightness, the
      mean grey for Contrast, grey for Color and smoothed for Sharpness.
  """
  values = images.astype(jnp.int32)
  make = {
    "Brightness": lambda: jnp.zeros((), jnp.int32),
    "Contrast": lambda: _mean(_gray(values)),
    "Color": lambda: _gray(values),
    "Sharpness": lambda: _smooth(values),
  }
  degenerate = values
  for name, chosen in ops.items():
    chosen = chosen[:, None, None, None]
    degenerate = jnp.where(chosen, make[name](), degenerate)
  factor = factor[:, None, None, None]
  blend = degenerate + factor * (values - degenerate)
  blended = jnp.clip(blend, 0, 255).astype(jnp.uint8)  # Pillow truncates too.
  return jnp.where(degenerate == values, images, blended)


def _gray(values):
  """int32 [B, H, W, 3] -> [B, H, W, 1], as Pillow's mode L."""
  weights = jnp.array([19595, 38470, 7471])
  return ((values * weights).sum(-1, keepdims=True) + 0x8000) >> 16


def _mean(gray):
  """int32 [B, H, W, 1] -> [B, 1, 1, 1], rounded half up."""
  pixels = gray.shape[1] * gray.shape[2]
  total = gray.sum((1, 2), keepdims=True)
  return (2 * total + pixels) // (2 * pixels)


def _smooth(values):
  """Pillow's SMOOTH: a 3 x 3 mean, the centre five times; keeps the border."""
  height, width = values.shape[1:3]
  if min(height, width) < 3:
    return values
  rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
  total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  total = total + 4 * values[:, 1:-1, 1:-1]
  return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)
