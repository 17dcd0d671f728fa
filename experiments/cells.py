"""One cell of a table, and what a run of it needs."""

from collections.abc import Mapping
import dataclasses
import functools
import os
from pathlib import Path
import sys
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import models
from convmixer_jax.data import sources
from experiments import paper

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One cell of a table: a config without its seed.

  Attributes:
    name: name of its folder.
    config: config file, with variant; relative to the current folder, or else
      to this project.
    overrides: dotted field -> value.
    table: the table in paper.csv; '' if the cell was not published.
    row: the model or label of its row in that table.
  """

  name: str
  config: str
  overrides: Mapping[str, Any]
  table: str = ""
  row: str = "convmixer_256_8"

  def resolve(self, seed: int) -> ml_collections.ConfigDict:
    """The config of one run."""
    config = config_lib.load_file(str(ROOT / self.config)).lock()
    config_lib.check_values(self.overrides, "")
    config.update_from_flattened_dict({**self.overrides, "seed": seed})
    return config

  def of_data(self, directory: str) -> "Cell":
    """The cell with its data elsewhere."""
    return dataclasses.replace(
      self, overrides={**self.overrides, "data.dir": directory}
    )

  def command(self, seed: int, workdir: files.AnyPath) -> list[str]:
    """The command line that trains it, in the current folder."""
    fields = {**self.overrides, "seed": seed}
    return [
      sys.executable,
      "-m",
      "convmixer_jax.main",
      f"--config={os.path.relpath(ROOT / self.config)}",
      f"--workdir={files.absolute(workdir)}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ]

  @functools.cached_property
  def data(self) -> sources.Description:
    """Its training images. They need not be here, and may then be unknown."""
    d = self.resolve(0).data
    return sources.describe(d.name, d.dir, d.train_split, d.image_size)

  def model(self, num_classes: int = 1000) -> nn.Module:
    """The model. Only its head depends on the number of classes."""
    config = self.resolve(0).model
    return models.create_model(num_classes=num_classes, **config)

  def costs(self, num_classes: int | None) -> tuple[int, int] | None:
    """Trainable parameters, and FLOPs of an image; None if `num_classes` is."""
    if num_classes is None:
      return None
    model, size = self.model(num_classes), self.resolve(0).data.image_size
    return count_parameters(model, size), models.flops(model, size)

  def published(self) -> paper.Published | None:
    """The paper's row, or None."""
    model = self.model()
    sizes = (getattr(model, f"{n}_size", None) for n in ("patch", "kernel"))
    return paper.find(self.table, self.row, *sizes)


def count_parameters(model: nn.Module, image_size: int) -> int:
  """Number of trainable parameters, for RGB images of this size."""
  shapes = models.variable_shapes(model, image_size)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
