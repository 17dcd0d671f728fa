"""Data sets: TFDS, an image folder, or scikit-learn's digits.

A source is `InMemory`: small images of one size, or `Encoded`: image files.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import os
from pathlib import Path
import re
import sys
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
import tqdm

from convmixer_jax.data import decode
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

# Numbers of images in splits. TFDS knows them only after preparing the data.
SIZES = {
  "cifar10": {"train": 50_000, "test": 10_000},
  "cifar100": {"train": 50_000, "test": 10_000},
  "imagenet2012": {"train": 1_281_167, "validation": 50_000},
}

# Larger data sets, such as ImageNet at 64 pixels, are decoded batch by batch.
IN_MEMORY_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class InMemory:
  """Decoded images, uint8 [N, S, S, 3], and their labels, int32 [N]."""

  images: np.ndarray
  labels: np.ndarray
  class_names: Sequence[str]
  in_memory = True

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def size(self) -> int:
    return len(self)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Image files that are not decoded yet, `size` of them.

  read(index) returns a file's bytes and label, read.name(index) its name.
  """

  read: Any
  size: int
  class_names: Sequence[str]
  in_memory = False

  def __len__(self) -> int:
    return self.size

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


Source = InMemory | Encoded


def open_source(
  name: str, directory: str | None, split: str, image_size: int
) -> Source:
  """Opens one split of a data set.

  Args:
    name: 'digits', 'folder', or a TFDS data set ('cifar10', 'mnist:3.0.1').
    directory: root of the folder, or TFDS's data directory. None is TFDS's
      default: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    split: in TFDS's notation for every source: 'train', 'train[:90%]',
      'validation', 'train[45000:]'. A folder's splits are its subfolders.
    image_size: height and width in pixels to resize images in memory to.

  Raises:
    UserError: names the invalid field of `config.data`.
  """
  if name == "digits":
    return _digits(split, image_size)
  here = os.path.isdir(os.path.expanduser(directory or ""))
  bucket = "://" in (directory or "")  # TFDS reads from buckets too.
  if directory is not None and not here and not bucket:
    raise UserError(f"data.dir={directory}: no such directory")
  if name == "folder":
    return _folder(directory, split)
  return _tfds(name, directory, split, image_size)


@dataclasses.dataclass(frozen=True)
class Description:
  """What is known about a split without its images."""

  size: int | None  # Number of images; None if unknown.
  num_classes: int | None  # None if unknown.
  shape: tuple[int | None, ...]  # Of all images; None where they differ.
  image_size: int  # Side to which they would be resized, in pixels.

  @property
  def in_memory(self) -> bool:
    """Whether `open_source` would return an `InMemory`."""
    num_bytes = (self.size or 0) * self.image_size**2 * 3
    return None not in self.shape and num_bytes <= IN_MEMORY_BYTES


def describe(
  name: str, directory: str | None, split: str, image_size: int
) -> Description:
  """Describes a split; its data need not be on this machine.

  See `open_source`; here `directory` need not exist.
  """
  here = os.path.isdir(os.path.expanduser(directory or ""))
  if name == "folder" and not here:
    return Description(None, None, (None, None, 3), image_size)
  if name in ("digits", "folder"):
    source = open_source(name, directory, split, image_size)
    shape = (None, None, 3) if name == "folder" else (8, 8, 3)
    return Description(len(source), source.num_classes, shape, image_size)
  builder, image, label = _builder(name, directory if here else None)
  lengths = {k: v.num_examples for k, v in builder.info.splits.items()}
  lengths = lengths or SIZES.get(builder.name)
  ranges = _slice(split, lengths) if lengths else None
  size = ranges and sum(len(rows) for _, rows in ranges)
  image, label = builder.info.features[image], builder.info.features[label]
  return Description(size, label.num_classes, image.shape, image_size)


