"""Abuse of what reads weights: PyTorch's two formats, and safetensors."""

import contextlib
import functools
import io
import json
import os
import pickle
import struct
import types
import warnings
import zipfile

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import weights
from tests import common
from tests.fuzzing import abuse
from tests.fuzzing import broken
from tests.fuzzing import examples
from tests.fuzzing import make

pytestmark = pytest.mark.usefixtures("little_memory")


@functools.cache
def state():
  """The tensors of a tiny model, by timm's names."""
  shapes = models.variable_shapes(common.tiny_model(depth=1, dim=4))
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), shapes
  )
  return {
    name: np.ascontiguousarray(value)
    for name, value in interop.to_torch(values).items()
  }


# --- Pickles of any program, by Python's own pickler, whose parts can be
# replaced.


class Storage:
  """What the pickle of a PyTorch file names by a persistent id."""

  def __init__(self, *pid):
    self.pid = pid


class Called:
  """Pickles as a call, then states."""

  def __init__(self, *reduced):
    self.reduced = reduced


class Name:
  """Pickles as the global MODULE.NAME, which need not exist."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Pickler(pickle._Pickler):
  dispatch = pickle._Pickler.dispatch.copy()

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Storage) else None

  def save_name(self, obj):
    self.write(f"c{obj.module}\n{obj.name}\n".encode(errors="replace"))

  def save_called(self, obj):
    function, arguments, *more = obj.reduced
    self.save(function)
    self.save(arguments)
    self.write(pickle.REDUCE)
    for part in more:
      self.save(part)
      self.write(pickle.BUILD)

  def save_raw(self, obj):
    self.write(obj.code)

  dispatch |= {
    Name: save_name,
    Called: save_called,
    types.SimpleNamespace: save_raw,
  }


def pickled(obj, protocol=2):
  file = io.BytesIO()
  Pickler(file, protocol).dump(obj)
  return file.getvalue()


def raw(code):
  """Opcodes, put in as they are."""
  return types.SimpleNamespace(code=code)


FLOATS = Name("torch", "FloatStorage")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ODD = [
  0, -1, 1, 8, 2**31, 2**40, 2**62, 2**63, 2**64, 10**5000, None, True, 1.5,
  float("nan"), "x", "", b"x", (), (1,), [1], {}, "a\nb",
]  # fmt: skip


def tensor(key, value, /, **changed):
  """A tensor's pickle: its storage, and how it lies in it."""
  fields = {
    "kind": "storage", "type": FLOATS, "key": key, "where": "cpu",
    "numbers": value.size, "offset": 0, "shape": value.shape,
    "strides": tuple(s // value.itemsize for s in value.strides),
    "rebuild": REBUILD,
  } | changed  # fmt: skip
  pid = [fields[k] for k in ("kind", "type", "key", "where", "numbers")]
  return Called(
    fields["rebuild"],
    (Storage(*pid), fields["offset"], fields["shape"], fields["strides"],
     False, Called(Name("collections", "OrderedDict"), ())),
  )  # fmt: skip


SHAPES = [
  (), (0,), (4,), (1, 1), (4, 4), (0, 0, 0, 0), (4, 0, 2, 2), (4,) * 5,
  (2**40, 0, 1, 1), (0, 2**62, 7, 7), (10, 4, 1), (1, 3, 2, 2), (-1, -4),
  (None, 4), (2**63, 1),
]  # fmt: skip
# What is admitted, reached for more; and a few of all others.
GLOBALS = [
  Name(*text.split(" ", 1))
  for text in """
os system|posix system|builtins eval|builtins getattr|__builtin__ eval
collections OrderedDict.__class__|collections OrderedDict.fromkeys
collections defaultdict|collections _sys.modules|torch load|torch jit.load
torch._utils os.system|torch._utils _rebuild_tensor_v2.__globals__
torch._utils _rebuild_parameter|torch._utils _rebuild_qtensor|torch Size
torch DoubleStorage|torch ComplexFloatStorage|torch.storage UntypedStorage
torch.storage _load_from_bytes|torch.storage FloatStorage.__init__
torch FloatStorage.os|numpy dtype|numpy dtype.__class__|numpy fromfile
numpy.core.multiarray _reconstruct|numpy.core.multiarray scalar.__class__
argparse Namespace|argparse Namespace.__init__.__globals__|argparse _sys.exit
convmixer_jax.interop load|convmixer_jax.interop _Inert|antigravity x
convmixer_jax.interop os.system| |a. b|.. x|x\u00e9 y|_codecs decode
""".replace("\n", "|")
  .strip("|")
  .split("|")
]


# 2**60 of a letter, by doubling a tuple: what walks or hashes it never ends.
BOMB = b"X\x01\x00\x00\x00x" + b"2\x86" * 60
PID = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
U8 = struct.Struct("<Q").pack
CODES = [
  b"Nr\x00\x00\x00\x08",  # 2 GiB of it, which the limit of memory admits.
  b"r\xff\xff\xff\xffN",  # LONG_BINPUT: a memo of 4 G entries, in C.
  b"N\x94" * 50, b"\x8d" + U8(2**60), b"\x8e" + U8(2**35), b"\x96" + U8(2**35),
  b"\x95" + U8(2**60), b"\x95" + U8(2**35), b"\x95" + U8(0),
  b"X\xff\xff\xff\xff", b"T\xff\xff\xff\x7f", b"B\xff\xff\xff\xff",
  b"\x8b\xff\xff\xff\x7f", b"\x8a\xff", b"Q", b"PFloatStorage\n", b"\x82\x01",
  b"N\x98", b"j\xff\xff\xff\xff", b"h\x09", b"g99999999999999999999\n",
  b"I" + b"9" * 5000 + b"\n", b"V\\ud800\n", b"(" * 3000, b"]" * 3000,
  b"(l" * 500, b"\x80\xff", b".", b"0", b"1", b"2" * 3000, b"(ios\nsystem\n",
  b"(cos\nsystem\no", b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93",
  b"\x93", b"R", b"\x81", b"b", b"(}d", b"\x8f(]\x90", b"(K\x01\x91", b"}(]Nu",
  b"}]Ns", b"NNs", b"](e", b"Na", b"}(Ku", b"\xff", b"\x00", b"", b"c\n\n",
  b"cos\n", b"ccollections\nOrderedDict\n)\x81", BOMB, b"](" + BOMB * 2 + b"e",
  b"}" + BOMB + b"K\x01s", BOMB + b"0N", b"}(" + BOMB + b"K\x01u",
  b"(" + BOMB + b"K\x01d", b"\x8f(" + BOMB + b"\x90", b"(" + BOMB + b"\x91",
  b"ccollections\nOrderedDict\n]](" + BOMB + b"Ke\x85R",
  PID + BOMB + b"X\x03\x00\x00\x00cpuK\x01tQ", b"(" + BOMB + b"NNNNtQ",
  PID + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + BOMB + b"tQ",
  b"(X\x07\x00\x00\x00storage" + BOMB + b"NNNtQ", BOMB + b"}" + BOMB + b"Ns0",
  b"N" + b"\x85" * 10**5, b"}N" + b"\x85" * 10**5 + b"Ns",
]  # fmt: skip

OBJECTS = [
  *ODD,
  *GLOBALS,
  *(
    Called(name, arguments)
    for arguments in (("touch canary",), ("open('canary', 'w')",), (10**9,))
    for name in GLOBALS
  ),
  *(  # A state: attributes of what no file should change.
    Called(Name(*name), (), state)
    for name in (("collections", "OrderedDict"), ("argparse", "Namespace"))
    for state in ({"items": 3}, {"__class__": 1}, (None, {"items": 3}), {1: 2})
  ),
  {b"x": 1}, {(1, 2): 1}, {"": {}}, {1, 2}, frozenset([1]), bytearray(b"x"),
  Storage(), Storage(1), Storage("storage", FLOATS),
  Storage("storage", FLOATS, "../../../etc/passwd", "cpu", 1),
]  # fmt: skip
NAMES = ["", "a\nb", "9" * 5000 + ".1.weight", *str.split("""
  head.weight stem.0.weight blocks.0.0.fn.0.weight blocks.0.3.running_var head
  stem.2.num_batches_tracked weight 7.weight blocks.999999999999.1.weight ..
  blocks.².1.weight 0.weight -1.weight blocks.-1.1.bias ٣.1.weight state_dict
  module.module.head.bias blocks.00.1.bias blocks.1.1.weight blocks.0.0.fn.0
""")]  # fmt: skip


def whole_pickle():
  """(what is pickled, the storages)."""
  tensors = {k: tensor(str(i), x) for i, (k, x) in enumerate(state().items())}
  return tensors, {str(i): x.tobytes() for i, x in enumerate(state().values())}


def odd_pickles():
  """Yields what is pickled: a state dict with one thing that is odd."""
  tensors, _ = whole_pickle()
  names = sorted(tensors)

  def other(name, **changed):
    key = str([*tensors].index(name))
    return tensors | {name: tensor(key, state()[name], **changed)}

  fields = ("numbers", "offset", "where", "key", "kind", "shape", "strides",
            "type", "rebuild")  # fmt: skip
  for i, odd in enumerate(ODD):
    for field in fields:
      yield other(names[i % len(names)], **{field: odd})
  for i, shape in enumerate(SHAPES):
    for stride in (0, 1):
      strides = (stride,) * len(shape)
      yield other(names[i % len(names)], shape=shape, strides=strides)
  for i, odd in enumerate(GLOBALS):
    yield other(names[i % len(names)], **{fields[-1 - i % 2]: odd})
  for i, odd in enumerate(OBJECTS):
    yield [
      tensors | {names[i % len(names)]: odd},
      {"state_dict": tensors, "args": odd},
      {"epoch": odd, "model": tensors},
    ][i % 3]
  for i, odd in enumerate([*NAMES, *(x for x in ODD if type(x) is not list)]):
    renamed = dict(tensors)
    moved = renamed.pop(names[i % len(names)])
    with contextlib.suppress(TypeError):  # No key of a dict.
      yield renamed | {odd: moved}


# --- Files.


def zipped(code, data, extra=(), method=zipfile.ZIP_STORED):
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
    warnings.simplefilter("ignore")  # Of names that are there twice.
    archive.writestr("a/data.pkl", code)
    for name, value in (*extra, *((f"a/data/{k}", v) for k, v in data.items())):
      archive.writestr(name, value)
  return file.getvalue()


def legacy(code, data):
  """The format before torch 1.6: five pickles, then the storages."""
  parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
  head = b"".join(pickle.dumps(part, 2) for part in parts)
  keys = pickle.dumps(sorted(data), 2)
  tail = b"".join(U8(len(data[k]) // 4) + data[k] for k in sorted(data))
  return head + code + keys + tail


ENTRIES = [
  (("a/byteorder", b"big"),), (("a/byteorder", b"\xff\xfe"),),
  (("../../canary", b"x"),), (("/canary", b"x"),), (("b/data.pkl", b"N."),),
  (("a/data.pkl", b"N."),), (("a/byteorder", b"little"),), (("\n", b""),),
]  # fmt: skip


@functools.cache
def whole_files():
  tensors = {name: torch.from_numpy(x) for name, x in state().items()}
  files = [safetensors.numpy.save(state())]
  for way in (True, False):
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=way)
    files.append(file.getvalue())
  return files


def safe(header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return U8(len(text) if length is None else length) + text + data


JSON_ODD = [
  0, -1, 2**31, 2**63, 2**64, 10**30, None, True, 1.5, "x", [], {}, [-1],
  [2**40, 2**40], [2**63, 0], [0, 10**18], [8, 4], "F16", "BF16", "F8_E4M3",
  "F4", "U64", "C64", "F33",
]  # fmt: skip


def odd_files():
  """Yields files that no one writes."""
  tensors, data = whole_pickle()
  for i, odd in enumerate(odd_pickles()):
    with contextlib.suppress(RecursionError, UnicodeEncodeError):
      code = pickled(odd, 2 + i % 3)
      yield legacy(code, data) if i % 4 == 0 else zipped(code, data)
  code = pickled(tensors)
  for entries in ENTRIES:
    yield zipped(code, data, entries)
  yield zipped(code, data, method=zipfile.ZIP_DEFLATED)
  for length in (0, 4, 8, 1000):
    yield zipped(code, data | {"0": bytes(length)})
    yield legacy(code, data | {"0": bytes(length)})
  whole = whole_files()[0]
  size = int.from_bytes(whole[:8], "little")
  header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
  first, fields = next(iter(header)), ("dtype", "shape", "data_offsets")
  for i, odd in enumerate(JSON_ODD):
    changed = header[first] | {fields[i % 3]: odd}
    yield safe(header | {first: changed}, body)
    yield safe(header | {("__metadata__", "x", "")[i % 3]: odd}, body)
  for length in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
    yield safe(header, body, length)
  yield from (
    b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02N.", b"\x80",
    safe(b"{"), safe(b"{}"), safe(b"{" + b"[" * 10**5), b"\x89HDF\r\n\x1a\n",
    b"\x80\x02\x8a\x0alF\x9c\xa0o\x86j\xd1P\x19.", b"x" * 99,
    b"\x80\x04\x95" + U8(2**60), b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x02}" + BOMB + b"Ns.",
  )  # fmt: skip


@pytest.fixture
def load(folder, monkeypatch):
  """Writes a file, and makes a model of it: bytes -> variables, or None."""
  monkeypatch.chdir(folder)
  path = folder / "weights"

  def run():
    model, variables, _ = weights.load_model(str(path))
    side = 3 * model.patch_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    jax.eval_shape(
      functools.partial(model.apply, train=False), variables, images
    )
    return variables

  def load(data):
    path.write_bytes(data)
    found = abuse(run, folder=path, names=[str(path)])
    assert os.listdir(folder) == ["weights"]
    leaves = jax.tree.leaves(found)
    assert all(isinstance(x, np.ndarray) for x in leaves)
    assert sum(x.nbytes for x in leaves) <= 2 * len(data)
    return found

  return load


def test_broken_files(load):
  @examples(60)
  @hypothesis.given(st.one_of(broken(whole_files()), st.binary(max_size=99)))
  def run(data):
    load(data)

  run()


def test_every_odd_file(load):
  loaded = [load(data) is not None for data in odd_files()]
  assert 5 < sum(loaded) < len(loaded) / 2
  whole = whole_files()[0]  # The process is as it was.
  assert jax.tree.all(jax.tree.map(np.array_equal, load(whole), load(whole)))


def test_every_odd_opcode(folder):
  """Beside a model's tensors, in both of PyTorch's formats, and alone."""
  path = folder / "weights"
  tensors, data = whole_pickle()
  for code in CODES:
    inside = pickled({"state_dict": tensors, "args": raw(code)})
    for file in (
      zipped(inside, data),
      legacy(inside, data),
      b"\x80\x02" + code + b".",
    ):
      path.write_bytes(file)
      abuse(interop.load, str(path), folder=path, names=[str(path)])


@pytest.mark.parametrize("kind", ["absent", "loop", "fifo", "device", "empty"])
def test_what_is_no_file_of_weights(kind, folder):
  path = folder / "weights"
  make(kind, path)
  for load in (weights.load_model, interop.load):
    assert abuse(load, str(path), folder=path, names=[str(path)]) is None
