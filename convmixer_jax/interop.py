"""Weights of PyTorch's ConvMixers: their files, and their names to ours."""

from collections.abc import Mapping
import functools
import io
import logging
import math
import os
import pickle
import re
from typing import Any
import zipfile

from flax import traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from convmixer_jax import models
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

# A row of a family's TORCH_NAMES is (timm's module, ours, kind of layer). The
# kind says what the leaves are called, and how tensors are turned: from
# PyTorch's [out, in, ...] to ours, and back.
_NORM_LEAVES = {
  "weight": ("params", "scale"),
  "bias": ("params", "bias"),
  "running_mean": ("batch_stats", "mean"),
  "running_var": ("batch_stats", "var"),
}
_LAYER_LEAVES = {"weight": ("params", "kernel"), "bias": ("params", "bias")}
_KERNELS = {
  "conv": (
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
  ),
  "pointwise": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
  "linear": (lambda x: x.T, lambda x: x.T),
}


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a PyTorch model's state_dict to our variables.

  Args:
    state_dict: name -> array (or CPU tensor), of timm's model of any family, or
      of the nn.Sequential in the paper and in the authors' CIFAR-10 script.

  Returns:
    {'params', 'batch_stats'} of numpy arrays, for an unrolled model.

  Raises:
    UserError: a name that the family lacks, or a tensor that does not fit it.
  """
  names = [k for k in state_dict if not k.endswith(".num_batches_tracked")]
  # The family is the one that knows most of the names.
  candidates = [
    (family, {name: _to_ours(family, name) for name in names})
    for family in models.FAMILIES
  ]
  family, found = max(
    candidates, key=lambda c: sum(path is not None for path in c[1].values())
  )
  flat = {}
  for name, match in found.items():
    if match is None:
      model = family.MODEL.__name__
      raise UserError(f"{name}: not a tensor of timm's {model}")
    path, kind = match
    value = np.asarray(state_dict[name])
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f"{name}: of {value.dtype}, not floating-point")
    if path[-1] == "kernel":
      if kind == "pointwise" and value.shape[2:] != (1, 1):
        raise UserError(f"{name}: {value.shape} is no 1 x 1 convolution's")
      try:
        value = _KERNELS[kind][0](value)
      except (ValueError, IndexError) as e:
        raise UserError(f"{name}: {value.shape} is no {kind} kernel's") from e
    flat[path] = value
  return traverse_util.unflatten_dict(flat)


def _to_ours(family, name):
  """Our path of a timm tensor, and the kind of its layer; None if unknown.

  'blocks.2.1.weight' -> ('params', 'block_2', 'pointwise', 'kernel'),
  'pointwise'.
  """
  module, _, leaf = name.rpartition(".")
  module = family.timm_module(module)
  for theirs, ours, kind in family.TORCH_NAMES:
    path = _renamed(module, theirs, ours)
    leaves = _NORM_LEAVES if kind == "norm" else _LAYER_LEAVES
    if path and leaf in leaves:
      collection, our_leaf = leaves[leaf]
      return (collection, *path.split("/"), our_leaf), kind
  return None


def _renamed(name, pattern, target):
  """'a.2.b', 'a.{i}.b', 'x_{i}' -> 'x_2'; None if the pattern does not fit."""
  regex = re.escape(pattern).replace(r"\{i\}", r"(\d+)")
  match = re.fullmatch(regex, name)
  return match and target.replace("{i}", *(match.groups() or ("",)))


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Converts our variables, scanned or not, to timm's state_dict.

  Raises:
    UserError: they are of no family.
  """
  variables = models.unstack_blocks(variables)
  known = models.infer(variables["params"])
  if known is None:
    raise UserError("not the variables of a known model")
  rows = known[0].TORCH_NAMES
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    collection, *modules, leaf = path
    found = [
      (module, kind)
      for theirs, ours, kind in rows
      if (module := _renamed("/".join(modules), ours, theirs))
    ]
    if not found:
      raise UserError(f"{'/'.join(path)}: timm's model has no such tensor")
    module, kind = found[0]
    leaves = _NORM_LEAVES if kind == "norm" else _LAYER_LEAVES
    names = {ours: name for name, ours in leaves.items()}
    value = np.asarray(value)
    if leaf == "kernel":
      value = _KERNELS[kind][1](value)
    state_dict[f"{module}.{names[collection, leaf]}"] = value
  return state_dict


