import dataclasses
import errno
import gc
import gzip
import io
import json
from multiprocessing import shared_memory
from multiprocessing import spawn
import os
from pathlib import Path
import shutil
import struct
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from convmixer_jax import predict
from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.data import tfrecord
from convmixer_jax.errors import UserError
from tests import common


def photo(seed, width, height):
  """Smooth random colours with a little noise: what a JPEG is made for."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
  smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
  noise = rng.integers(-9, 10, smooth.shape)
  return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encoded(image, **options):
  file = io.BytesIO()
  image.save(file, **{"format": "JPEG", **options})
  return file.getvalue()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """An ImageFolder: 3 classes with 7 photographs each, and 2 to validate on."""
  root = tmp_path_factory.mktemp("folder")
  for split, count in (("train", 7), ("val", 2)):
    for label, name in enumerate(("n01", "n02", "n03")):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        image = photo(100 * label + i, 40 + 5 * i, 60 - 4 * label)
        data = encoded(image)
        (root / split / name / f"{split}_{i}.JPEG").write_bytes(data)
  (root / "train" / "n01" / "notes.txt").write_text("not an image")
  return root


# --- The stream.


def test_an_epoch_is_a_permutation_and_the_next_is_another():
  size, batch = 50, 8
  samples = stream.sample_indices(3, np.arange(4 * size), size)
  epochs = samples.reshape(4, size)
  for epoch in epochs:
    assert sorted(epoch) == list(range(size))
  assert len({tuple(epoch) for epoch in epochs}) == 4
  # Batches cut that same sequence: batch 6 crosses into the second epoch.
  step = 6
  crossing = stream.sample_indices(3, step * batch + np.arange(batch), size)
  assert np.array_equal(crossing, samples[48:56])
  other_seed = stream.sample_indices(4, np.arange(size), size)
  assert not np.array_equal(other_seed, epochs[0])


def collect(
  source, hosts, start=0, stop=5, batch_size=8, image_size=8, seed=0, **options
):
  """The global batches, joined from every host's rows."""
  per_host = [
    list(
      stream.train_batches(
        source,
        seed=seed,
        batch_size=batch_size,
        rows=rows,
        start=start,
        stop=stop,
        image_size=image_size,
        scale=(0.3, 1.0),
        ratio=(0.75, 4 / 3),
        interpolation="random",
        **options,
      )
    )
    for rows in np.split(np.arange(batch_size), hosts)
  ]
  return [
    {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    for batches in zip(*per_host)
  ]


def same(a, b):
  assert len(a) == len(b) > 0
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    assert all(np.array_equal(x[k], y[k]) for k in x)


@pytest.fixture(params=["in memory", "encoded"])
def source(request, folder):
  if request.param == "encoded":
    return sources.open_source("folder", str(folder), "train", 8)
  return sources.open_source("digits", None, "train[:21]", 8)


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_batches(source, hosts):
  same(collect(source, hosts), collect(source, 1))


def test_a_stream_begun_later_continues_the_same(source):
  same(collect(source, 1, start=3), collect(source, 1)[3:])


def labels_of(source):
  if isinstance(source, sources.InMemory):
    return source.labels
  return [source.read(i)[1] for i in range(len(source))]


def test_an_epoch_of_batches_loses_no_image(source):
  batches = collect(source, 1, stop=21, batch_size=8)  # 8 epochs of 21 images
  labels = np.concatenate([b["label"] for b in batches])
  for epoch in labels.reshape(8, 21):
    assert np.array_equal(np.bincount(epoch), np.bincount(labels_of(source)))


def test_crops_differ_between_epochs_and_seeds():
  """Of a photograph that a source has 21 times."""
  data = encoded(photo(0, 40, 30))
  source = sources.Encoded(lambda index: (data, 0), 21, ["a"])

  def crops(seed, epoch):
    (batch,) = collect(source, 1, epoch, epoch + 1, 21, seed=seed)
    return batch["image"]

  def by_image(epoch):
    samples = epoch * 21 + np.arange(21)
    return crops(0, epoch)[stream.sample_indices(0, samples, 21).argsort()]

  for a, b in ((by_image(0), by_image(1)), (crops(0, 0), crops(1, 0))):
    assert np.mean((a != b).any((1, 2, 3))) > 0.9


def eval_batches(source, batch_size, **options):
  rows = np.arange(batch_size)
  options = {"image_size": 8, "crop_pct": 0.9} | options
  return stream.eval_batches(
    source, batch_size=batch_size, rows=rows, **options
  )


@pytest.mark.parametrize("batch_size", [4, 5, 21, 32])
def test_eval_batches_cover_the_split_once(source, batch_size):
  batches = list(eval_batches(source, batch_size))
  mask = np.concatenate([b["mask"] for b in batches])
  labels = np.concatenate([b["label"] for b in batches])
  assert mask.sum() == 21
  assert np.all(mask[:21])
  assert np.array_equal(labels[mask], labels_of(source))
  assert all(b["image"].shape == (batch_size, 8, 8, 3) for b in batches)
  assert all(b["image"].dtype == np.uint8 for b in batches)


# --- Decoding.


@pytest.mark.parametrize(
  ("width", "height", "mode"),
  [(300, 400, "RGB"), (517, 233, "L"), (256, 256, "CMYK")],
)
def test_eval_image_is_pillows(width, height, mode):
  """Resize the short side to 233, bicubic, and crop the centre 224 of it."""
  data = encoded(photo(0, width, height).convert(mode))
  ours = decode.eval_image(data, 224, 0.96)
  image = Image.open(io.BytesIO(data)).convert("RGB")
  # torchvision's Resize(233) and CenterCrop(224), in Pillow's terms.
  if width <= height:
    resized = (233, int(233 * height / width))
  else:
    resized = (int(233 * width / height), 233)
  image = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
  top = round((resized[1] - 224) / 2)
  left = round((resized[0] - 224) / 2)
  assert np.array_equal(ours, image[top : top + 224, left : left + 224])


@pytest.mark.parametrize(
  ("mode", "options"),
  [
    ("RGB", {}),
    ("RGB", {"quality": 30}),
    ("RGB", {"subsampling": "4:4:4"}),
    ("RGB", {"subsampling": "4:2:2"}),
    ("RGB", {"progressive": True}),
    ("RGB", {"keep_rgb": True}),
    ("L", {}),
    ("CMYK", {}),
    ("RGBA", {"format": "PNG"}),
  ],
)
def test_train_image_is_pillows(mode, options):
  """The whole of it, and a random box."""
  data = encoded(photo(0, 79, 61).convert(mode), **options)
  whole = Image.open(io.BytesIO(data)).convert("RGB")
  for interpolation, resample, scale, ratio in (
    ("bilinear", decode.BILINEAR, (1.0, 1.0), (79 / 61, 79 / 61)),
    ("bicubic", decode.BICUBIC, (0.3, 0.3), (1.0, 1.0)),
  ):
    ours = decode.train_image(
      data,
      32,
      np.random.default_rng(1),
      scale=scale,
      ratio=ratio,
      interpolation=interpolation,
    )
    box = decode.random_box(79, 61, np.random.default_rng(1), scale, ratio)
    expected = whole.crop(box).resize((32, 32), resample)
    assert np.array_equal(ours, np.asarray(expected))
    assert (box == (0, 0, 79, 61)) == (interpolation == "bilinear")


def assert_are_imagenets(top, left, height, width):
  """4,000 boxes within 450 x 450: of 8 to 100 %, and of 3:4 to 4:3."""
  assert top.min() == left.min() == 0
  assert max((top + height).max(), (left + width).max()) <= 450
  share, ratio = height * width / 450**2, width / height
  assert 0.078 < share.min() < 0.1
  assert share.max() > 0.95
  assert 0.74 < ratio.min() < 0.77
  assert 1.30 < ratio.max() < 1.35
  assert abs(np.log(ratio).mean()) < 0.02  # Log-uniform about 1.


def test_the_orientation_in_exif_data_is_ignored():
  """As torchvision and timm do; predict decodes as evaluation does."""
  image, exif = photo(0, 40, 30), Image.Exif()
  exif[0x0112] = 6  # Turned by 90 degrees.
  for decoded in (
    lambda data: decode.eval_image(data, 16, 0.9),
    lambda data: decode.train_image(
      data,
      16,
      np.random.default_rng(0),
      scale=(0.5, 1.0),
      ratio=(1.0, 1.0),
      interpolation="bilinear",
    ),
  ):
    turned = decoded(encoded(image, exif=exif))
    assert np.array_equal(turned, decoded(encoded(image)))


def test_random_boxes_follow_their_law():
  rng = np.random.default_rng(0)
  law = (0.08, 1.0), (3 / 4, 4 / 3)
  boxes = [decode.random_box(450, 450, rng, *law) for _ in range(4000)]
  left, top, right, bottom = np.transpose(boxes)
  assert_are_imagenets(top, left, bottom - top, right - left)


def test_large_photographs_are_decoded_smaller():
  """Nearly the same image, from a fraction of the pixels."""
  image = photo(0, 50, 40).resize((1000, 800), Image.Resampling.BICUBIC)
  crop = lambda data: decode.train_image(
    data,
    32,
    np.random.default_rng(1),
    scale=(0.5, 0.5),
    ratio=(1.0, 1.0),
    interpolation="bicubic",
  )
  small, whole = (
    crop(encoded(image, **options)).astype(int)
    for options in ({"quality": 95}, {"format": "PNG"})
  )
  difference = np.abs(small - whole)
  assert 0 < difference.mean() < 2


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
  data = encoded(Image.fromarray(values), format="PNG")
  ours = decode.whole_image(data, 32)
  assert np.array_equal(ours, np.repeat(values[..., None] >> 8, 3, axis=-1))


def test_of_an_animation_the_first_frame_counts():
  frames = [photo(seed, 32, 32) for seed in range(3)]
  data = encoded(
    frames[0], format="PNG", save_all=True, append_images=frames[1:]
  )
  assert np.array_equal(decode.whole_image(data, 32), np.asarray(frames[0]))


def test_what_has_no_8_bit_form_is_refused():
  floats = Image.fromarray(np.ones((8, 8), np.float32))
  with pytest.raises(ValueError, match="floating-point"):
    decode.whole_image(encoded(floats, format="TIFF"), 8)
  wide = Image.fromarray(np.full((8, 8), 70000, np.int32))
  with pytest.raises(ValueError, match="16 bits"):
    decode.whole_image(encoded(wide, format="TIFF"), 8)


def test_a_budget_of_unreadable_files(folder, tmp_path, capsys):
  root = shutil.copytree(folder, tmp_path / "photos")
  for name in ("train/n01/train_3.JPEG", "val/n02/val_1.JPEG"):
    (root / name).write_bytes(b"not a JPEG")
  train, val = (
    sources.open_source("folder", str(root), split, 16)
    for split in ("train", "val")
  )
  # Two epochs: the file is met twice and counted once; another replaces it.
  batches = collect(train, 1, stop=6, batch_size=7, max_unreadable=1)
  assert sum(len(b["label"]) for b in batches) == 42
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 1
  assert "n01/train_3.JPEG: cannot be decoded" in warnings[0]
  assert warnings[0].endswith("1 of 1 allowed")
  assert "unreadable" not in batches[0]
  batches = eval_batches(val, 4, max_unreadable=1)
  masks = [batch["mask"] for batch in batches]
  assert np.concatenate(masks).sum() == 5  # Of six, and two of padding.
  assert "n02/val_1.JPEG: cannot" in capsys.readouterr().err
  (root / "train/n03/train_0.JPEG").write_bytes(b"")
  with pytest.raises(UserError, match=r"cannot be decoded; 2 of 1 allowed"):
    collect(train, 1, stop=3, batch_size=7, max_unreadable=1)


# --- Sources.


def test_digits():
  train, test = (
    sources.open_source("digits", None, split, 8) for split in ("train", "test")
  )
  assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
  from sklearn import datasets

  digits = datasets.load_digits()
  assert np.array_equal(test.labels, digits.target[::5])
  exact = digits.images[::5] * 255 / 16
  assert np.abs(test.images[..., 1] - exact).max() <= 0.5
  part = sources.open_source("digits", None, "train[90%:]", 8)
  assert np.array_equal(part.images, train.images[1293:])
  both = sources.open_source("digits", None, "train+test", 8)
  assert len(both) == 1797
  halves = sources.open_source("digits", None, "train[50%:]+train[:50%]", 8)
  assert sorted(halves.labels) == sorted(train.labels)
  large = sources.open_source("digits", None, "test[:5]", 24)
  (large,) = eval_batches(large, 5, image_size=24, crop_pct=1.0)
  for i, image in enumerate(test.images[:5]):
    resized = Image.fromarray(image).resize((24, 24), decode.BICUBIC)
    assert np.array_equal(large["image"][i], resized)


def test_folder(folder):
  train = sources.open_source("folder", str(folder), "train", 16)
  assert len(train) == 21
  assert train.class_names == ["n01", "n02", "n03"]
  for i in range(21):
    data, label = train.read(i)
    path = Path(train.read.files[i])
    assert path.parent.name == train.class_names[label]
    assert path.read_bytes() == data
  # A slice holds every class: the order is random, and always the same.
  some = sources.open_source("folder", str(folder), "train[:50%]", 16)
  assert {some.read(i)[1] for i in range(len(some))} == {0, 1, 2}
  rest = sources.open_source("folder", str(folder), "train[50%:]", 16)
  assert len(some) + len(rest) == 21
  assert not {*some.read.files} & {*rest.read.files}
  twice = sources.open_source("folder", str(folder), "train[5:]+train[:5]", 16)
  assert sorted(twice.read.files) == sorted(train.read.files)


def test_labels_are_those_of_train(folder, tmp_path):
  """Whatever else lies beside it, and where a held-out class is missing."""
  root = shutil.copytree(folder, tmp_path / "root")
  (root / "a_devkit" / "a_folder").mkdir(parents=True)
  shutil.rmtree(root / "val" / "n01")
  val = sources.open_source("folder", str(root), "val", 16)
  assert val.class_names == ["n01", "n02", "n03"]
  assert {val.read(i)[1] for i in range(len(val))} == {1, 2}
  (root / "val" / "n99").mkdir()
  with pytest.raises(UserError, match="val has the class n99"):
    sources.open_source("folder", str(root), "val", 16)
  (root / "train" / "n02" / "more").mkdir()
  file = root / "train" / "n02" / "train_0.JPEG"
  file.rename(file.parent / "more" / "0.TIFF")
  assert len(sources.open_source("folder", str(root), "train", 16)) == 21


def test_folders_as_people_have_them(folder, tmp_path):
  """Hidden entries, links and loops of links; any name of a split."""
  root = shutil.copytree(folder, tmp_path / "root")
  images = lambda split: len(sources.open_source("folder", str(root), split, 8))
  n01 = root / "train" / "n01"
  for place in (root, root / "train", n01, n01 / "more"):
    (place / ".ipynb_checkpoints").mkdir(parents=True)
    shutil.copy(n01 / "train_0.JPEG", place / ".ipynb_checkpoints" / "0.jpeg")
  (n01 / "._train_0.JPEG").write_bytes(b"\0\5\x16\7")
  assert images("train") == 21
  assert len(predict.image_files([str(n01)])) == 7
  (n01 / "others").symlink_to(root / "val" / "n02")
  for name, target in (("self", "."), ("up", ".."), ("pool", tmp_path / "a")):
    (n01 / "more" / name).symlink_to(target)
  for here, there in (("a", "b"), ("b", "a")):
    (tmp_path / here).mkdir()
    (tmp_path / here / "on").symlink_to(tmp_path / there)
    shutil.copy(n01 / "train_0.JPEG", tmp_path / here)
  assert images("train") == 21 + 2 + 2
  assert len(predict.image_files([str(n01)])) == 7 + 2 + 2
  (root / "train").rename(root / "2 train+clean")
  shutil.copytree(root / "val", root / "2 train")
  assert images("2 train+clean[:20%]+val") == 5 + 6
  assert images("val + 2 train") == 12


def prepare(root, name, images, shape):
  """Prepares a TFDS data set of `images`, as ArrayRecord."""

  class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "id": tfds.features.Text(),
        "picture": tfds.features.Image(shape=shape),
        "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
      }
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(features), disable_shuffling=True
      )

    def _split_generators(self, dl_manager):
      return {
        "train": self._generate_examples(np.arange(len(images)) % 3),
        "test": self._generate_examples(np.arange(len(images)) % 2 - 1),
      }

    def _generate_examples(self, kinds):
      for i, image in enumerate(images):
        # TFDS encodes arrays with tensorflow, and copies encoded files.
        file = io.BytesIO(encoded(Image.fromarray(image), format="PNG"))
        yield i, {"id": str(i), "picture": file, "kind": kinds[i]}

  Builder.name = name
  Builder(data_dir=root, file_format="array_record").download_and_prepare()


