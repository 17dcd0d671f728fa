"""Flips, crops and affine transforms, as torchvision and Pillow define them."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from convmixer_jax.augment.rows import drawn
from convmixer_jax.augment.rows import Rows


def random_flip(
  key: jax.Array, images: jax.Array, rows: Rows | None = None
) -> jax.Array:
  """Flips each image of [B, H, W, C] left to right with probability 1/2."""
  draw = lambda batch: jax.random.bernoulli(key, shape=(batch, 1, 1, 1))
  flip = drawn(draw, images, rows)
  return jnp.where(flip, images[:, :, ::-1], images)


def random_resized_crop(
  key: jax.Array,
  images: jax.Array,
  *,
  scale: Sequence[float],
  ratio: Sequence[float],
  interpolation: str = "bilinear",
  rows: Rows | None = None,
) -> jax.Array:
  """Crops a random box out of each image and resizes it to the image's size.

  As torchvision's RandomResizedCrop. Like Pillow, it resamples with
  antialiasing, in two passes, and rounds after each.

  Args:
    key: PRNG key.
    images: [B, H, W, C], values in [0, 255]; the result is uint8.
    scale: see `random_boxes`.
    ratio: see `random_boxes`.
    interpolation: 'bilinear', 'bicubic' or 'random' (one of the two for each
      image, with equal probability).
    rows: of the batch that the images are; None: all.
  """
  _, height, width, _ = images.shape
  box_key, filter_key = jax.random.split(key)

  def draw(batch):
    boxes = random_boxes(box_key, batch, height, width, scale, ratio)
    if interpolation == "random":
      return boxes, jax.random.bernoulli(filter_key, shape=(batch, 1, 1))
    return boxes, jnp.full((batch, 1, 1), interpolation == "bicubic")

  boxes, bicubic = drawn(draw, images, rows)
  top, left, box_height, box_width = boxes

  def resample(equation, images, weights):
    y = jnp.einsum(equation, weights, images, precision="highest")
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


def random_boxes(
  key: jax.Array,
  batch: int,
  height: int,
  width: int,
  scale: Sequence[float],
  ratio: Sequence[float],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Draws a box for each image as torchvision's RandomResizedCrop does.

  The first of ten random boxes that fits into the image; if none fits, the
  largest centred box whose width / height lies within `ratio`.

  Args:
    key: PRNG key.
    batch: B, the number of boxes.
    height: of the image, in pixels.
    width: of the image, in pixels.
    scale: minimum and maximum area of a box, as a fraction of the image.
    ratio: minimum and maximum width / height of a box; log-uniform.

  Returns:
    top, left, height and width in pixels, int32 [B] each.
  """
  size_key, top_key, left_key = jax.random.split(key, 3)
  box_height, box_width, fits = random_sizes(
    size_key, batch, height * width, scale, ratio, (height, width)
  )
  nearest = min(max(width / height, ratio[0]), ratio[1])
  box_height = jnp.where(fits, box_height, min(height, round(width / nearest)))
  box_width = jnp.where(fits, box_width, min(width, round(height * nearest)))

  def place(key, room):
    start = jax.random.randint(key, (batch,), 0, room + 1)
    return jnp.where(fits, start, room // 2)

  top = place(top_key, height - box_height)
  left = place(left_key, width - box_width)
  return top, left, box_height, box_width


def random_sizes(
  key: jax.Array,
  batch: int,
  area: int,
  scale: Sequence[float],
  ratio: Sequence[float],
  limits: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws ten box sizes for each image and takes the first that fits.

  See `random_boxes`. `area` is that of the image, and `limits` are the maximum
  height and width that fit, in pixels.

  Returns:
    height and width in pixels, int32 [B] each; whether one fitted, bool [B].
  """
  area_key, ratio_key = jax.random.split(key)
  uniform = lambda key, low, high: jax.random.uniform(
    key, (batch, 10), minval=low, maxval=high
  )
  areas = uniform(area_key, *scale) * area
  ratios = jnp.exp(uniform(ratio_key, *map(math.log, ratio)))
  widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
  fits = (heights > 0) & (heights <= limits[0])
  fits &= (widths > 0) & (widths <= limits[1])
  first = fits.argmax(1)[:, None]
  pick = lambda values: jnp.take_along_axis(values, first, axis=1)[:, 0]
  return pick(heights), pick(widths), fits.any(1)


def _resize_weights(start, length, size, kernel, support):
  """Pillow's weights to resize pixels [start, start + length) to `size` pixels.

  The result is float32 [B, size (result), size (image)]; each row sums to one.
  `kernel` is a filter of the distance, `support` half its width. If the box is
  shrunk, the filter is stretched by the same factor.
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


def _bicubic(x):
  a = -0.5
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def affine(
  images: jax.Array,
  matrix: jax.Array,
  fill: Sequence[int],
  bicubic: jax.Array | None,
) -> jax.Array:
  """Transforms images as Pillow's `Image.transform(..., AFFINE)`.

  Args:
    images: uint8 [B, H, W, 3], like the result.
    matrix: float32 [B, 2, 3]. Point (x, y) of the result is taken from point
      (m00 x + m01 y + m02, m10 x + m11 y + m12) of the image. The centre of
      pixel (i, j) is the point (i + 0.5, j + 0.5).
    fill: RGB of pixels taken from outside the image.
    bicubic: bool [B]: images with True are resampled by Pillow's bicubic
      filter, the others bilinearly. None: nearest pixel for all images.
  """
  batch, height, width, _ = images.shape
  m = matrix[:, :, :, None, None]
  y, x = jnp.mgrid[:height, :width]
  centre = m[:, :, 2] + 0.5 * (m[:, :, 0] + m[:, :, 1])
  limits = jnp.array([width, height]).reshape(2, 1, 1)
  if bicubic is None:
    # Pillow's fixed-point arithmetic, with 16 fractional bits.
    fixed = lambda v: jnp.floor(v * 65536 + 0.5).astype(jnp.int32)
    at = fixed(m[:, :, 0]) * x + fixed(m[:, :, 1]) * y + fixed(centre) >> 16
    first = at
  else:
    at = m[:, :, 0] * x + m[:, :, 1] * y + centre
    # XLA might compute `at` twice, with different rounding.
    at = jax.lax.optimization_barrier(at)
    first = jnp.floor(at - 0.5).astype(jnp.int32)
  # Three channels in one integer, to gather them at once. Beyond the image, the
  # pixels of its edge are repeated.
  shifts = jnp.array([0, 8, 16], jnp.int32)
  packed = (images.astype(jnp.int32) << shifts).sum(-1)
  packed = jnp.pad(packed, ((0, 0), (2, 2), (2, 2)), mode="edge")
  packed = packed.reshape(batch, -1)
  # The flat index of each pixel's first neighbour. The others lie at constant
  # distances from it.
  column, row = jnp.moveaxis(jnp.clip(first, -1, limits - 1) + 2, 1, 0)
  index = row * (width + 4) + column

  def resample(args):  # A strip of rows.
    at, index = args

    def pixel(i, j):
      flat = (index + (j * (width + 4) + i)).reshape(batch, -1)
      values = jnp.take_along_axis(packed, flat, 1, mode="promise_in_bounds")
      return (values.reshape(index.shape)[..., None] >> shifts) & 255

    if bicubic is None:
      values = pixel(0, 0)
    else:
      shifted = at - 0.5  # Now the pixels' centres are whole numbers.
      part = shifted - jnp.floor(shifted)
      dx, dy = jnp.moveaxis(part[..., None], 1, 0)
      cubic = bicubic[:, None, None, None]
      taps = range(-1, 3)
      rows = [_interpolate([pixel(i, j) for i in taps], dx, cubic)
              for j in taps]  # fmt: skip
      values = jnp.clip(_interpolate(rows, dy, cubic), 0, 255)
    inside = ((at >= 0) & (at < limits)).all(1)[..., None]
    values, outside = values.astype(jnp.uint8), jnp.array(fill, jnp.uint8)
    return jnp.where(inside, values, outside)

  # In strips, because the sixteen neighbours of all pixels take much memory.
  strips = math.gcd(height, 8)
  cut = lambda x: jnp.moveaxis(
    x.reshape(*x.shape[:-2], strips, -1, width), -3, 0
  )
  result = jax.lax.map(resample, (cut(at), cut(index)))
  return jnp.moveaxis(result, 0, 1).reshape(images.shape)


def _interpolate(taps, d, bicubic):
  """Interpolates between taps[1] and taps[2], at distance d from taps[1].

  The cubic has a = -1, as in Pillow's transforms (its resize has -0.5).
  """
  a, b, c, e = taps
  linear = b + (c - b) * d
  cubic = b + d * (c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)))
  return jnp.where(bicubic, cubic, linear)
