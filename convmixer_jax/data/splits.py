"""Splits of a data set in TFDS's notation: 'train', 'train[:90%]+val'."""

from collections.abc import Iterable
from collections.abc import Mapping
import functools
import re

import tensorflow_datasets as tfds

from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError


def named(split: str, names: Iterable[str]) -> list[str]:
  """Those of `names` that `split` names."""
  return [x for x in names if re.search(_pattern(x) + "|^all$", split)]


def parse(split: str, lengths: Mapping[str, int]) -> list[tuple[str, range]]:
  """'train[:90%]' -> [('train', range(0, 1293))]; 'a+b' gives two entries.

  Args:
    split: in TFDS's notation.
    lengths: name -> number of images, of the splits that there are.

  Raises:
    UserError: there is no such split, or it is empty.
  """
  # TFDS accepts only letters, digits, - and _ in a name; a folder may have any.
  plain = {x: re.sub(r"[^\w-]", lambda c: f"_{ord(c[0])}_", x) for x in lengths}
  spec = split
  for x in sorted(lengths, key=len, reverse=True):
    spec = re.sub(_pattern(x), rf"\g<1>{plain[x]}", spec)
  info = functools.partial(tfds.core.SplitInfo, num_bytes=0)
  infos = {
    plain[x]: info(name=plain[x], shard_lengths=[n]) for x, n in lengths.items()
  }
  where = f"data.train_split or eval_split={split}"
  try:
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  except (ValueError, AssertionError, NotImplementedError) as e:
    raise UserError(
      f"{where}: has {', '.join(lengths)}; pass one of these, as in"
      f" --config.data.eval_split={[*lengths][-1]}, or a slice such as"
      f" train[:90%] or train[45000:] ({first_line(e)})"
    ) from e
  names = {plain[x]: x for x in lengths}
  rows = lambda name, part: (name, range(lengths[name])[part.from_ : part.to])
  ranges = [rows(names[part.splitname], part) for part in parts]
  if not any(rows for _, rows in ranges):
    raise UserError(
      f"{where}: has no images; there are"
      f" {', '.join(f'{n} in {x}' for x, n in lengths.items() if n)}"
    )
  return ranges


def overlap(
  a: Iterable[tuple[str, range]], b: Iterable[tuple[str, range]]
) -> bool:
  """Whether an image is in both splits, which are as `parse` returns them."""
  return any(
    name == other and max(x.start, y.start) < min(x.stop, y.stop)
    for name, x in a
    for other, y in b
  )


def _pattern(name):
  """A split's name in a text such as 'train[:90%] + val'."""
  return rf"(^|\+)\s*{re.escape(name)}\s*(?=$|[+\[])"
