"""Published results: paper.csv, with a source for each row."""

import csv
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Published:
  """One row.

  Attributes:
    table: the table of the paper, or the origin.
    model: a key of `models.VARIANTS`, or the row's label.
    patch_size: None if the model has none.
    kernel_size: None if the model has none.
    value: top-1 in percent; None if it is not established.
    source: where the value comes from.
  """

  table: str
  model: str
  patch_size: int | None
  kernel_size: int | None
  value: float | None
  source: str


def read() -> list[Published]:
  """All rows whose metric is top-1, in percent."""
  number = lambda text, kind: kind(text) if text else None
  with (Path(__file__).parent / "paper.csv").open(encoding="utf-8") as file:
    return [
      Published(
        row["table"],
        row["model"],
        number(row["patch_size"], int),
        number(row["kernel_size"], int),
        number(row["value"], float),
        row["source"],
      )
      for row in csv.DictReader(file)
      if row["metric"] == "top1"
    ]


def find(
  table: str, model: str, patch_size: int | None, kernel_size: int | None
) -> Published | None:
  """Finds a row of a table; None if it does not exist."""
  wanted = (table, model, patch_size, kernel_size)
  for row in read():
    if (row.table, row.model, row.patch_size, row.kernel_size) == wanted:
      return row
  return None
