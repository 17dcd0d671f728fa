"""Reads PyTorch's checkpoint files without executing what they hold.

A PyTorch checkpoint is a pickle, and a pickle is a program: Python's own reader
would run it. The reader here imports nothing that a file names. It makes
tensors, arrays and plain data by its own functions, and puts an inert stand-in
for every other object. It does not need torch.
"""

import functools
import io
import math
import os
import pickle
import re
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from convmixer_jax.errors import UserError

# PyTorch's storage classes -> dtypes of numpy.
_STORAGES = {
  "FloatStorage": np.dtype("<f4"),
  "DoubleStorage": np.dtype("<f8"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
  "ComplexFloatStorage": np.dtype("<c8"),
  "ComplexDoubleStorage": np.dtype("<c16"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# The accepted operations of a pickle; `_Unpickler` has some more. Not among
# them are those that reserve more memory than the file is large.
_OPCODES = [
  "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE",
  "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING",
  "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE",
  "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
  "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
  "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL",
  "STACK_GLOBAL", "BINPERSID", "REDUCE",
]  # fmt: skip


def load_zip(path: str) -> Any:
  """Reads a file in the zip format of torch 1.6 and later.

  Returns:
    What was saved, with numpy arrays for tensors. They are read-only. Objects
    that are neither tensors nor plain data are `Inert`.

  Raises:
    OSError: the file cannot be read.
    Exception: of any kind, if the file is damaged.
  """
  with zipfile.ZipFile(path) as archive:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      raise ValueError("compressed, unlike PyTorch's files")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
      raise ValueError("entries larger than the file")
    names = archive.namelist()
    found = [name for name in names if name.endswith("/data.pkl")]
    if len(found) != 1:
      raise ValueError(f"{len(found)} entries named data.pkl")
    (pickled,) = found
    root = pickled.removesuffix("data.pkl")
    if root + "byteorder" in names:
      order = archive.read(root + "byteorder")
      if order != b"little":
        raise ValueError(f"{order.decode()}-endian, not little-endian")

    @functools.cache
    def storage(dtype, key, size):
      array = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
      if len(array) != size:
        raise ValueError(f"{len(array)} numbers instead of {size}")
      return array

    return _Unpickler(io.BytesIO(archive.read(pickled)), path, storage).load()


def load_legacy(path: str) -> Any:
  """Reads a file in the format before torch 1.6; see `load_zip`."""
  storages, limit = {}, os.path.getsize(path)

  def storage(dtype, key, size):
    if size * dtype.itemsize > limit:
      raise ValueError("a storage larger than the file")
    return storages.setdefault(key, np.zeros(size, dtype))

  with open(path, "rb") as file:
    unpickle = lambda: _Unpickler(file, path, storage).load()
    found = unpickle()
    if isinstance(found, Inert):  # A whole object, and no checkpoint.
      return found
    if found != _LEGACY_MAGIC:
      raise UserError(f"{path}: a pickle, but not a PyTorch checkpoint")
    unpickle()  # The version of the format.
    unpickle()  # The byte order, always little-endian, and sizes of integers.
    found = unpickle()
    for key in unpickle():
      if not isinstance(key, str):
        raise ValueError("a storage without a name")
      array = storages[key]
      size = int.from_bytes(file.read(8), "little")
      if size != len(array):
        raise ValueError(f"{size} numbers instead of {len(array)}")
      data = np.frombuffer(file.read(array.nbytes), array.dtype)
      array[:] = data.reshape(size)
  return found


class Inert:
  """Stands for an object, its class or a function; keeps only the name.

  Calling it runs nothing.
  """

  def __init__(self, name: str):
    self.name = name

  def __call__(self, *args) -> "Inert":
    del args
    return self

  append = extend = __call__


def _refuse(unpickler):
  raise ValueError("an operation that PyTorch does not write")


class _Unpickler(pickle._Unpickler):
  """Reads tensors, arrays and plain data; see `Inert` for everything else.

  Derived from pickle's implementation in Python, not the one in C. Operations
  can be removed from it, and its memo is a dict: that of C reserves 64 GiB if
  the file says so in a four-byte index.
  """

  dispatch = dict.fromkeys(range(256), _refuse) | {
    op: pickle._Unpickler.dispatch[op]
    for op in (getattr(pickle, name)[0] for name in _OPCODES)
  }

  def __init__(self, file, path, storage):
    super().__init__(file)
    self._path, self._storage, self._encoded = path, storage, {}

  def find_class(self, module, name):
    if module in ("torch", "torch.storage") and name in _STORAGES:
      return name  # A string: a pickle can neither call nor change it.
    if (module, name) == ("_codecs", "encode"):
      return self._encode
    return _CLASSES.get((module, name)) or Inert(f"{module}.{name}")

  def _encode(self, text, *_):
    """Bytes, as the older protocols write them; once for each text."""
    if type(text) is not str:
      raise ValueError("bytes of an unusual kind")
    if text not in self._encoded:
      self._encoded[text] = text.encode("latin1")
    return self._encoded[text]

  def _set_items(self):
    """Sets items of dicts only, and only those whose keys hash quickly."""
    items = self.pop_mark()
    plain = (str, int, float, bytes, type(None))
    if not isinstance(target := self.stack[-1], (dict, Inert)):
      raise ValueError("items of what is no dict")
    if isinstance(target, dict):
      pairs = zip(items[::2], items[1::2])
      target.update((k, v) for k, v in pairs if isinstance(k, plain))

  def _set_item(self):
    items = self.stack[-2:]
    del self.stack[-2:]
    self.load_mark()
    self.stack += items
    self._set_items()

  def _set_state(self):
    """Fills an array; ignores other states, which could change a class."""
    state = self.stack.pop()
    match self.stack[-1], state:
      case np.dtype(), (_, ">", *_):
        raise ValueError("big-endian, not little-endian")
      case np.ndarray() as array, (_, shape, np.dtype() as dtype, order, data):
        array.__setstate__((1, shape, dtype, bool(order), data))
      case np.ndarray(), _:
        self.stack[-1] = Inert("numpy.ndarray")

  def _new(self):
    """Makes an object as REDUCE does, without its named arguments."""
    self.stack.pop()
    self.load_reduce()

  def _set(self):
    """Keeps nothing of a set, which would hash any object."""
    self.pop_mark()
    self.append(Inert("set"))

  dispatch[pickle.SETITEMS[0]] = _set_items
  dispatch[pickle.SETITEM[0]] = _set_item
  dispatch[pickle.NEWOBJ[0]] = pickle._Unpickler.load_reduce
  dispatch[pickle.NEWOBJ_EX[0]] = _new
  dispatch[pickle.FROZENSET[0]] = _set
  dispatch[pickle.EMPTY_SET[0]] = lambda self: self.append(Inert("set"))
  dispatch[pickle.ADDITEMS[0]] = lambda self: self.pop_mark()
  dispatch[pickle.BUILD[0]] = _set_state

  def persistent_load(self, pid):
    kind, name, key, _, size, *_ = pid
    if isinstance(name, Inert):  # Of numbers that numpy does not have.
      return name
    if not all(isinstance(x, str) for x in (kind, name, key)) or (
      not isinstance(size, int)
    ):
      raise ValueError("not one of PyTorch's storages")
    if kind != "storage" or name not in _STORAGES:
      raise UserError(f"{self._path}: holds a {kind} of {name}")
    return self._storage(_STORAGES[name], key, size)


def _rebuild_tensor(storage, offset, shape, strides, *_):
  """Returns a view of `storage`; checks that it lies inside.

  A view with strides of zero could be larger than `storage`. It is refused.
  """
  if isinstance(storage, Inert):
    return storage
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or not all(
    isinstance(n, int) and 0 <= n < 2**48 for n in numbers
  ):
    raise ValueError("a tensor of an impossible shape")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if 0 not in shape and max(last + 1, math.prod(shape)) > len(storage):
    raise ValueError("a tensor larger than its data")
  return np.lib.stride_tricks.as_strided(
    storage[offset:], shape, [s * storage.itemsize for s in strides]
  )


def _dtype(code, *_):
  """A dtype of plain numbers; a stand-in for those that hold objects."""
  plain = type(code) is str and re.fullmatch("[biufc][0-9]{1,2}", code)
  return np.dtype(code) if plain else Inert("numpy.dtype")


# What takes the place of each class or function. All others are `Inert`.
_CLASSES = {
  ("collections", "OrderedDict"): lambda *_: {},
  ("collections", "defaultdict"): lambda *_: {},
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
  ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
  ("numpy", "dtype"): _dtype,
  ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.zeros(0),
  ("numpy._core.multiarray", "_reconstruct"): lambda *_: np.zeros(0),
}
