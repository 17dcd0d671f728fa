"""Decodes images to uint8 arrays with Pillow, as torchvision and timm do.

Like theirs, an image has the pixels that its file stores: the orientation in a
JPEG's EXIF data is ignored, in training, evaluation and predict.
"""

import io
import math
import os
from pathlib import Path
import stat
from typing import Any

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

# Those that torchvision's ImageFolder accepts.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff",
            ".webp")  # fmt: skip
_MOST_PIXELS = 50_000_000
BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC


def read_file(path: str | os.PathLike) -> bytes:
  """Returns the bytes of a file.

  Raises:
    OSError: the file does not exist or cannot be read.
    ValueError: not a regular file; reading a FIFO or a device might never end.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError("not a file")
  return Path(path).read_bytes()


def eval_image(data: bytes, size: int, crop_pct: float) -> np.ndarray:
  """Decodes an image, resizes its short side and crops the centre.

  Args:
    data: the bytes of an image file.
    size: height and width of the result in pixels.
    crop_pct: the short side is resized to floor(size / crop_pct) pixels,
      bicubic; for example to 233 with size 224 and crop_pct 0.96.

  Returns:
    uint8 [size, size, 3].
  """
  return centre_crop(_rgb(_identify(data)), size, crop_pct)


def centre_crop(image: Image.Image, size: int, crop_pct: float) -> np.ndarray:
  """As `eval_image`, of an RGB image."""
  short = math.floor(size / crop_pct)
  width, height = image.size
  if width <= height:
    width, height = short, int(short * height / width)
  else:
    width, height = int(short * width / height), short
  if width * height > max(_MOST_PIXELS, 4 * size**2):
    raise ValueError(
      f"too long and thin: resized, it would be {width} x {height} pixels"
    )
  image = image.resize((width, height), BICUBIC)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def train_image(
  data: bytes, size: int, rng: np.random.Generator, **crop: Any
) -> np.ndarray:
  """Decodes an image file's bytes, and crops it; see `random_crop`."""
  return random_crop(_identify(data), size, rng, **crop)


def random_crop(
  image: Image.Image,
  size: int,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  interpolation: str,
) -> np.ndarray:
  """Crops a random box of an image and resizes it.

  Args:
    image: opened; a file's pixels need not have been read.
    size: height and width of the result in pixels.
    rng: draws the box and the filter.
    scale: see `random_box`.
    ratio: see `random_box`.
    interpolation: 'bilinear', 'bicubic' or 'random' (one of the two, with equal
      probability).

  Returns:
    uint8 [size, size, 3].
  """
  if interpolation == "random":
    interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
  resample = BICUBIC if interpolation == "bicubic" else BILINEAR
  width, height = image.size
  left, top, right, bottom = random_box(width, height, rng, scale, ratio)
  # For speed, a JPEG much larger than the result is decoded at 1/2, 1/4 or 1/8
  # of its size. As in Pillow's thumbnail(), the box stays at least twice as
  # large as the result.
  shrink = min(right - left, bottom - top) // (2 * size)
  if shrink > 1:
    image.draft("RGB", (width // shrink, height // shrink))
    x, y = image.width / width, image.height / height
    left, right = round(left * x), round(right * x)
    top, bottom = round(top * y), round(bottom * y)
  # Crop first: resize(box=...) lets the filter read pixels outside the box.
  image = _rgb(image).crop((left, top, right, bottom))
  return np.asarray(image.resize((size, size), resample))


def random_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws a box as torchvision's RandomResizedCrop does.

  The first of ten random boxes that fits into the image; if none fits, the
  largest centred box whose width / height lies within `ratio`.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    rng: numpy generator.
    scale: minimum and maximum area of the box, as a fraction of the image.
    ratio: minimum and maximum width / height of the box; log-uniform.

  Returns:
    left, top, right, bottom in pixels, as Pillow's `crop` takes them.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      top = int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  aspect = min(max(width / height, ratio[0]), ratio[1])
  w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def whole_image(data: bytes, size: int) -> np.ndarray:
  """Decodes an image of size x size pixels to uint8 [size, size, 3]."""
  image = _rgb(_identify(data))
  if image.size != (size, size):
    width, height = image.size
    raise ValueError(f"has {width} x {height} pixels, not {size} x {size}")
  return np.asarray(image)


def _identify(data):
  try:
    image = Image.open(io.BytesIO(data))
  except UnidentifiedImageError as e:
    raise ValueError("not an image that Pillow can read") from e
  if image.format == "EPS":
    raise ValueError("PostScript is a program and is not run")
  return image


def _rgb(image):
  """Converts any mode to 8-bit RGB; takes the first frame of an animation."""
  if image.mode == "F":
    raise ValueError("floating-point pixels have no fixed range of values")
  if image.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255.
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
      raise ValueError("more than 16 bits per pixel")
    image = Image.fromarray((values >> 8).astype(np.uint8))
  return image if image.mode == "RGB" else image.convert("RGB")
