"""Test sets for models of ImageNet's 1000 classes, and how they are scored.

ImageNet-A and ImageNet-R have images of 200 classes each, and the answer is the
best of these 200, as in the papers and in timm's results. Their classes are a
list here, because a slice of a split need not have them all. ReaL has several
right labels an image: an answer is right if it is one of them, and images
without any are left out.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class TestSet:
  """A set of TFDS whose labels are those of imagenet2012.

  Attributes:
    split: the one that is scored.
    label: the feature with the labels.
    label_shape: (L,) if an image has up to L labels; else ().
    subset: whether answers are among the classes that `subset` returns.
  """

  split: str = "test"
  label: str = "label"
  label_shape: tuple[int, ...] = ()
  subset: bool = False


TEST_SETS = {
  "imagenet2012": TestSet("validation"),
  "imagenet2012_real": TestSet("validation", "real_label", (9,)),
  "imagenet_v2": TestSet(),
  "imagenet_sketch": TestSet(),
  "imagenet_a": TestSet(subset=True),
  "imagenet_r": TestSet(subset=True),
}


def subset(name: str, class_names: Sequence[str]) -> np.ndarray | None:
  """Which classes may be an answer, bool [K]; None: all.

  Args:
    name: of the data set in TFDS.
    class_names: of its K classes, WordNet ids.
  """
  if name not in TEST_SETS or not TEST_SETS[name].subset:
    return None
  path = Path(__file__).with_name("imagenet_subsets.txt")
  for block in path.read_text("utf-8").split("\n\n"):
    first, *ids = block.split()
    if first == name:
      return np.isin(class_names, ids)
  raise ValueError(f"{path} has no {name}")
