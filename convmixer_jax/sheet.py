"""A sheet of training images with their labels."""

from collections.abc import Sequence
import math

import numpy as np
from PIL import Image
from PIL import ImageDraw

CELL = 128  # Smallest side of an image on the sheet, in pixels.
LINE = 12  # Height of a line of text.


def draw(
  images: np.ndarray, targets: np.ndarray, names: Sequence[str], title: str
) -> Image.Image:
  """Draws a grid of images, each with its two likeliest labels, and a title.

  Args:
    images: float [N, S, S, 3]; clipped to [0, 255].
    targets: float [N, K] probabilities.
    names: of the K classes.
    title: one line, above the grid.
  """
  images = np.clip(np.round(images), 0, 255).astype(np.uint8)
  side = images.shape[1] * max(1, round(CELL / images.shape[1]))
  columns = math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  size = (columns * (side + 4) + 4, LINE + rows * (side + 2 * LINE + 8) + 4)
  sheet = Image.new("RGB", size, "white")
  canvas = ImageDraw.Draw(sheet)
  canvas.text((4, 1), title, fill="black")
  for i, (image, target) in enumerate(zip(images, targets)):
    x = 4 + i % columns * (side + 4)
    y = LINE + 4 + i // columns * (side + 2 * LINE + 8)
    picture = Image.fromarray(image)
    sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
    for line, k in enumerate(np.argsort(-target)[:2]):
      if target[k] < 0.005:
        continue
      text = f"{target[k]:.2f} {names[k]}"
      while canvas.textlength(text) > side:
        text = text[:-1]
      canvas.text((x, y + side + 1 + line * LINE), text, fill="black")
  return sheet
