"""Abuse of the decoder: image files that are damaged, huge, or none at all."""

import functools
import io
import struct
import zlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from convmixer_jax import predict
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from tests.fuzzing import abuse
from tests.fuzzing import broken
from tests.fuzzing import examples
from tests.fuzzing import guarded
from tests.fuzzing import make

pytestmark = pytest.mark.usefixtures("little_memory")


def picture(mode, kind, size=(23, 17), **options):
  noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
  image = Image.fromarray(noise, "RGBA").convert(mode)
  if mode == "I;16":
    image = Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def png(width, height, *chunks, bits=8, color=2, data=b"x" * 50):
  """A PNG that says it is so large."""
  parts = [
    (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
  ]
  parts += [*chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
  u32 = struct.Struct(">I").pack
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    u32(len(body)) + name + body + u32(zlib.crc32(name + body))
    for name, body in parts
  )


@functools.cache
def pictures():
  """Each format that has a decoder of its own, and each odd mode."""
  frame = Image.open(io.BytesIO(picture("RGB", "PNG")))
  more = dict(save_all=True, append_images=[frame, frame.rotate(90)])
  exif = b"Exif\x00\x00MM\x00*" + b"\xff" * 40
  return [
    picture(mode, kind, **options)
    for mode, kind, options in (
      ("RGB", "JPEG", {"exif": exif}),
      ("L", "JPEG", {"progressive": True}),
      ("CMYK", "JPEG", {}),
      *((mode, "PNG", {}) for mode in ("RGBA", "P", "1", "LA", "I;16")),
      *(("RGB", kind, more) for kind in ("PNG", "GIF", "WEBP", "TIFF")),
      ("P", "GIF", {}),
      ("RGBA", "WEBP", {"lossless": True}),
      *((mode, "BMP", {}) for mode in ("RGB", "P")),
      ("RGB", "TIFF", {"compression": "tiff_lzw"}),
      ("I;16", "TIFF", {}),
      ("L", "PPM", {}),
      *(("RGB", kind, {}) for kind in ("TGA", "ICO", "EPS", "JPEG2000", "DDS")),
    )
  ]


SIDES = st.sampled_from([0, 1, 17, 65535, 10**5, 10**6, 2**31 - 1, 2**32 - 1])
HUGE = zlib.compress(bytes(1 << 22), 9)  # Of 4 MB, from 4 kB.
SHORT = st.sampled_from([1, 2, 3])
LONG = st.sampled_from([1000, 30_000, 65_535, 10**6])
BOMBS = st.one_of(
  st.builds(
    png, SIDES, SIDES, color=st.integers(0, 7), bits=st.integers(0, 17)
  ),
  st.builds(
    lambda short, long, wide: (
      png(long, short, data=bytes(short * (1 + 3 * long)))
      if wide
      else png(short, long, data=bytes(long * (1 + 3 * short)))
    ),
    SHORT, LONG, st.booleans(),
  ),
  st.builds(
    lambda name, body: png(5, 5, (name, body)),
    st.sampled_from([b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"PLTE"]),
    st.one_of(st.just(b"a\x00\x00" + HUGE), st.binary(max_size=40),
              st.just(b"a\x00\x01\x00\x00\x00" + HUGE)),
  ),
)  # fmt: skip
IMAGES = st.one_of(
  st.deferred(lambda: broken(pictures())),
  st.deferred(lambda: broken(pictures())),
  BOMBS,
  st.binary(max_size=64),
)
TRAIN = dict(scale=(0.05, 1.0), ratio=(0.75, 4 / 3), interpolation="random")


def test_image_files(folder):
  """One in a folder data set, to train on, to evaluate on and to predict."""
  path = folder / "train" / "a" / "x.jpg"
  path.parent.mkdir(parents=True)
  path.touch()
  source = sources.open_source("folder", str(folder), "train", 8)
  readable = []

  def each(data):
    del data  # For the report of what fails.
    rows = dict(batch_size=1, rows=np.arange(1), image_size=8)
    (train_batch,) = stream.train_batches(
      source, seed=0, start=0, stop=1, **rows, **TRAIN
    )
    (eval_batch,) = stream.eval_batches(source, crop_pct=0.9, **rows)
    assert eval_batch["mask"].tolist() == [True]
    return train_batch["image"], eval_batch["image"]

  def again():
    ((_, images, errors),) = predict.decoded([str(path)], 1, 8, 0.9)
    for error in filter(None, errors):
      raise UserError(f"{path}: {error}")
    return (images,)

  @examples(150)
  @hypothesis.given(IMAGES)
  def run(data):
    path.write_bytes(data)
    found = abuse(each, data, folder=folder, names=[str(path)])
    other = abuse(again, folder=folder, names=[str(path)])
    assert found is None or other is not None  # Decoded at another size.
    readable.append(found is not None)
    for images in (*(found or ()), *(other or ())):
      assert images.shape == (1, 8, 8, 3)
      assert images.dtype == np.uint8

  run()
  assert 0.02 < np.mean(readable) < 0.9


@pytest.mark.parametrize(
  "kind", ["loop", "fifo", "device", "empty", "ps", "thin"]
)
def test_what_is_no_image_file(kind, folder):
  """Named, within the budget of unreadable ones skipped; never waited for."""
  path = folder / "train" / "a" / "x.jpg"
  path.parent.mkdir(parents=True)
  if kind == "ps":
    path.write_bytes(picture("RGB", "EPS"))
  elif kind == "thin":  # Of 60 KB, which would take 100 GB.
    path.write_bytes(picture("L", "PNG", size=(1, 65_000)))
  else:
    make(kind, path)
  (path.parent / "folder.jpg").mkdir()
  good = path.with_name("y.jpg")
  good.write_bytes(picture("RGB", "JPEG"))
  source = sources.open_source("folder", str(folder), "train", 224)
  assert len(source) == 2

  def score(budget):
    rows = dict(batch_size=2, rows=np.arange(2), image_size=224, crop_pct=0.96)
    (batch,) = stream.eval_batches(source, max_unreadable=budget, **rows)
    return batch["mask"].sum()

  assert abuse(score, 0, folder=folder, names=[str(path)]) is None
  assert abuse(score, 1, folder=folder) == 1
  with guarded(folder):
    files = predict.image_files([str(folder)])
    ((_, _, errors),) = predict.decoded([str(path), str(good)], 2, 224, 0.96)
  assert set(files) == {str(path), str(good)}
  assert "cannot be decoded: " in errors[0]
  assert errors[1] == ""
