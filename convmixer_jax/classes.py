"""The names of classes: ImageNet's, and whether those of weights fit data."""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import os
from pathlib import Path
import re
import sys
from typing import Any

import jax

from convmixer_jax import files
from convmixer_jax import interop
from convmixer_jax.errors import UserError


@functools.cache
def imagenet() -> list[str]:
  """ImageNet's 1000 classes in English, in the order of their WordNet ids."""
  path = Path(__file__).parent / "data" / "imagenet_names.txt"
  return path.read_text("utf-8").splitlines()


def told(
  where: str | os.PathLike, header: Mapping[str, Any] | None, count: int
) -> list[str] | None:
  """The names that weights tell of their classes, or None.

  Args:
    where: a workdir with its classes.txt, or a file.
    header: what `weights.save` told of the file's model, with `class_names`.
    count: of the classes; another number of names tells nothing.

  Raises:
    UserError: classes.txt cannot be read.
  """
  names = (header or {}).get("class_names")
  path = files.path(where) / "classes.txt"
  if not isinstance(names, list) and files.exists(path):
    try:
      text = path.read_text("utf-8", "surrogateescape")
    except (OSError, ValueError) as e:
      raise UserError(f"{path}: {e}") from e
    # A name may hold what splitlines() takes for the end of a line.
    names = text.removesuffix("\n").split("\n")
  good = isinstance(names, list) and all(isinstance(n, str) for n in names)
  return names if good and len(names) == count else None


def check(
  where: str | os.PathLike, class_names: Sequence[str], *, trains: bool
) -> None:
  """Calls `compare` if `where` tells the names of as many classes.

  A workdir does, and a file that `weights.save` wrote. `class_names` are the
  data's.
  """
  header = None if files.is_folder(where) else interop.read_header(where)
  theirs = told(where, header, len(class_names))
  if theirs is not None:
    compare(str(where), theirs, class_names, trains=trains)


def compare(
  where: str, theirs: Sequence[str], ours: Sequence[str], *, trains: bool
) -> None:
  """Warns if the classes of weights have other names than those of data.

  WordNet ids are no other names for ImageNet's classes.

  Args:
    where: the weights are from, for the message.
    theirs: the names of the weights' classes.
    ours: those of the data; as many.
    trains: whether the weights are about to be trained on the data.

  Raises:
    UserError: they are the same names in another order, and not `trains`.
  """
  theirs, ours = [*theirs], [*ours]
  if theirs == ours or (_are_imagenets(theirs) and _are_imagenets(ours)):
    return
  k = next(k for k, pair in enumerate(zip(theirs, ours)) if len({*pair}) > 1)
  text = (
    f"{where}: class {k} is {theirs[k]} in the weights and {ours[k]} in the"
    f" data; the weights have {listed(theirs)}; the data {listed(ours)}"
  )
  if sorted(theirs) == sorted(ours) and not trains:
    raise UserError(
      f"{text}. They must have the order of the weights; the classes of a"
      " folder are in the order of their names: 00_dog, 01_cat"
    )
  if trains:
    text += ". The head starts from the weights, not anew"
  if jax.process_index() == 0:
    print(f"warning: {UserError(text)}", file=sys.stderr)


def listed(names: Sequence[str]) -> str:
  """The first ten names, for messages."""
  return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _are_imagenets(names):
  ids = (names[0], names[-1]) == ("n01440764", "n15075141")
  ids = ids and all(re.fullmatch(r"n\d{8}", name) for name in names)
  return len(names) == len(imagenet()) and (ids or names == imagenet())