def _slice(split, lengths):
  """'train[:90%]' -> [('train', range(0, 1293))]; 'a+b' gives two entries."""
  info = functools.partial(tfds.core.SplitInfo, num_bytes=0)
  infos = {k: info(name=k, shard_lengths=[n]) for k, n in lengths.items()}
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  except (ValueError, AssertionError, NotImplementedError) as e:
    raise UserError(
      f"data.train_split or eval_split={split}: has {', '.join(lengths)};"
      f" slices are written train[:90%] or train[45000:] ({first_line(e)})"
    ) from e
  rows = lambda part: range(lengths[part.splitname])[part.from_ : part.to]
  ranges = [(part.splitname, rows(part)) for part in parts]
  if not any(rows for _, rows in ranges):
    raise UserError(
      f"data.train_split or eval_split={split}: has no images; there are"
      f" {', '.join(f'{n} in {name}' for name, n in lengths.items() if n)}"
    )
  return ranges


def _digits(split, image_size):
  """1,797 real handwritten digits, 8 x 8; every fifth is in the test split."""
  # Imported here because scikit-learn takes a second and only this needs it.
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)
  images = np.repeat(images[..., None], 3, axis=-1)
  held_out = np.arange(len(images)) % 5 == 0
  ids = {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}
  ranges = _slice(split, {k: len(v) for k, v in ids.items()})
  chosen = np.concatenate([ids[name][list(rows)] for name, rows in ranges])
  if (size := len(chosen) * image_size**2 * 3) > IN_MEMORY_BYTES:
    raise UserError(
      f"data.image_size={image_size}: the digits would take"
      f" {size / 2**30:.1f} GiB of memory; choose a smaller size"
    )
  resize = lambda x: decode.resize_image(Image.fromarray(x), image_size)
  labels = digits.target[chosen].astype(np.int32)
  images = np.stack([resize(image) for image in images[chosen]])
  return InMemory(images, labels, [str(i) for i in range(10)])


@dataclasses.dataclass(frozen=True)
class _FolderReader:
  files: Sequence[str]
  labels: np.ndarray

  def __call__(self, index):
    return decode.read_file(self.files[index]), int(self.labels[index])

  def name(self, index):
    return self.files[index]


def _folder(directory, split):
  """Reads ROOT/SPLIT/CLASS/**/*.jpeg as torchvision's ImageFolder does."""
  if directory is None:
    raise UserError(
      "data.dir: required with data.name=folder: a directory that contains"
      " train/CLASS/*.jpeg and val/CLASS/*.jpeg"
    )
  root = Path(directory).expanduser()
  folders = lambda path: sorted(p.name for p in path.iterdir() if p.is_dir())
  names = folders(root)
  if not names:
    raise UserError(
      f"data.dir={directory}: contains no folders (one per split: train, val)"
    )
  # Labels are those of `train`, also in a split in which a class is missing.
  classes = folders(root / "train") if "train" in names else None
  listing = dict.fromkeys(names, ())
  wanted = lambda name: re.search(rf"(^|\+)\s*{re.escape(name)}\b", split)
  for name in filter(wanted, names):
    here = folders(root / name)
    classes = classes or here
    if unknown := sorted(set(here) - set(classes)):
      raise UserError(f"data.dir={directory}: {name} has the class"
                      f" {unknown[0]}, which train does not have")  # fmt: skip
    files = [
      (path, label)
      for label, c in enumerate(classes)
      if c in here
      for parent, _, files in sorted(os.walk(root / name / c))
      for path in sorted(os.path.join(parent, f) for f in files)
      if path.lower().endswith(decode.SUFFIXES)
    ]
    # In a fixed random order, so that a slice has images of every class.
    order = np.random.default_rng(0).permutation(len(files))
    listing[name] = [files[i] for i in order]
  ranges = _slice(split, {name: len(files) for name, files in listing.items()})
  chosen = (listing[name][i] for name, rows in ranges for i in rows)
  files, labels = zip(*chosen)
  read = _FolderReader(files, np.array(labels, np.int32))
  return Encoded(read, len(files), classes)


