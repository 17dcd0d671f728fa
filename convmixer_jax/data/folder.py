"""Image folders, ROOT/SPLIT/CLASS/**/*.jpeg, as torchvision's ImageFolder."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
from pathlib import Path

import numpy as np

from convmixer_jax.data import decode
from convmixer_jax.data import splits
from convmixer_jax.errors import UserError


def images(top: str | os.PathLike) -> list[str]:
  """The image files below a folder, in a fixed order.

  Raises UserError if a folder cannot be read.
  """
  return [
    os.path.join(parent, file)
    for parent, _, files in sorted(_walk(top))
    for file in files
    if file.lower().endswith(decode.SUFFIXES)
  ]


def labelled(
  directory: str, split: str
) -> tuple[
  Sequence[str], np.ndarray, Sequence[str], Sequence[tuple[str, range]]
]:
  """Lists the labelled image files of a split.

  Args:
    directory: ROOT.
    split: in TFDS's notation.

  Returns:
    The files, their labels, int32, the names of the classes, and the ranges of
    the split; see `splits.parse`.

  Raises:
    UserError: there is no such split, or it is not in folders of classes.
  """

  def fail(text):
    raise UserError(f"data.dir={directory}: {text}")

  root = Path(directory).expanduser()
  names = _subfolders(root)
  if not names:
    fail("contains no folders (one per split: train, val)")
  if not splits.named(split, names):
    advice = ""
    with contextlib.suppress(UserError):  # Not of folders that nobody named.
      advice = _advice(root, names, split)
    if advice:
      fail(f"has no folder for the split {split}; {advice}")
  # Labels are those of `train`, also in a split in which a class is missing.
  classes = _subfolders(root / "train") if "train" in names else []
  listing = dict.fromkeys(names, ())
  for name in splits.named(split, names):
    here = _subfolders(root / name)
    if not here:
      fail(f"{name} contains no folders (one per class: {name}/CLASS/*.jpeg)")
    classes = classes or here
    if unknown := sorted(set(here) - set(classes)):
      fail(f"{name} has the class {unknown[0]}, which train does not have")
    if broken := [c for c in here if "\n" in c or "\r" in c]:
      fail(f"class {name}/{broken[0]}: has a line break; rename it")
    files = []
    for label, c in enumerate(classes):
      found = images(root / name / c) if c in here else []
      if c in here and not found:
        suffixes = ", ".join(decode.SUFFIXES)
        fail(f"class {name}/{c} has no images; files that end in {suffixes}"
             " are read")  # fmt: skip
      files += [(path, label) for path in found]
    # In a fixed random order, so that a slice has images of every class.
    order = np.random.default_rng(0).permutation(len(files))
    listing[name] = [files[i] for i in order]
  ranges = splits.parse(split, {name: len(x) for name, x in listing.items()})
  chosen = (listing[name][i] for name, rows in ranges for i in rows)
  files, labels = zip(*chosen)
  return files, np.array(labels, np.int32), classes, ranges


def _subfolders(path):
  return next(_walk(path), (path, [], []))[1]


def _advice(root, names, split):
  """What to do if none of `names`, the folders of root, is the split's."""
  root = Path(os.path.abspath(root))
  if names == ["train"]:
    return (
      "to hold out a tenth of the training images, pass"
      " --config.data.train_split='train[:90%]'"
      " --config.data.eval_split='train[90%:]'"
    )
  if "train" in names:
    return ""
  for name in names:
    if os.path.isdir(root / name / "train"):
      return f"pass the folder below, --config.data.dir={root / name}"
  # Of many classes, the first is enough.
  _, folders, files = next(_walk(root / names[0]), ("", [], []))
  if folders or not any(x.lower().endswith(decode.SUFFIXES) for x in files):
    return ""
  if splits.named(split, [root.name]):
    where = f"pass the folder above, --config.data.dir={root.parent}"
  else:
    where = f"move the classes into {root / 'train'}"
  return f"{names[0]} seems to be a class: {where}"


def _walk(top) -> Iterator[tuple[str, list[str], list[str]]]:
  """os.walk, without hidden entries; follows links, but not into a loop."""

  def fail(error):
    raise UserError(f"{error.filename}: {error.strerror}") from error

  shown = lambda names: sorted(x for x in names if not x.startswith("."))
  for parent, folders, files in os.walk(top, onerror=fail, followlinks=True):
    above = map(os.path.realpath, Path(os.path.abspath(parent)).parents)
    if os.path.islink(parent) and os.path.realpath(parent) in above:
      folders.clear()
    else:
      folders[:] = shown(folders)
      yield parent, folders, shown(files)
