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


def _random_boxes(key, batch, height, width, scale, ratio):
  """Returns top, left, height, width, int32 [B] each.

  The first of ten random boxes that fits; where none does, the largest centred
  box whose ratio is allowed.
  """
  size_key, top_key, left_key = jax.random.split(key, 3)
  box_height, box_width, fits = random_sizes(
    size_key, batch, height * width, scale, ratio, (height, width)
  )
  most = min(max(width / height, ratio[0]), ratio[1])
  box_height = jnp.where(fits, box_height, min(height, round(width / most)))
  box_width = jnp.where(fits, box_width, min(width, round(height * most)))

  def place(key, room):
    return jnp.where(
      fits, jax.random.randint(key, (batch,), 0, room + 1), room // 2
    )

  top = place(top_key, height - box_height)
  left = place(left_key, width - box_width)
  return top, left, box_height, box_width


def random_sizes(
  key: jax.Array,
  batch: int,
  area: int,
  scale: Sequence[float],
  ratio: Sequence[float],
  most: tuple[int, int],
  attempts: int = 10,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Heights and widths of boxes, the first of ten random ones that fits.

  Args:
    key: PRNG key.
    batch: B.
    area: of the image, in pixels.
    scale: least and greatest area of a box, as a share of the image's.
    ratio: least and greatest width / height of a box; log-uniform.
    most: greatest height and width that fit, in pixels.
    attempts: how many are drawn.

  Returns:
    height and width, int32 [B], and bool [B], whether any fitted.
  """
  area_key, ratio_key = jax.random.split(key)
  uniform = lambda key, low, high: jax.random.uniform(
    key, (batch, attempts), minval=low, maxval=high
  )
  areas = uniform(area_key, *scale) * area
  ratios = jnp.exp(uniform(ratio_key, *map(math.log, ratio)))
  widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
  fits = (heights > 0) & (heights <= most[0]) & (widths > 0)
  fits &= widths <= most[1]
  first = fits.argmax(1)[:, None]
  pick = lambda values: jnp.take_along_axis(values, first, axis=1)[:, 0]
  return pick(heights), pick(widths), fits.any(1)


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


def affine(
  images: jax.Array,
  matrix: jax.Array,
  fill: Sequence[int],
  bicubic: jax.Array | None,
) -> jax.Array:
  """Pillow's `Image.transform(..., AFFINE)`, by one gather of neighbours.

  Args:
    images: uint8 [B, H, W, 3].
    matrix: float32 [B, 2, 3]; the result's pixel (x, y) is the image's
      (m00 x + m01 y + m02, m10 x + m11 y + m12), where pixels' centres lie at
      halves.
    fill: RGB of what lies outside.
    bicubic: bool [B], which images are resampled by Pillow's bicubic filter
      rather than bilinearly; None takes the nearest pixel for all.

  Returns:
    uint8 [B, H, W, 3].
  """
  batch, height, width, _ = images.shape
  m = matrix[:, :, :, None, None]
  y, x = jnp.mgrid[:height, :width]
  centre = m[:, :, 2] + 0.5 * (m[:, :, 0] + m[:, :, 1])
  limits = jnp.array([width, height]).reshape(2, 1, 1)
  if bicubic is None:
    # Pillow's fixed point, 16 bits after the point.
    fixed = lambda v: jnp.floor(v * 65536 + 0.5).astype(jnp.int32)
    at = fixed(m[:, :, 0]) * x + fixed(m[:, :, 1]) * y + fixed(centre) >> 16
    first = at
  else:
    at = m[:, :, 0] * x + m[:, :, 1] * y + centre
    at = jax.lax.optimization_barrier(at)  # Computed twice, it could differ.
    first = jnp.floor(at - 0.5).astype(jnp.int32)
  # One gather brings three channels. Beyond the edge, its pixels go on.
  shifts = jnp.array([0, 8, 16], jnp.int32)
  packed = (images.astype(jnp.int32) << shifts).sum(-1)
  packed = jnp.pad(packed, ((0, 0), (2, 2), (2, 2)), mode="edge")
  packed = packed.reshape(batch, -1)
  # Where a pixel's first neighbour is; the others are so many entries further.
  column, row = jnp.moveaxis(jnp.clip(first, -1, limits - 1) + 2, 1, 0)
  index = row * (width + 4) + column

  def resample(args):  # A strip of rows.
    at, index = args

    def pixel(i, j):
      values = jnp.take_along_axis(
        packed,
        (index + (j * (width + 4) + i)).reshape(batch, -1),
        axis=1,
        mode="promise_in_bounds",
      )
      return (values.reshape(index.shape)[..., None] >> shifts) & 255

    if bicubic is None:
      values = pixel(0, 0)
    else:
      shifted = at - 0.5  # Pixels' centres at whole numbers.
      part = shifted - jnp.floor(shifted)
      dx, dy = jnp.moveaxis(part[..., None], 1, 0)
      cubic = bicubic[:, None, None, None]
      taps = range(-1, 3)
      rows = [_interpolate([pixel(i, j) for i in taps], dx, cubic)
              for j in taps]  # fmt: skip
      values = jnp.clip(_interpolate(rows, dy, cubic), 0, 255)
    inside = ((at >= 0) & (at < limits)).all(1)[..., None]
    return jnp.where(
      inside, values.astype(jnp.uint8), jnp.array(fill, jnp.uint8)
    )

  # In strips: sixteen neighbours of every pixel at once take much memory.
  strips = math.gcd(height, 8)
  cut = lambda x: jnp.moveaxis(
    x.reshape(*x.shape[:-2], strips, -1, width), -3, 0
  )
  result = jax.lax.map(resample, (cut(at), cut(index)))
  return jnp.moveaxis(result, 0, 1).reshape(images.shape)


def _interpolate(taps, d, bicubic):
  """Between taps[1] and taps[2]; the cubic has a = -1, as Pillow's here."""
  a, b, c, e = taps
  linear = b + (c - b) * d
  cubic = b + d * (c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)))
  return jnp.where(bicubic, cubic, linear)
