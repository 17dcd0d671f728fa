"""Random erasing of normalised images."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from convmixer_jax.augment import geometry
from convmixer_jax.ops import native


def random_erasing(
  key: jax.Array,
  images: jax.Array,
  *,
  prob: float,
  mode: str,
  area: Sequence[float],
  aspect: Sequence[float],
) -> jax.Array:
  """Fills a random box in some of the images, as timm and torchvision do.

  Args:
    key: PRNG key.
    images: normalised, float [B, H, W, C], like the result.
    prob: each image's probability of being erased.
    mode: 'pixel' fills with standard normal noise, 'const' with zeros.
    area: minimum and maximum area of the box, as a fraction of the image.
    aspect: minimum and maximum height / width of the box; log-uniform.
  """
  batch, height, width, _ = images.shape
  erased_key, box_key, noise_key = jax.random.split(key, 3)
  erased = jax.random.bernoulli(erased_key, prob, (batch, 1, 1))
  boxes = _boxes(box_key, batch, height, width, area, aspect)
  strips = math.gcd(height, 8)
  if mode == "pixel" and images.dtype == jnp.float32 and _noise_on_cpu(key):
    top, left, box_height, box_width = boxes
    boxes = top, left, jnp.where(erased[:, 0, 0], box_height, 0), box_width
    keys = jax.random.key_data(jax.random.split(noise_key, strips))
    index = jnp.arange(batch, dtype=jnp.uint32)
    boxes = jnp.stack(boxes, 1).astype(jnp.int32)
    return native.call("noise", images, boxes, index, keys)[0]
  top, left, box_height, box_width = (v[:, None, None] for v in boxes)
  y, x = jnp.mgrid[:height, :width]
  y, x = y - top, x - left
  inside = (y >= 0) & (y < box_height) & (x >= 0) & (x < box_width) & erased
  if mode == "pixel":
    # In strips, because drawing noise takes three times its memory.
    shape = (batch, height // strips, *images.shape[2:])
    fill = jax.lax.map(
      lambda key: jax.random.normal(key, shape, images.dtype),
      jax.random.split(noise_key, strips),
    )
    fill = jnp.moveaxis(fill, 0, 1).reshape(images.shape)
  else:
    fill = jnp.zeros((), images.dtype)
  return jnp.where(inside[..., None], fill, images)


def _noise_on_cpu(key):
  """Whether augment.cc draws the noise that jax.random would."""
  default = str(jax.random.key_impl(key)) == "threefry2x32"
  return default and jax.config.jax_threefry_partitionable and native.on_cpu()


def _boxes(key, batch, height, width, area, aspect):
  """Returns top, left, height and width, int32 [B] each.

  The first of ten random boxes that fits; if none fits, height and width are
  zero and nothing is erased.
  """
  size_key, top_key, left_key = jax.random.split(key, 3)
  ratio = 1 / aspect[1], 1 / aspect[0]  # From height / width to width / height.
  limits = height - 1, width - 1
  box_height, box_width, fits = geometry.random_sizes(
    size_key, batch, height * width, area, ratio, limits
  )
  box_height = jnp.where(fits, box_height, 0)
  box_width = jnp.where(fits, box_width, 0)
  place = lambda key, room: jax.random.randint(key, (batch,), 0, room + 1)
  top = place(top_key, height - box_height)
  left = place(left_key, width - box_width)
  return top, left, box_height, box_width
