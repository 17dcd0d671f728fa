"""Encoded images to uint8 arrays, by Pillow, as torchvision and timm do it."""

import io
import math
import os
from pathlib import Path
import stat

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

# torchvision's.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff",
            ".webp")  # fmt: skip
_MOST_PIXELS = 50_000_000
BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC


def read_file(path: str | os.PathLike) -> bytes:
  """The bytes of a file; of a FIFO or a device there might be no end.

  Raises:
    OSError: there is none.
    ValueError: it is no file.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError("not a file")
  return Path(path).read_bytes()


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
  if width * height > max(_MOST_PIXELS, 4 * size**2):
    raise ValueError(f"too long and thin: would be {width} x {height} pixels")
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
  image = _identify(data)
  if interpolation == "random":
    interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
  resample = BICUBIC if interpolation == "bicubic" else BILINEAR
  width, height = image.size
  left, top, right, bottom = random_box(width, height, rng, scale, ratio)
  # A JPEG much larger than the result is decoded at a half, a quarter or an
  # eighth of its size, twice what is needed, as in Pillow's thumbnail().
  shrink = min(right - left, bottom - top) // (2 * size)
  if shrink > 1:
    image.draft("RGB", (width // shrink, height // shrink))
    x, y = image.width / width, image.height / height
    left, right = round(left * x), round(right * x)
    top, bottom = round(top * y), round(bottom * y)
  # Crop first: a resize from a box would let the filter see past its edges.
  image = _rgb(image).crop((left, top, right, bottom))
  return np.asarray(image.resize((size, size), resample))


def whole_image(data: bytes, size: int) -> np.ndarray:
  """Decodes, and resizes to uint8 [size, size, 3] where the size differs."""
  return resize_image(_open(data), size)


def resize_image(image: Image.Image, size: int) -> np.ndarray:
  """The whole image, uint8 [size, size, 3], bicubic."""
  if image.size != (size, size):
    image = image.resize((size, size), BICUBIC)
  return np.asarray(image)


def _open(data):
  return _rgb(_identify(data))


def _identify(data):
  try:
    image = Image.open(io.BytesIO(data))
  except UnidentifiedImageError as e:
    raise ValueError("no image, or of a kind that Pillow cannot read") from e
  if image.format == "EPS":
    raise ValueError("PostScript, a program, which would have to be run")
  return image


def _rgb(image):
  """Any mode to 8-bit RGB; of an animation, the first frame."""
  if image.mode == "F":
    raise ValueError("floating-point pixels have no fixed range")
  if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255.
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
      raise ValueError("more than 16 bits a pixel")
    image = Image.fromarray((values >> 8).astype(np.uint8))
  return image if image.mode == "RGB" else image.convert("RGB")


def random_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
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