# --- Files.

# Storage classes of PyTorch -> numpy's dtypes.
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
}
# What training checkpoints hold beside tensors, and nobody needs.
_INERT = {
  ("argparse", "Namespace"),
  ("numpy", "dtype"),
  ("numpy.core.multiarray", "scalar"),
  ("numpy._core.multiarray", "scalar"),
  ("_codecs", "encode"),
  ("torch", "device"),
  ("torch", "Size"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a file, without running anything that it may carry.

  Args:
    path: a .safetensors file, a PyTorch checkpoint (.pth, .pth.tar, of today's
      zip format or the one before torch 1.6), or hf-hub:OWNER/NAME for the
      model.safetensors of a model on the Hugging Face Hub.

  Returns:
    Name -> array. Of a training checkpoint: the moving averages if it has them,
    or else the weights, without the prefix `module.`.

  Raises:
    UserError: no such file, or not one of these.
  """
  path = os.fspath(path)
  if path.startswith("hf-hub:"):
    path = _download(path)
  try:
    if os.path.exists(path) and not os.path.isfile(path):  # A FIFO would wait.
      raise UserError(f"{path}: not a file")
    with open(path, "rb") as file:
      start = file.read(9)
    if start[:4] == b"PK\x03\x04":
      found = _load_zip(path)
    elif start[:1] == b"\x80":
      found = _load_legacy(path)
    elif start[8:] == b"{":
      found = safetensors.numpy.load_file(path)
    else:
      raise UserError(f"{path}: neither a PyTorch checkpoint nor safetensors")
  except OSError as e:
    raise UserError(f"{path}: {e.strerror or e}") from e
  except UserError:
    raise
  except Exception as e:  # A damaged file may lead to anything.
    reason = first_line(e)
    raise UserError(f"{path}: damaged or cut short: {reason}") from e
  for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
    if isinstance(found, dict) and isinstance(found.get(name), dict):
      found = found[name]
      break
  if not isinstance(found, dict):
    raise UserError(f"{path}: holds a {type(found).__name__}, not tensors")
  for name, value in found.items():
    if not isinstance(name, str):
      raise UserError(f"{path}: {name!r} is no name of a tensor")
    if not isinstance(value, np.ndarray):
      raise UserError(f"{path}: {name} is a {type(value).__name__}, no tensor")
  return {name.removeprefix("module."): x for name, x in found.items()}


def _download(path):
  import huggingface_hub

  logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
  repository = path.removeprefix("hf-hub:")
  try:
    return huggingface_hub.hf_hub_download(repository, "model.safetensors")
  except Exception as e:  # No network, no such model, no permission.
    reason = first_line(e)
    raise UserError(f"{path}: cannot be downloaded: {reason}") from e


class _Inert:
  """Stands for an object that is not a tensor; remembers nothing."""

  def __init__(self, *args):
    del args


def _refuse(unpickler):
  raise ValueError("what PyTorch does not write")


# Not among them: sets, which would hash whatever they hold, and what reserves
# memory for more than the file has.
_OPCODES = [
  "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE",
  "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING",
  "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE",
  "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
  "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
  "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL",
  "STACK_GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD",
]  # fmt: skip


class _Unpickler(pickle._Unpickler):
  """Admits tensors; everything else that is not plain data is refused.

  Python's own, not C's: its opcodes can be taken away, and its memo is a dict,
  where C's reserves 64 GiB for an index of four bytes.
  """

  dispatch = dict.fromkeys(range(256), _refuse) | {
    op: pickle._Unpickler.dispatch[op]
    for op in (getattr(pickle, name)[0] for name in _OPCODES)
  }

  def __init__(self, file, name, storage):
    super().__init__(file)
    self._name, self._storage = name, storage

  def find_class(self, module, name):
    if (module, name) == ("collections", "OrderedDict"):
      return lambda: {}
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, *_: data
    if module in ("torch", "torch.storage") and name in _STORAGES:
      return name  # A string: nothing that a pickle can call or change.
    if (module, name) in _INERT:
      return _Inert
    raise UserError(
      f"{self._name}: holds {module}.{name}; only tensors are read"
    )

  def _set_items(self):
    """To a dict alone, and of keys that are quickly hashed."""
    keys, values = self.stack[::2], self.stack[1::2]
    target = self.metastack[-1][-1]
    plain = (str, int, float, bytes, type(None))
    if type(target) is not dict or not all(isinstance(k, plain) for k in keys):
      raise ValueError("a dict with keys that are not plain")
    self.pop_mark()
    target.update(zip(keys, values))

  def _set_item(self):
    items = self.stack[-2:]
    del self.stack[-2:]
    self.load_mark()
    self.stack += items
    self._set_items()

  def _drop_state(self):
    """Of what is no tensor; a class or a function could be changed by it."""
    self.stack.pop()

  dispatch[pickle.SETITEMS[0]] = _set_items
  dispatch[pickle.SETITEM[0]] = _set_item
  dispatch[pickle.BUILD[0]] = _drop_state

  def persistent_load(self, pid):
    kind, name, key, _, size, *_ = pid
    if not all(isinstance(x, str) for x in (kind, name, key)) or (
      not isinstance(size, int)
    ):
      raise ValueError("a storage that is none of PyTorch's")
    if kind != "storage" or name not in _STORAGES:
      raise UserError(f"{self._name}: holds a {kind} of {name}")
    return self._storage(_STORAGES[name], key, size)


def _rebuild_tensor(storage, offset, shape, strides, *_):
  """A view into `storage`, checked to lie inside and to be no larger."""
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or not all(
    isinstance(n, int) and 0 <= n < 2**48 for n in numbers
  ):
    raise ValueError("a tensor of a size that cannot be")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if 0 not in shape and max(last + 1, math.prod(shape)) > len(storage):
    raise ValueError("a tensor beyond its data")
  return np.lib.stride_tricks.as_strided(
    storage[offset:], shape, [s * storage.itemsize for s in strides]
  )


def _load_zip(path):
  with zipfile.ZipFile(path) as archive:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      raise ValueError("compressed, which PyTorch's files are not")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
      raise ValueError("entries that are larger than the file")
    names = archive.namelist()
    found = [name for name in names if name.endswith("/data.pkl")]
    if len(found) != 1:
      raise ValueError(f"{len(found)} entries named data.pkl")
    (pickled,) = found
    root = pickled.removesuffix("data.pkl")
    if root + "byteorder" in names:
      order = archive.read(root + "byteorder")
      if order != b"little":
        raise ValueError(f"of {order.decode()}-endian numbers")

    def storage(dtype, key, size):
      array = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
      if len(array) != size:
        raise ValueError(f"{len(array)} numbers where {size} should be")
      return array

    storage = functools.cache(storage)
    return _Unpickler(io.BytesIO(archive.read(pickled)), path, storage).load()


def _load_legacy(path):
  storages, limit = {}, os.path.getsize(path)

  def storage(dtype, key, size):
    if size * dtype.itemsize > limit:
      raise ValueError("more numbers than the file has room for")
    return storages.setdefault(key, np.zeros(size, dtype))

  with open(path, "rb") as file:
    unpickle = lambda: _Unpickler(file, path, storage).load()
    if unpickle() != _LEGACY_MAGIC:
      raise UserError(f"{path}: a pickle, but not PyTorch's")
    unpickle()  # Version of the format.
    unpickle()  # Byte order and sizes, of little-endian machines.
    found = unpickle()
    for key in unpickle():
      if not isinstance(key, str):
        raise ValueError("a storage without a name")
      array = storages[key]
      size = int.from_bytes(file.read(8), "little")
      if size != len(array):
        raise ValueError(f"{size} numbers where {len(array)} should be")
      data = np.frombuffer(file.read(array.nbytes), array.dtype)
      array[:] = data.reshape(size)
  return found
