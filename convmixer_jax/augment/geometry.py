"""Flip and crop, as torchvision and Pillow define them."""

from collections.abc import Callable
from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Flips each image of [B, H, W, C] left to right with probability 1/2."""
  flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


def random_resized_crop(
  key: jax.Array,
  images: jax.Array,
  *,
  scale: Sequence[float],
  ratio: Sequence[float],
  interpolation: str = "bilinear",
) -> jax.Array:
  """Crops a random box out of each image and resizes it to the image's size.

  Boxes as torchvision's RandomResizedCrop draws them; resampling, antialiased
  and rounded after each of its two passes, as Pillow does it.

  Args:
    key: PRNG key.
    images: [B, H, W, C], values in [0, 255].
    scale: least and greatest area of the box, as a share of the image's.
    ratio: least and greatest width / height of the box; log-uniform.
    interpolation: 'bilinear', 'bicubic' or 'random' (either, by a fair coin for
      each image).

  Returns:
    uint8 [B, H, W, C].
  """
  batch, height, width, _ = images.shape
  box_key, filter_key = jax.random.split(key)
  top, left, box_height, box_width = _random_boxes(
    box_key, batch, height, width, scale, ratio
  )
  if interpolation == "random":
    bicubic = jax.random.bernoulli(filter_key, shape=(batch, 1, 1))
  else:
    bicubic = jnp.full((batch, 1, 1), interpolation == "bicubic")

  def resample(equation, images, weights):
    y = jnp.einsum(
      equation, weights, images, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.clip(jnp.floor(y + 0.5), 0, 255)

  weights = lambda start, length, size: jnp.where(
    bicubic,
    _resize_weights(start, length, size, _bicubic, 2.0),
    _resize_weights(start, length, size, _bilinear, 1.0),
  )
  images = images.astype(jnp.float32)
  images = resample("bow,bhwc->bhoc", images, weights(left, box_width, width))
  images = resample("boh,bhwc->bowc", images, weights(top, box_height, height))
  return images.astype(jnp.uint8)


def _random_boxes(key, batch, height, width, scale, ratio, attempts=10):
  """Returns top, left, height, width, int32 [B] each.

  The first of ten random boxes that fits; where none does, the largest centred
  box whose ratio is allowed.
  """
  area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  shape = (batch, attempts)
  low, high = scale
  area = jax.random.uniform(area_key, shape, minval=low, maxval=high)
  area = area * (height * width)
  low, high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jax.random.uniform(ratio_key, shape, minval=low, maxval=high)
  aspect = jnp.exp(aspect)
  widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
  first = fits.argmax(1)[:, None]
  any_fits = fits.any(1)

  pick = lambda values: jnp.take_along_axis(values, first, axis=1)[:, 0]
  most = min(max(width / height, ratio[0]), ratio[1])
  fallback_width = min(width, round(height * most))
  fallback_height = min(height, round(width / most))
  box_width = jnp.where(any_fits, pick(widths), fallback_width)
  box_height = jnp.where(any_fits, pick(heights), fallback_height)

  def place(key, room):
    uniform = jax.random.uniform(key, (batch,))
    random = jnp.floor(uniform * (room + 1)).astype(jnp.int32)
    return jnp.where(any_fits, jnp.minimum(random, room), room // 2)

  top = place(top_key, height - box_height)
  left = place(left_key, width - box_width)
  return top, left, box_height, box_width


def _resize_weights(
  start: jax.Array,
  length: jax.Array,
  size: int,
  kernel: Callable[[jax.Array], jax.Array],
  support: float,
) -> jax.Array:
  """Pillow's resampling of `length` pixels from `start` on, to `size` pixels.

  Args:
    start: int [B], first pixel of the box.
    length: int [B], pixels in the box.
    size: pixels of the image, and of the result.
    kernel: the filter, a function of the distance in (stretched) pixels.
    support: half the width of the filter.

  Returns:
    float32 [B, size (of the result), size (of the image)]; rows sum to one.
  """
  start, length = start[:, None, None], length[:, None, None]
  step = length / size
  stretch = jnp.maximum(step, 1.0)
  centre = (jnp.arange(size)[:, None] + 0.5) * step
  pixel = jnp.arange(size) - start
  first = jnp.maximum(jnp.floor(centre - support * stretch + 0.5), 0)
  last = jnp.minimum(jnp.floor(centre + support * stretch + 0.5), length)
  weights = kernel(jnp.abs(pixel + 0.5 - centre) / stretch)
  weights = jnp.where((first <= pixel) & (pixel < last), weights, 0)
  return weights / weights.sum(-1, keepdims=True)


def _bilinear(x):
  return jnp.maximum(1 - x, 0)


def _bicubic(x, a=-0.5):
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
