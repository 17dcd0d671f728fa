"""Which images of a batch a process has."""

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


def drawn(draw: Any, images: jax.Array, rows: Rows | None) -> Any:
  """draw(batch_size) of the whole batch, cut to the rows that `images` are.

  `draw` returns a tree of arrays [batch_size, ...]. Without `rows`, the images
  are the batch.
  """
  if rows is None:
    return draw(len(images))
  return jax.tree.map(lambda x: x[rows.index], draw(rows.batch_size))