def frame(content):
  """A record of a TFRecord file; the checksums as their definition has them."""

  def masked_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
      crc ^= byte
      for _ in range(8):
        crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32

  length = struct.pack("<Q", len(content))
  crcs = (struct.pack("<I", masked_crc(x)) for x in (length, content))
  return length + next(crcs) + content + next(crcs)


def as_tfrecord(root, name, new, lengths):
  """Copies a prepared set as TFRecord, with shards of these lengths."""
  builder = tfds.builder(name, data_dir=root)
  folder = root / new / "1.0.0"
  folder.mkdir(parents=True)
  for file in (root / name / "1.0.0").glob("*.[jt]*[nt]"):
    shutil.copy(file, folder)
  info = json.loads((folder / "dataset_info.json").read_text())
  info |= {"fileFormat": "tfrecord", "name": new}
  for split in info["splits"]:
    split["shardLengths"] = [str(n) for n in lengths]
    records = iter(
      builder.as_data_source(
        split["name"],
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      )
    )
    for i, n in enumerate(lengths):
      file = f"{new}-{split['name']}.tfrecord-{i:05}-of-{len(lengths):05}"
      frames = [frame(next(records)) for _ in range(n)]
      (folder / file).write_bytes(b"".join(frames))
  (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
  """Sets with the same images as ArrayRecord, and some as TFRecord.

  In the test split, half of the images have no label.
  """
  root = tmp_path_factory.mktemp("tfds")
  images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
  with tfds.core.registered.skip_registration():
    prepare(root, "small", images, (8, 8, 3))
    prepare(root, "photos", images, (None, None, 3))
    prepare(root, "wide", images[:, 1:7], (6, 8, 3))
    prepare(root, "wide_photos", images[:, 1:7], (None, None, 3))
  as_tfrecord(root, "small", "old", (7, 1, 16))
  as_tfrecord(root, "photos", "old_photos", (7, 1, 16))
  return root, images


def test_tfds_in_memory(tfds_dir):
  root, images = tfds_dir
  source = sources.open_source("small", str(root), "train[4:]", 8)
  assert isinstance(source, sources.InMemory)
  assert np.array_equal(source.images, images[4:])
  assert np.array_equal(source.labels, np.arange(4, 24) % 3)
  assert list(source.class_names) == ["a", "b", "c"]
  swapped = sources.open_source("small", str(root), "train[4:]+train[:4]", 8)
  assert np.array_equal(swapped.images, np.roll(images, -4, axis=0))


def test_tfds_of_many_sizes_is_decoded_on_the_way(tfds_dir, monkeypatch):
  root, images = tfds_dir
  source = sources.open_source("photos", str(root), "train[:5]", 8)
  assert isinstance(source, sources.Encoded)
  assert len(source) == 5
  data, label = source.read(4)
  assert np.array_equal(Image.open(io.BytesIO(data)), images[4])
  assert label == 1
  same(collect(source, 1, stop=2, num_workers=2), collect(source, 2, stop=2))
  # At the end no shared memory is left; a worker does not import the program.
  shared = lambda x: type(x) is shared_memory.SharedMemory  # torch has proxies.
  for _ in range(20):  # A thread of grain's frees it.
    if not (left := [*filter(shared, gc.get_objects())]):
      break
    time.sleep(0.1)
  assert not left
  monkeypatch.setattr(
    sys.modules["__main__"], "__file__", "a.py", raising=False
  )
  imports = lambda name: "main" in "".join(spawn.get_preparation_data(name))
  assert imports("another process")
  assert not imports("grain-process-prefetch")


def test_tfrecord_is_read_as_array_record(tfds_dir):
  """The same records in the same order, also by processes and of slices."""
  root, _ = tfds_dir
  opened = lambda name, split: sources.open_source(name, str(root), split, 8)
  for split in (
    "train",
    "train[6:9]",
    "train[:50%]",
    "train[95%:]+train[:2]",
    "train[7:8]",
  ):
    old, new = opened("old", split), opened("small", split)
    assert np.array_equal(old.images, new.images)
    assert np.array_equal(old.labels, new.labels)
  old, new = opened("old_photos", "train"), opened("photos", "train")
  assert [*map(old.read, range(24))] == [*map(new.read, range(24))]
  with pytest.raises(IndexError):
    old.read(24)
  same(collect(old, 1, stop=2, num_workers=2), collect(new, 1, stop=2))


def test_tfrecord_as_tfds_writes_it():
  """By tensorflow 2.21, from CIFAR-10; what tfds.load gives is known."""
  root = str(common.DATA / "tfds")
  source = sources.open_source("few", root, "train", 32)
  assert source.labels.tolist() == [2, 1, 1, 6, 4, 9, 9]
  assert source.images.sum((1, 2, 3)).tolist() == [
    367437, 277503, 317875, 317790, 246449, 400427, 410851
  ]  # fmt: skip
  assert source.class_names[6] == "frog"


@pytest.fixture
def few(tmp_path, monkeypatch):
  """A copy of that set, in which a test may damage the shard of 3 images."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  shutil.copytree(common.DATA / "tfds", tmp_path / "tfds")
  shards = (tmp_path / "tfds" / "few").rglob("*-00001-of-*")
  return str(tmp_path / "tfds"), *shards


@pytest.mark.parametrize(
  ("damage", "says"),
  [
    (lambda x: x[:-1], "truncated in the record at byte 5100;"),
    (lambda x: x[: 5100 + 5], "has 2 whole records in 5100 of 5105 bytes; exp"),
    (lambda x: x[:5100], "has 2 whole records in 5100 of 5100 bytes; expect"),
    (lambda x: x + x[:2], "has 3 whole records in 7248 of 7250 bytes; expect"),
    (lambda x: x[:6] + b"\x7f" + x[7:], "damaged at byte 0, in a record's hea"),
    (lambda x: bytes(2**20), "damaged at byte 0"),
    (lambda x: b"", "has 0 whole records in 0 of 0 bytes"),
    (gzip.compress, "is compressed with gzip"),
  ],
)
def test_damaged_tfrecord(few, damage, says):
  root, shard = few
  shard.write_bytes(damage(shard.read_bytes()))
  with pytest.raises(UserError, match=says) as e:
    sources.open_source("few", root, "train", 32)
  assert str(shard) in str(e.value)


def test_any_damage_to_tfrecord_is_an_error_or_found_later(few, tmp_path):
  """A changed byte in a header is found before any record is read."""
  root, shard = few
  whole = shard.read_bytes()
  opened = lambda: sources.open_source("few", root, "train", 30)
  source = opened()
  second = whole.index(frame(source.read.source.data_source[5]))
  for place in (*range(12), *range(second, second + 12)):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << place % 8
    shard.write_bytes(damaged)
    with pytest.raises(
      UserError, match=f"at byte {0 if place < 12 else second}"
    ):
      opened()
  # A file that is cut short, or goes, after it was opened.
  shard.write_bytes(whole)
  source = opened()
  shard.write_bytes(whole[:-9])
  assert source.read(5)
  with pytest.raises(UserError, match=r"00001-of-00002: truncated in .* 5100"):
    source.read(6)
  shard.unlink()
  with pytest.raises(UserError, match=r"00001-of-00002: No such file"):
    source.read(6)
  with pytest.raises(UserError, match=r"00001-of-00002: No such file"):
    opened()
  # Content that is no example.
  frames = frame(b"\xff" * 9) * 3
  shard.write_bytes(frames)
  for size in (30, 32):
    with pytest.raises(UserError, match=r"data.name=few: records 0 to 6 of tr"):
      sources.open_source("few", root, "train", size)


def test_tfrecords_are_searched_once(few, tmp_path, monkeypatch):
  root, shard = few
  searched = []
  scan = tfrecord._scan
  monkeypatch.setattr(
    tfrecord, "_scan", lambda *x: searched.append(x[0]) or scan(*x)
  )

  def images(searches):
    searched.clear()
    found = sources.open_source("few", root, "train", 32).images
    assert len(searched) == searches
    return found

  first = images(2)
  assert np.array_equal(images(0), first)
  (kept,) = (tmp_path / "cache" / "convmixer_jax").glob("tfrecord-*")
  for damaged in (kept.read_bytes()[:-3], b"", bytes(kept.stat().st_size)):
    kept.write_bytes(damaged)
    assert np.array_equal(images(2), first)
    assert np.array_equal(images(0), first)
  os.utime(shard, ns=(1, 1))
  assert np.array_equal(images(2), first)
  kept.parent.chmod(0o777)  # Others could write there.
  assert np.array_equal(images(2), first)
  kept.parent.chmod(0o700)
  os.utime(shard, ns=(2, 2))
  full = OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(np, "save", mock.Mock(side_effect=full))
  assert np.array_equal(images(2), first)
  assert np.array_equal(images(2), first)


@pytest.mark.parametrize(
  ("fixed", "varying", "size"),
  [("small", "photos", 8), ("small", "photos", 6), ("wide", "wide_photos", 6)],
)
def test_preprocessing_depends_on_config_and_pixels_alone(
  tfds_dir, tmp_path, monkeypatch, fixed, varying, size
):
  """Not on what a data set declares, nor on where its images are held."""
  root, _ = tfds_dir
  opened = lambda name: sources.open_source(name, str(root), "train", size)
  trained = lambda source: collect(source, 1, image_size=size)
  first, photos = opened(fixed), opened(varying)
  monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
  streamed = opened(fixed)
  assert isinstance(first, sources.InMemory) == (size == 8)
  assert isinstance(streamed, sources.Encoded)
  assert first.crop_on_device == streamed.crop_on_device == (size == 8)
  same(trained(first), trained(streamed))
  if size != 8:  # Otherwise the device crops, unless sizes are not declared.
    same(trained(first), trained(photos))
  for i in range(24):
    (tmp_path / f"{i:02}.png").write_bytes(photos.read(i)[0])
  files = predict.image_files([str(tmp_path)])
  for crop_pct in (1.0, 0.7):
    options = {"image_size": size, "crop_pct": crop_pct}
    (batch,) = eval_batches(photos, 24, **options)
    for source in (first, streamed):
      same([*eval_batches(source, 24, **options)], [batch])
    ((_, predicted, _),) = predict.decoded(files, 24, size, crop_pct)
    assert np.array_equal(predicted, batch["image"])


@pytest.mark.parametrize("limit", [sources.IN_MEMORY_BYTES, 0])
def test_images_without_a_label(tfds_dir, monkeypatch, limit):
  root, _ = tfds_dir
  monkeypatch.setattr(sources, "IN_MEMORY_BYTES", limit)
  with pytest.raises(
    UserError, match=r"eval_split=test: 12 of 24 .*such as -1"
  ):
    sources.open_source("small", str(root), "test", 8)
  # At the latest where it is read; it does not count as unreadable.
  source = sources.open_source("photos", str(root), "test[1:2]", 6)
  reader = dataclasses.replace(source.read, num_classes=0)
  source = dataclasses.replace(source, read=reader)
  with pytest.raises(UserError, match=r"eval_split=test\[1:2\]: 1 of 1 "):
    collect(source, 1, max_unreadable=1)


def test_preparing_names_the_command_that_installs_tensorflow(
  tfds_dir, monkeypatch
):
  root, _ = tfds_dir

  def prepare(builder):
    raise ModuleNotFoundError("No module named 'tensorflow'")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
  with pytest.raises(UserError, match="-m pip install tensorflow-cpu"):
    sources.open_source("cifar100", str(root), "train", 8)


def test_what_sources_refuse(tfds_dir, folder, tmp_path):
  root, _ = tfds_dir

  def refused(match, *args):
    with pytest.raises(UserError, match=match) as e:
      sources.open_source(*args, 8)
    assert "\n" not in str(e.value)

  bucket = (SimpleNamespace(filename="gs://b/x", examples_in_shard=1),)
  with pytest.raises(
    UserError, match=r"gs://b/x: .* copy the data set to a dis"
  ):
    tfrecord.open_records(bucket)
  refused("small.*|digits", "smal", str(root), "train")
  refused("cifar10", "cifar11", str(root), "train")
  refused("no such directory", "cifar10", str(tmp_path / "none"), "train")
  refused("data.dir: required", "folder", None, "train")
  refused("contains no folders", "folder", str(tmp_path), "train")
  refused("eval_split=test: has train, val", "folder", str(folder), "test")
  refused(r"eval_split=train\[:9: has train, test", "digits", None, "train[:9")
  refused("has train, test", "digits", None, "all[:10]")
  refused("has no images", "digits", None, "train[5:5]")
  broken = shutil.copytree(folder, tmp_path / "broken")
  path = str(broken)
  refused(f"below, .*data.dir={path}$", "folder", str(tmp_path), "train")
  refused(f"above, .*data.dir={path}$", "folder", f"{path}/train", "train")
  flat = f"{path}/val"  # Of classes, as `folder` leaves it, but no split's.
  refused(f"move the classes into {flat}/train$", "folder", flat, "train")
  refused("pass one of these.*eval_split=val, or a slice", "folder", path, "te")
  renamed = (broken / "train" / "n01").rename(broken / "train" / "n\n1")
  refused(r"class train/n\\n1: has a line break", "folder", path, "train")
  shutil.rmtree(renamed)
  (broken / "train" / "n01").mkdir()
  (broken / "train" / "n01" / "0.heic").touch()
  refused("class train/n01 has no images; .*webp", "folder", path, "train")
  shutil.rmtree(broken / "val")
  refused(
    r"has no folder for the split val; .*'train\[90%:\]'", "folder", path, "val"
  )
  (broken / "val").mkdir()
  (broken / "val" / "0.jpeg").touch()
  refused("val contains no folders .*val/CLASS", "folder", path, "val")
  refused("not an image classification set", "voc/2007", str(root), "train")
  riegeli = shutil.copytree(root / "old", tmp_path / "old") / "1.0.0"
  info = (riegeli / "dataset_info.json").read_text()
  info = info.replace("tfrecord", "riegeli")
  (riegeli / "dataset_info.json").write_text(info)
  refused("format riegeli; ArrayRecord and", "old", str(tmp_path), "train")
