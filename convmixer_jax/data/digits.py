"""scikit-learn's digits: 1,797 real handwritten ones, 8 x 8 pixels."""

from collections.abc import Sequence
import dataclasses
import io

import numpy as np
from PIL import Image

from convmixer_jax.data import splits


def labelled(
  split: str,
) -> tuple[np.ndarray, np.ndarray, Sequence[str], Sequence[tuple[str, range]]]:
  """A split's images, uint8 [N, 8, 8, 3], labels, classes, and ranges.

  Every fifth image is in the test split, the others are in train. The ranges
  are those of `splits.parse`. Raises UserError if there is no such split.
  """
  # Imported here because scikit-learn takes a second and only this needs it.
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)
  images = np.repeat(images[..., None], 3, axis=-1)
  held_out = np.arange(len(images)) % 5 == 0
  ids = {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}
  ranges = splits.parse(split, {k: len(v) for k, v in ids.items()})
  chosen = np.concatenate([ids[name][list(rows)] for name, rows in ranges])
  labels = digits.target[chosen].astype(np.int32)
  return images[chosen], labels, [str(i) for i in range(10)], ranges


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads the digits as PNG files, to be resized; see `sources.Encoded`."""

  images: np.ndarray
  labels: np.ndarray

  def __call__(self, index):
    file = io.BytesIO()
    Image.fromarray(self.images[index]).save(file, "png")
    return file.getvalue(), int(self.labels[index])

  def name(self, index):
    return f"image {index}"
