"""Random access to the records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of the length, the content, and a
checksum of the content. All lengths are read once, to find where the records
begin; these offsets are kept in the user's cache folder. The checksums of the
contents are not verified: in Python that takes longer than decoding the image,
and the decoder finds most damage.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from convmixer_jax.errors import UserError
from convmixer_jax.ops import build

_HEADER = np.dtype([("length", "<u8"), ("checksum", "<u4")])
_FRAME = _HEADER.itemsize + 4  # Bytes of a record beside its content.
_AGAIN = "copy or prepare the data set again"


@dataclasses.dataclass(frozen=True)
class Records:
  """The contents of records, by index, as bytes.

  Each is read from its file when it is asked for. Raises UserError if that file
  cannot be read, or was cut short since `open_records`.

  Attributes:
    parts: path, and int64 [n + 1]: where n successive records of that file
      begin and the last one ends, in bytes.
  """

  parts: Sequence[tuple[str, np.ndarray]]

  @functools.cached_property
  def _starts(self):
    return np.cumsum([0, *(len(offsets) - 1 for _, offsets in self.parts)])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> bytes:
    part = int(np.searchsorted(self._starts, index, side="right")) - 1
    path, offsets = self.parts[part]
    row = index - int(self._starts[part])
    start, size = int(offsets[row]), int(offsets[row + 1] - offsets[row])
    try:
      with open(path, "rb", buffering=0) as file:
        record = os.pread(file.fileno(), size, start)
    except OSError as e:
      raise UserError(f"{path}: {e.strerror}") from e
    if len(record) < size:
      raise UserError(f"{path}: truncated in the record at byte {start}")
    return record[_HEADER.itemsize : -4]

  def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
    return [self[index] for index in indices]


def open_records(instructions: Sequence[Any]) -> Records:
  """Opens the records that TFDS's file instructions name, in their order.

  Raises:
    UserError: a file cannot be read, is damaged, or has not the number of
      records that TFDS expects.
  """
  files = {x.filename: x.examples_in_shard for x in instructions}
  offsets = _offsets(files)
  return Records(
    [
      (x.filename, offsets[x.filename][x.skip : x.skip + x.take + 1])
      for x in instructions
    ]
  )


def _offsets(files: Mapping[str, int]) -> dict[str, np.ndarray]:
  """Path -> offsets of all its records; see `Records`.

  `files` maps paths to their numbers of records.
  """
  key = []
  for path, count in files.items():
    if "://" in path:
      raise UserError(
        f"{path}: TFRecord is not read from buckets; copy the data set to a"
        " disk, or prepare it as ArrayRecord"
      )
    try:
      stat = os.stat(path)
    except OSError as e:
      raise UserError(f"{path}: {e.strerror}; {_AGAIN}") from e
    key.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns, count))

  @functools.cache  # It may be found although it cannot be kept.
  def find():
    with futures.ThreadPoolExecutor(16) as pool:
      found = pool.map(_scan, files, files.values())
      bar = dict(desc="finding records", unit="file", disable=None)
      return np.concatenate([*tqdm.tqdm(found, total=len(files), **bar)])

  def make(folder):
    path = Path(folder) / "offsets.npy"
    np.save(path, find())
    return path

  offsets = None
  if (cache := build.cache_folder()) is not None:
    name = f"tfrecord-{build.digest(repr(key).encode())}"
    with contextlib.suppress(OSError):
      offsets = np.load(build.cached(cache, name, make))
  offsets = find() if offsets is None else offsets
  ends = np.cumsum([count + 1 for count in files.values()])
  return dict(zip(files, np.split(offsets, ends[:-1])))


def _scan(path, count):
  """Offsets of the `count` records of a file, and of its end: [count + 1]."""

  def fail(text):
    raise UserError(f"{path}: {text}; {_AGAIN}")

  headers, offsets = [], [0]
  try:
    with open(path, "rb", buffering=0) as file:
      number, size = file.fileno(), os.fstat(file.fileno()).st_size
      while len(headers) < count and offsets[-1] + _FRAME <= size:
        header = os.pread(number, _HEADER.itemsize, offsets[-1])
        if len(header) < _HEADER.itemsize:  # It was cut short meanwhile.
          break
        headers.append(header)
        length = int.from_bytes(header[:8], "little")
        offsets.append(offsets[-1] + _FRAME + length)
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  if headers and headers[0].startswith(b"\x1f\x8b\x08"):
    raise UserError(
      f"{path}: is compressed with gzip, so its records have no known place;"
      " write it again without compression"
    )
  read = np.frombuffer(b"".join(headers), _HEADER)
  wrong = np.flatnonzero(_masked_crc(read["length"]) != read["checksum"])
  if wrong.size:
    fail(f"damaged at byte {offsets[wrong[0]]}, in a record's header")
  if offsets[-1] > size:
    fail(f"truncated in the record at byte {offsets[-2]}")
  if len(headers) < count or offsets[-1] < size:
    fail(
      f"has {len(headers)} whole records in {offsets[-1]} of {size} bytes;"
      f" expected {count} in all of them"
    )
  return np.array(offsets, np.int64)


def _masked_crc(lengths):
  """The checksums of lengths, uint64 [N]: CRC-32C, masked as TFRecord's is."""
  crc = np.full(len(lengths), 0xFFFFFFFF, np.uint32)
  for byte in np.ascontiguousarray(lengths).view(np.uint8).reshape(-1, 8).T:
    crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  crc = ~crc
  return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)


_CRC = np.arange(256, dtype=np.uint32)  # CRC-32C of each byte.
for _ in range(8):
  _CRC = np.where(_CRC & 1, _CRC >> 1 ^ np.uint32(0x82F63B78), _CRC >> 1)
