"""Data sets: TFDS, an image folder, or scikit-learn's digits.

A source is `InMemory`: images that need no resizing, or `Encoded`: files.
Preprocessing depends on the config and the pixels, not on the source's kind: if
a data set declares that all its images have image_size x image_size pixels,
training crops are part of the augmentation, otherwise of decoding the files.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import os
import sys
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.data_sources import base
import tqdm

from convmixer_jax import files
from convmixer_jax.buckets import cache
from convmixer_jax.data import decode
from convmixer_jax.data import digits
from convmixer_jax.data import folder
from convmixer_jax.data import splits
from convmixer_jax.data import test_sets
from convmixer_jax.data import tfrecord
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

# Numbers of images in splits. TFDS knows them only after preparing the data.
SIZES = {
  "cifar10": {"train": 50_000, "test": 10_000},
  "cifar100": {"train": 50_000, "test": 10_000},
  "imagenet2012": {"train": 1_281_167, "validation": 50_000},
  "imagenet_resized": {"train": 1_281_167, "validation": 50_000},
}

# Larger splits, such as ImageNet at 64 pixels, are decoded batch by batch.
IN_MEMORY_BYTES = 2 * 2**30

_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


@dataclasses.dataclass(frozen=True)
class InMemory:
  """Decoded images, uint8 [N, S, S, 3], and their labels, int32 [N]."""

  images: np.ndarray
  labels: np.ndarray
  class_names: Sequence[str]
  ranges: Sequence[tuple[str, range]] = ()  # See `splits.parse`.
  crop_on_device = True
  subset = None
  label_shape = ()

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
  `crop_on_device` says that all images have the config's image_size. `subset`,
  bool [K], says which classes may be an answer; None: all. `label_shape` is ()
  for one label an image, and (L,) for up to L of them, filled up with -1.
  `ranges` are those of its split; see `splits.parse`.
  """

  read: Any
  size: int
  class_names: Sequence[str]
  crop_on_device: bool = False
  subset: np.ndarray | None = None
  label_shape: tuple[int, ...] = ()
  ranges: Sequence[tuple[str, range]] = ()

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
    image_size: height and width of the model's images, in pixels.

  Raises:
    UserError: names the invalid field of `config.data`.
  """
  if name == "digits":
    images, labels, classes, ranges = digits.labelled(split)
    if image_size == images.shape[1]:
      return InMemory(images, labels, classes, ranges)
    reader = digits.Reader(images, labels)
    return Encoded(reader, len(images), classes, ranges=ranges)
  if directory is not None and not (directory and files.is_folder(directory)):
    raise UserError(f"data.dir={directory}: no such directory")
  if files.is_url(directory or ""):
    directory = cache.local_data(name, directory)
  if name == "folder":
    if directory is None:
      raise UserError(
        "data.dir: required with data.name=folder: a directory that contains"
        " train/CLASS/*.jpeg and val/CLASS/*.jpeg"
      )
    images, labels, classes, ranges = folder.labelled(directory, split)
    reader = _FolderReader(images, labels)
    return Encoded(reader, len(images), classes, ranges=ranges)
  return _tfds(name, directory, split, image_size)


@dataclasses.dataclass(frozen=True)
class Description:
  """What is known about a split without its images."""

  size: int | None  # Number of images; None if unknown.
  num_classes: int | None  # None if unknown.
  shape: tuple[int | None, ...]  # Of all images; None where they differ.
  image_size: int  # Of the model's images, in pixels.
  subset = None  # See `Encoded`.

  @property
  def crop_on_device(self) -> bool:
    """Whether all images have the model's size; see `Encoded`."""
    return self.shape[:2] == (self.image_size, self.image_size)

  @property
  def in_memory(self) -> bool:
    """Whether `open_source` would return an `InMemory`."""
    num_bytes = (self.size or 0) * self.image_size**2 * 3
    return self.crop_on_device and num_bytes <= IN_MEMORY_BYTES


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
  ranges = splits.parse(split, lengths) if lengths else None
  size = ranges and sum(len(rows) for _, rows in ranges)
  image, label = builder.info.features[image], builder.info.features[label]
  return Description(size, label.num_classes, image.shape, image_size)


