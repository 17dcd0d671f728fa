"""Which images of a batch a process has."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import numpy as np


class Rows(NamedTuple):
  """Rows of a batch. What is random is drawn for the whole batch.

  Attributes:
    batch_size: of the whole batch.
    index: int [R].
  """

  batch_size: int
  index: np.ndarray


def drawn(
  draw: Callable[[int], Any], images: jax.Array, rows: Rows | None
) -> Any:
  """Draws for a whole batch, and cuts the result to the rows of `images`.

  Args:
    draw: batch size B -> a tree of arrays [B, ...].
    images: [R, ...].
    rows: of the batch that the images are; None: all, B = R.

  Returns:
    The tree, of arrays [R, ...].
  """
  if rows is None:
    return draw(len(images))
  return jax.tree.map(lambda x: x[rows.index], draw(rows.batch_size))