@dataclasses.dataclass(frozen=True)
class _TfdsReader:
  source: Any
  image: str
  label: str

  def __call__(self, index):
    record = self.source[index]
    return record[self.image], int(record[self.label])

  def name(self, index):
    return f"record {index}"


def _tfds(name, directory, split, image_size):
  builder, image, label = _prepared_builder(name, directory)
  # Called for its errors, which are clearer than those of TFDS.
  _slice(split, {k: v.num_examples for k, v in builder.info.splits.items()})
  encoded = {image: tfds.decode.SkipDecoding()}
  source = builder.as_data_source(split, decoders=encoded)
  size = len(source)
  classes = builder.info.features[label].names
  shape = builder.info.features[image].shape
  if not Description(size, len(classes), shape, image_size).in_memory:
    return Encoded(_TfdsReader(source, image, label), size, classes)
  images = np.empty((size, image_size, image_size, 3), np.uint8)
  labels = np.empty(size, np.int32)
  text = f"reading {name} {split}"
  with tqdm.tqdm(total=size, desc=text, unit="img", disable=None) as progress:
    for start in range(0, size, 1000):  # Reading in chunks is faster.
      chunk = range(start, min(start + 1000, size))
      for i, record in zip(chunk, source.__getitems__(chunk)):
        images[i] = decode.whole_image(record[image], image_size)
        labels[i] = record[label]
      progress.update(len(chunk))
  return InMemory(images, labels, classes)


def _builder(name, directory):
  """Returns a TFDS builder and the names of its image and label features."""
  try:
    builder = tfds.builder(name, data_dir=directory)
  except tfds.core.DatasetNotFoundError as e:
    known = tfds.list_builders(with_community_datasets=False)
    known += ["digits", "folder"]
    near = difflib.get_close_matches(name.split(":")[0], known, 3, cutoff=0)
    near = ", ".join(near)
    raise UserError(f"data.name={name}: unknown; nearest are {near}") from e
  except Exception as e:
    raise UserError(f"data.name={name}: {first_line(e)}") from e
  info = builder.info
  features = info.features.items()
  of_type = lambda kind: [k for k, feature in features if type(feature) is kind]
  images = of_type(tfds.features.Image)
  labels = of_type(tfds.features.ClassLabel)
  supervised = info.supervised_keys or ()
  if len(supervised) == 2:
    images = [k for k in images if k == supervised[0]] or images
    labels = [k for k in labels if k == supervised[1]] or labels
  if len(images) != 1 or len(labels) != 1:
    raise UserError(
      f"data.name={info.name}: not an image classification set; its features"
      f" are {', '.join(info.features)}"
    )
  return builder, images[0], labels[0]


def _prepared_builder(name, directory):
  """As `_builder`; downloads and prepares the data if they are not on disk."""
  builder, image, label = _builder(name, directory)
  array_record = tfds.core.FileFormat.ARRAY_RECORD
  if not builder.is_prepared():
    try:
      builder = tfds.builder(name, data_dir=directory, file_format=array_record)
      builder.download_and_prepare()
    except Exception as e:
      advice = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
      if isinstance(e, ImportError):
        pip = f"{sys.executable} -m pip install tensorflow-cpu"
        advice = f"Only preparing needs TensorFlow; install it with: {pip}"
      raise UserError(
        f"data.name={name}: not prepared in {builder.data_dir}, and preparing"
        f" it failed: {first_line(e)}. {advice}"
      ) from e
  elif array_record not in builder.info.available_file_formats():
    raise UserError(
      f"data.name={name}: {builder.data_path} is in the format"
      f" {builder.info.file_format.value}, which has no random access. Add an"
      " ArrayRecord copy with: python -m venv /tmp/convert &&"
      " /tmp/convert/bin/pip install apache-beam array_record mlcroissant"
      " importlib_resources tensorflow-cpu tensorflow-datasets &&"
      " /tmp/convert/bin/tfds convert_format --out_file_format=array_record"
      f" --dataset_dir={builder.data_path.parent}"
    )
  return builder, image, label
