"""Encoded images to uint8 arrays, by Pillow, as torchvision and timm do it."""

import io
import math

import numpy as np
from PIL import Image

BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC


def eval_image(data: bytes, size: int, crop_pct: float) -> np.ndarray:
  """Decodes, resizes the short side and crops the centre.

  Args:
    data: the bytes of an image file.
    size: side of the result in pixels.
    crop_pct: the short side is resized to floor(size / crop_pct), bicubic:
      0.96 makes 233 of 224.

  Returns:
    uint8 [size, size, 3].
  """
  image = _open(data)
  short = math.floor(size / crop_pct)
  width, height = image.size
  if width <= height:
    width, height = short, int(short * height / width)
  else:
    width, height = int(short * width / height), short
  image = image.resize((width, height), BICUBIC)
  left = round((width - size) / 2)
  top = round((height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def train_image(
  data: bytes,
  size: int,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  interpolation: str,
) -> np.ndarray:
  """Decodes and resizes a random box, as torchvision's RandomResizedCrop.

  Args:
    data: the bytes of an image file.
    size: side of the result in pixels.
    rng: numpy generator.
    scale: least and greatest area of the box, as a share of the image's.
    ratio: least and greatest width / height of the box; log-uniform.
    interpolation: 'bilinear', 'bicubic' or 'random' (either, by a fair coin).

  Returns:
    uint8 [size, size, 3].
  """
  image = _open(data)
  if interpolation == "random":
    interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
  resample = BICUBIC if interpolation == "bicubic" else BILINEAR
  box = _random_box(*image.size, rng, scale, ratio)
  # Crop first: a resize from a box would let the filter see past its edges.
  image = image.crop(box).resize((size, size), resample)
  return np.asarray(image)


def whole_image(data: bytes, size: int) -> np.ndarray:
  """Decodes, and resizes to uint8 [size, size, 3] where the size differs."""
  return resize_image(_open(data), size)


def resize_image(image: Image.Image, size: int) -> np.ndarray:
  """The whole image, uint8 [size, size, 3], bicubic."""
  if image.size != (size, size):
    image = image.resize((size, size), BICUBIC)
  return np.asarray(image)


def _open(data):
  return Image.open(io.BytesIO(data)).convert("RGB")


def _random_box(width, height, rng, scale, ratio):
  """(left, top, right, bottom), the first of ten tries that fits."""
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return left, top, left + w, top + h
  aspect = min(max(width / height, ratio[0]), ratio[1])
  w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h