@dataclasses.dataclass(frozen=True)
class _FolderReader:
  files: Sequence[str]
  labels: np.ndarray

  def __call__(self, index):
    return decode.read_file(self.files[index]), int(self.labels[index])

  def name(self, index):
    return self.files[index]


@dataclasses.dataclass(frozen=True)
class _TfdsReader:
  source: Any
  image: str
  label: str
  split: str
  num_classes: int
  label_shape: tuple[int, ...]

  def __call__(self, index):
    record = self.source[index]
    found = np.ravel(record[self.label])
    self.check(found)
    label = np.full(self.label_shape, -1, np.int32)
    label.flat[np.arange(found.size)] = found
    return record[self.image], label

  def check(self, labels):
    """Raises UserError if there are labels that no class has."""
    last = self.num_classes - 1
    if unknown := [x for x in labels if not 0 <= x <= last]:
      raise UserError(
        f"data.train_split or eval_split={self.split}: {len(unknown)} of"
        f" {len(labels)} images that were read have labels outside 0 to {last},"
        f" such as {unknown[0]} (in TFDS, -1 means: no label); choose another"
        " split"
      )

  def name(self, index):
    return f"record {index}"


def _tfds(name, directory, split, image_size):
  builder, image, label = _prepared_builder(name, directory)
  # Its errors are clearer than those of TFDS.
  ranges = splits.parse(
    split, {k: v.num_examples for k, v in builder.info.splits.items()}
  )
  encoded = {image: tfds.decode.SkipDecoding()}
  if _ARRAY_RECORD in builder.info.available_file_formats():
    source = builder.as_data_source(split, decoders=encoded)
  else:
    source = base.BaseDataSource(builder.info, split, decoders=encoded)
    instructions = base.file_instructions(builder.info, split)
    source.data_source = tfrecord.open_records(instructions)

  def records(indices):
    try:
      return source.__getitems__(indices)
    except UserError:
      raise
    except Exception as e:  # protobuf and ArrayRecord have their own.
      text = f"records {indices[0]} to {indices[-1]} of {split}"
      raise UserError(
        f"data.name={name}: {text} cannot be read: {first_line(e)}"
      ) from e

  size = len(source)
  classes = builder.info.features[label].names
  known = Description(
    size, len(classes), builder.info.features[image].shape, image_size
  )
  usual = test_sets.TestSet()
  shape = test_sets.TEST_SETS.get(builder.name, usual).label_shape
  read = _TfdsReader(source, image, label, split, known.num_classes, shape)
  if not known.in_memory:
    read.check(np.hstack([x[label] for x in records(range(min(size, 100)))]))
    subset = test_sets.subset(builder.name, classes)
    on_device = known.crop_on_device
    return Encoded(read, size, classes, on_device, subset, shape, ranges)
  images = np.empty((size, image_size, image_size, 3), np.uint8)
  labels = np.empty(size, np.int32)
  text = f"reading {name} {split}"
  with tqdm.tqdm(total=size, desc=text, unit="img", disable=None) as progress:
    for start in range(0, size, 1000):  # Reading in chunks is faster.
      chunk = range(start, min(start + 1000, size))
      for i, record in zip(chunk, records(chunk)):
        try:
          images[i] = decode.whole_image(record[image], image_size)
        except Exception as e:  # Pillow may raise anything for a damaged file.
          text = f"record {i} of {split}: cannot be decoded: {first_line(e)}"
          raise UserError(f"data.name={name}: {text}") from e
        labels[i] = record[label]
      progress.update(len(chunk))
  read.check(labels)
  return InMemory(images, labels, classes, ranges)


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
  if builder.name in test_sets.TEST_SETS:
    labels = [test_sets.TEST_SETS[builder.name].label]
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
  if not builder.is_prepared():
    try:
      builder = tfds.builder(
        name, data_dir=directory, file_format=_ARRAY_RECORD
      )
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
  elif (
    builder.info.file_format != tfds.core.FileFormat.TFRECORD
    and _ARRAY_RECORD not in builder.info.available_file_formats()
  ):
    raise UserError(
      f"data.name={name}: {builder.data_path} is in the format"
      f" {builder.info.file_format.value}; ArrayRecord and TFRecord are read."
      " Prepare it again with file_format='array_record' in another data.dir"
    )
  return builder, image, label
