"""Abuse of the command lines and of every loader, by hypothesis.

Whatever is given, there is a valid result or one line that says what is wrong:
never another exception, a hang, a write outside the folder given, another
process, or a pickle that is called. FUZZ=20 tries twenty times as many
examples, other ones each time; without it they are the same in every run.
"""

from concurrent import futures
import contextlib
import faulthandler
import functools
import importlib
import io
import json
import os
from pathlib import Path
import pickle
import resource
import shutil
import signal
import struct
import sys
import types
import warnings
import zipfile
import zlib

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import torch

from convmixer_jax import checkpoint
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import interop
from convmixer_jax import logger
from convmixer_jax import main
from convmixer_jax import models
from convmixer_jax import predict
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from tests import common

FUZZ = int(os.environ.get("FUZZ", "0"))
SECONDS = 200  # For one example; the slowest takes two on an idle machine.
MEMORY = 1 << 30  # What a test may take beyond what it began with, in bytes.


def examples(count):
  """Settings for so many examples."""
  return hypothesis.settings(
    max_examples=count * max(FUZZ, 1),
    derandomize=not FUZZ,
    database=None,
    deadline=None,  # `abuse` has one, which also ends what hangs.
    suppress_health_check=list(hypothesis.HealthCheck),
  )


# --- What must not happen.

CHANGES = [
  "os.chmod",
  "os.chown",
  "os.link",
  "os.mkdir",
  "os.remove",
  "os.rename",
  "os.rmdir",
  "os.symlink",
  "os.truncate",
  "shutil.rmtree",
]
RUNS = [
  "os.exec",
  "os.fork",
  "os.forkpty",
  "os.posix_spawn",
  "os.spawn",
  "os.system",
  "subprocess.Popen",
  "socket.connect",
  "pickle.find_class",
]


class Hang(BaseException):
  """Not an Exception, so that nothing on the way takes it for another."""


class Watch:
  """Hears of every file that is written and of every program that is run."""

  def __init__(self):
    self.roots = None  # Where writing is allowed; None: not watching.
    self.seen = []
    sys.addaudithook(self.hear)  # For ever: Python has no way to remove it.

  def hear(self, event, args):
    if self.roots is None:
      return
    if event == "open":
      path, mode, flags = args
      writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
      if (set(mode or "") & set("wax+") or flags & writes) and (
        isinstance(path, (str, bytes, os.PathLike))
      ):
        self.changed(event, path)
    elif event in CHANGES:
      self.changed(event, args[0])
    # A run asks git for its commit, and Python's `platform` asks uname, once.
    elif event in RUNS and args[0] not in ("git", "uname"):
      self.seen.append((event, args))

  def changed(self, event, path):
    path = os.path.realpath(os.fsdecode(path))
    if not path.startswith((*self.roots, "/dev/null")):
      self.seen.append((event, path))


@functools.cache
def watch():
  return Watch()


@contextlib.contextmanager
def guarded(folder):
  """Fails where something is written outside `folder`, runs or hangs."""

  def hang(signum, frame):
    raise Hang(f"longer than {SECONDS} s")

  previous = signal.signal(signal.SIGALRM, hang)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # If C hangs.
  cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
  watch().roots = (os.path.realpath(folder), cache)
  bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
    sys.dont_write_bytecode = bytecode
    seen, watch().seen, watch().roots = watch().seen, [], None
    assert not seen  # Here, for `function` may have raised too.


def abuse(function, *args, folder, names=()):
  """Returns the result of a call, or None where it is refused in one line."""
  try:
    with guarded(folder), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow's, of doubtful files.
      return function(*args)
  except UserError as e:
    text = str(e)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    for name in names:
      assert name in text
    return None


@pytest.fixture(autouse=True)
def little_memory(request):
  """Whatever a file claims to need; and no machine runs out of it meanwhile."""

  def resident(field):
    (line,) = (
      line
      for line in Path("/proc/self/status").read_text().splitlines()
      if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024

  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  limit = resident("VmSize") + 16 * MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  Path("/proc/self/clear_refs").write_text("5")  # The peak is from here on.
  before = resident("VmRSS")
  yield
  resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  # Pillow reads up to 179 million pixels, of eight bytes on the way.
  large = request.node.name == "test_image_files"
  assert resident("VmHWM") - before < MEMORY * (4 if large else 1)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "given").mkdir()
  return tmp_path / "given"


# --- Overrides.

NUMBERS = st.one_of(
  st.integers(-3, 40),
  st.sampled_from(
    [0, -1, 2**15, 2**16, 10**5, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 10**30]
  ),
  st.sampled_from([0.0, 0.5, 1.0, -0.1, 1e-12, 1e-300, 1e30, 1e38, 1e300]),
  st.floats(),
)
WORDS = st.one_of(
  st.text(max_size=20),
  st.sampled_from(
    ["digits", "folder", "cifar10", "train", "test", "train[:1%]",
    "train[:50%]+test", "val", "gelu", "relu", "batch", "layer", "float32",
    "bfloat16", "cosine", "constant", "const", "random", "bicubic",
    "nothing_saveable", "dots_saveable", "convmixer_128_4", "convmixer_256_8",
    "rand-m9-inc1", "rand-m9-inc1:Rotate", "torchvision-n2-m12", "head",
    "stem", "block_0", "None", "true", "false", "train[-1:]", "train[5:2]",
    "train[:200%]", "train[::2]", "train[abs:]", "train[:1e3]", "hf-hub:.",
    "hf-hub:a/b/c", "huggingface:x", "kaggle:y", "a/b:1.0.0", "mnist:9.9.9",
    "../..", "~", "~nobody/x", "/dev/zero", "/dev/null", "/proc/self/mem",
    "http://x/y", "gs://x", "file:///x", "$(id)", "`id`", ";id", "|id", "&&id",
    ">x", "%s", "{0}", "{}", "\\x00", "\\", "'", '"', "'''", "None,None",
    "--seed", "-1", "0x10", "0o17", "1_000", "1e3", "+5", "١٢", "²", "NaN",
    "-inf", "1e999", "1j", "0xffffffffffffffffffffffffffff"]
  ),
  st.sampled_from(["", " ", "\n", "a\nb", "\r\n\t", "\x00", "\u2028", "\x85",
                   "9" * 5000, "0x" + "f" * 5000, "(" * 500, "[" * 5000,
                   "a" * 3000, "1," * 999, "lambda: 0", "__import__('os')",
                   "\udcff\udc80", "\U0001f600", "(1, 'a", "('a' 'b',)"]),
)  # fmt: skip
LITERALS = st.recursive(
  st.one_of(NUMBERS, WORDS, st.none(), st.booleans()),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4).map(tuple),
    st.lists(inner, max_size=4),
    st.dictionaries(WORDS, inner, max_size=2),
  ),
  max_leaves=6,
)
PAIRS = st.tuples(st.floats(0, 2), st.floats(0, 2))
VALUES = st.one_of(
  NUMBERS.map(repr), WORDS, LITERALS.map(repr), PAIRS.map(repr)
)
POOL = (
  0, 1, 2, 3, 5, 8, 16, 64, 1000, 10**4, 10**5, 10**6, 2**20, 2**31, 2**32 - 1,
  0.0, 1e-12, 1e-3, 0.25, 0.999999, 1.0, 7.5, 100.0, 1e30, 1e38, 1e300, True,
  False, None, "", "digits", "folder", "no_such_set", "train", "test[:5]",
  "train[:1%]", "train[-1:]", "test+train[5:9]", "head", "gelu", "relu",
  "batch",
  "layer", "dots_saveable", "nothing_saveable", "bfloat16", "float32", "random",
  "convmixer_1536_20", "bicubic", "bilinear", "rand-m9-mstd0.5-inc1", "pixel",
  "torchvision-n2-m12", "rand-m9-inc1:Rotate", "const", "cosine", "onecycle",
  "constant", "convmixer_128_4", (), (0.001, 1.0), (1.0, 1.0), (0.02, 0.02),
  (0.9, 0.0), (100.0, 100.0), (0.01, 100), (0, 0), (0, 0, 0), (1.0, 0.001, 0.5),
  ("head",), ("stem", "block_0/depthwise"), ("block_9",), ("",),
)  # fmt: skip
FIELDS = st.sampled_from(sorted(config_lib.FIELDS))
GOOD = FIELDS.flatmap(  # As far as the field alone tells.
  lambda field: st.builds(
    "--config.{}={}".format,
    st.just(field),
    st.sampled_from(
      [
        v
        for v in POOL
        if config_lib.FIELDS[field][1](v)
        and not (field == "model.depth" and v and v > 8)  # Slow to trace.
      ]
    ),
  )
)
BAD = st.one_of(
  st.builds("--config.{}={}".format, FIELDS, VALUES),
  st.builds("-config.{}={}".format, FIELDS, VALUES),
  st.builds("--config.{}".format, FIELDS),
  st.builds("--noconfig.{}".format, FIELDS),
  st.builds("--config.{}[{}]={}".format, FIELDS, VALUES, VALUES),
  st.builds("--config.{}.{}={}".format, FIELDS, WORDS, VALUES),
  st.builds(
    "--config.{}={}".format,
    st.sampled_from(["model", "data", "augment", "optim", "", "."]),
    VALUES,
  ),
  st.builds("--config.{}={}".format, WORDS, VALUES),
  st.builds(
    "--{}={}".format,
    st.sampled_from(["workdir", "mode", "process_id", "undefok"]),
    VALUES,
  ),
  VALUES,
)


class Traced(BaseException):
  """Where a run would make its workdir."""


class NothingComputes:
  """jax, whose jit finds out shapes."""

  def __getattr__(self, name):
    return getattr(jax, name)

  def jit(self, function, **options):
    del options
    return functools.partial(jax.eval_shape, function)


@pytest.fixture
def trace(monkeypatch):
  """Calls main as far as the workdir, then traces a step: argv -> shapes."""
  begun = types.SimpleNamespace()
  jit_step = train.jit_step

  def keep_step(config, *args, **options):
    begun.config, begun.step = config, jit_step(config, *args, **options)
    return begun.step

  def stop(*workdir):
    raise Traced

  monkeypatch.setattr(train, "jax", NothingComputes())
  monkeypatch.setattr(train, "jit_step", keep_step)
  monkeypatch.setattr(workdir_lib, "locked", stop)
  init_state = step_lib.init_state

  def keep_state(*args):
    begun.state = init_state(*args)
    return begun.state

  monkeypatch.setattr(step_lib, "init_state", keep_state)

  def run(argv):
    monkeypatch.setattr(sys, "argv", argv)
    importlib.reload(main)  # Fresh flags.
    sys.modules.pop("config_config", None)  # What ml_collections loaded last.
    if stray := cli.parse_flags(argv, main._FLAGS)[1:]:
      raise UserError(f"{stray[0]}: not a flag")  # As cli.run does.
    with contextlib.suppress(Traced):
      main.main()
      return None  # --mode=eval
    size, batch = begun.config.data.image_size, begun.config.batch_size
    shape = jax.ShapeDtypeStruct
    state = jax.tree.map(lambda x: shape(x.shape, x.dtype), begun.state)
    new_state, metrics = begun.step(
      state,
      {
        "image": shape((batch, size, size, 3), np.uint8),
        "label": shape((batch,), np.int32),
      },
    )
    assert jax.tree.map(np.shape, new_state) == jax.tree.map(np.shape, state)
    assert metrics["loss"].shape == ()
    return begun.config

  return run


DIGITS = f"--config={common.ROOT}/configs/digits.py"
SMALL = (
  "--config.model.dim=8",
  "--config.model.depth=1",
  "--config.data.train_split=train[:64]",
  "--config.data.eval_split=test[:64]",
)


@pytest.fixture
def begin(trace, folder, monkeypatch):
  """Overrides -> the config that main would train with, or None."""
  monkeypatch.chdir(folder)
  trace(["main", DIGITS, *SMALL])  # Compiles the C++, once for a machine.

  def run(overrides, config=DIGITS, **options):
    argv = ["main", config, f"--workdir={folder}/runs", *SMALL, *overrides]
    found = abuse(trace, argv, folder=folder, **options)
    assert "runs" not in os.listdir(folder)
    return found

  return run


def test_malformed_overrides(begin):
  @examples(300)
  @hypothesis.given(
    st.lists(GOOD, max_size=2), st.lists(BAD, min_size=1, max_size=2)
  )
  def run(good, bad):
    begin([*good, *bad])

  run()


@pytest.mark.parametrize(
  "count", [20, pytest.param(80, marks=pytest.mark.slow)]
)
def test_what_passes_the_check_traces(begin, count):
  """Values at the edges of what each field accepts, up to three together."""
  accepted = []

  @examples(count)
  @hypothesis.given(st.lists(GOOD, min_size=1, max_size=3))
  def run(overrides):
    accepted.append(bool(begin(overrides)))

  run()
  assert sum(accepted) > count / 4


# --- Config files.

WHOLE = Path(common.ROOT, "configs", "digits.py").read_text()
RETURNS = [
  "None",
  "0",
  "()",
  "[]",
  "{}",
  "'x'",
  "object",
  "type",
  "get_config",
  "print",
  "...",
  "NotImplemented",
  "1j",
  "b'x'",
  "{'model':1}",
  "dict(model={})",
  "config",
  "config.model",
  "config.to_dict()",
  "[config]",
  "iter([])",
  "config_dict.FrozenConfigDict(config)",
  "config_dict.ConfigDict()",
  "config_dict.ConfigDict({'model':{}})",
  "config_dict.ConfigDict({'a.b':1})",
  "config.copy_and_resolve_references()",
  "config_dict.placeholder(int)",
  "(lambda:0)",
]
FIELD_VALUES = r"""
None 10**5000 -10**5000 float('nan') float('inf') 'x'*10**5 b'x' [] {} set() ()
object() type print config [1]*10**5 'a\nb' '\0' '\ud800' 1j ... (1,)*3 [None]*3
__import__('numpy').ones(3) __import__('numpy').float32(1) [[[]]] config.model
__import__('jax').numpy.ones(3) config_dict.placeholder(int) {'a':{'b':1}}
config_dict.ConfigDict({'x':1}) type('A',(),{'__repr__':lambda_s:1/0})()
type('A',(int,),{})(3) type('A',(str,),{})('x') True 0 1.0 lambda:0
""".replace("lambda_s", "lambda s").split()
STATEMENTS = [
  "raise SystemExit", "raise SystemExit(0)", "raise SystemExit('bye\\nbye')",
  "import sys; sys.exit(3)", "raise RecursionError", "get_config()",
  "raise StopIteration", "raise GeneratorExit", "raise BaseException('a\\nb')",
  "raise MemoryError", "raise ImportError", "import no_such_module",
  "raise KeyError", "raise KeyError('')", "raise OSError(2, 'x\\ny', 'z')",
  "raise FileNotFoundError(2, 'x', 'y')", "raise TypeError", "1 / 0",
  "raise UnicodeDecodeError('x', b'', 0, 1, 'y')", "assert False", "yield 1",
  "raise ExceptionGroup('a', [ValueError('b')])", "open('/no/such')", "return",
  "raise ValueError('\\n')", "raise Exception(10**5000)", "config.x = config",
  "config.lock()", "config.model = config", "del config.model", "config = 3",
  "config.update({'a': 1})", "config.model.scan = config.data", "return 1, 2",
  "config['a.b'] = 1", "config['a b\\nc'] = 1", "return config.get_config",
  "config.__dict__.clear()", "(" * 300, "'" * 7, "\x00", "\tif", "def", "0o9",
  "raise warnings.warn", "async def x(): await", "class get_config: pass",
]  # fmt: skip
BODIES = st.one_of(
  st.builds("return {}".format, st.sampled_from(RETURNS)),
  st.builds(
    "config.{} = {}".format,
    st.sampled_from(sorted(config_lib.FIELDS)),
    st.sampled_from(FIELD_VALUES),
  ),
  st.sampled_from(STATEMENTS),
  st.text(max_size=30),
)
AT_END = "  return config\n"
# What a config file leaves behind, such as a coroutine that nobody awaits.
on_its_own_account = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)
assert WHOLE.endswith(AT_END)
FILES = st.one_of(
  st.builds(  # A line or two more in get_config.
    lambda lines: (
      WHOLE.removesuffix(AT_END)
      + "".join(f"  {line}\n" for line in lines)
      + AT_END
    ).encode(errors="surrogatepass"),
    st.lists(BODIES, min_size=1, max_size=2),
  ),
  st.builds(  # Or at the end of the file.
    lambda line: f"{WHOLE}\n{line}\n".encode(errors="surrogatepass"), BODIES
  ),
  st.integers(0, len(WHOLE) - 1).map(lambda n: WHOLE[:n].encode()),
  st.binary(max_size=200),
  st.sampled_from([b"", b"\xff\xfe", b"\x00" * 9, b"def get_config(): pass",
    b"get_config = 3", b"def get_config(a, b): pass", b"#" * 10**6,
    b"def get_config(): return get_config()", b"get_config = dict",
    b"def get_config(*a): return a", b"# coding: nope\n",
    b"x = " + b"[" * 10**5,
    b"class get_config: x = 1", b"import sys; sys.exit(0)", b"raise SystemExit",
    b"from x import *", b"async def get_config(): pass",
  ]),
)  # fmt: skip


@on_its_own_account
def test_config_files(begin, folder):
  path = folder / "config.py"

  @examples(200)
  @hypothesis.given(FILES, st.sampled_from(["", ":", ":x", ":a:b", ":\n"]))
  def run(data, variant):
    path.write_bytes(data)
    begin([], f"--config={path}{variant}", names=["."])  # A field, or the file.

  run()


@on_its_own_account
def test_every_odd_config(begin, folder):
  """Each value in one field or other, each statement, each result."""
  path = folder / "config.py"
  bodies = [*STATEMENTS, *map("return {}".format, RETURNS)]
  for i, value in enumerate(FIELD_VALUES):
    for field in sorted(config_lib.FIELDS)[i % 15 :: 15]:
      bodies.append(f"config.{field} = {value}")
  for body in bodies:
    text = f"{WHOLE.removesuffix(AT_END)}  {body}\n{AT_END}"
    path.write_text(text)
    begin([], f"--config={path}", names=["."])


@pytest.mark.parametrize("kind", ["absent", "folder", "loop", "fifo", "empty"])
def test_what_is_no_config_file(kind, begin, folder):
  path = folder / "config.py"
  make(kind, path)
  assert begin([], f"--config={path}", names=[str(path)]) is None
  assert begin([], "--config=", names=["--config="]) is None


def make(kind, path):
  """Puts something at `path` that is no file."""
  if kind == "folder":
    path.mkdir()
  elif kind == "loop":
    path.symlink_to(path)
  elif kind == "fifo":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  elif kind == "empty":
    path.touch()
  else:
    assert kind == "absent"


# --- Images.


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
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body))
    + name
    + body
    + struct.pack(">I", zlib.crc32(name + body))
    for name, body in parts
  )


@functools.cache
def pictures():
  frame = Image.open(io.BytesIO(picture("RGB", "PNG")))
  more = dict(save_all=True, append_images=[frame, frame.rotate(90)])
  return [
    picture("RGB", "JPEG"),
    picture("L", "JPEG", progressive=True),
    picture("CMYK", "JPEG"),
    picture("RGB", "JPEG", exif=b"Exif\x00\x00MM\x00*" + b"\xff" * 40),
    picture("RGBA", "PNG"),
    picture("P", "PNG"),
    picture("1", "PNG"),
    picture("LA", "PNG"),
    picture("I;16", "PNG"),
    picture("RGB", "PNG", **more),
    picture("P", "GIF"),
    picture("RGB", "GIF", **more),
    picture("RGB", "WEBP"),
    picture("RGBA", "WEBP", lossless=True),
    picture("RGB", "WEBP", **more),
    picture("RGB", "BMP"),
    picture("P", "BMP"),
    picture("CMYK", "TIFF"),
    picture("RGB", "TIFF", compression="tiff_lzw"),
    picture("RGB", "TIFF", **more),
    picture("I;16", "TIFF"),
    picture("L", "PPM"),
    picture("RGB", "TGA"),
    picture("RGB", "ICO"),
    picture("RGB", "EPS"),
    picture("RGB", "JPEG2000"),
    picture("RGB", "PCX"),
    picture("RGB", "DDS"),
    picture("RGB", "SGI"),
  ]


SIDES = st.sampled_from(
  [0, 1, 2, 17, 65535, 10**5, 10**6, 2**31 - 1, 2**32 - 1]
)
# Decompresses to 4 GiB.
HUGE = zlib.compress(bytes(1 << 22), 9)
BOMBS = st.one_of(
  st.builds(png, SIDES, SIDES, color=st.integers(0, 7), bits=st.integers(0,
  17)),
  st.builds(
    lambda w, h: png(w, h, data=b"\x00" * (h * (1 + 3 * w))),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1000, 30_000, 65_535, 10**6]),
  ),
  st.builds(
    lambda w, h: png(w, h, data=b"\x00" * (h * (1 + 3 * w))),
    st.sampled_from([10**4, 10**6]),
    st.sampled_from([1, 2]),
  ),
  st.builds(
    lambda name, body: png(5, 5, (name, body)),
    st.sampled_from([b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"tEXt",
    b"PLTE"]),
    st.one_of(st.just(b"a\x00\x00" + HUGE),
    st.just(b"a\x00\x01\x00\x00\x00" + HUGE),
              st.binary(max_size=40)),
  ),
  st.builds(
    lambda w, h: b"P6 %d %d 255\n" % (w, h) + b"x" * 99, SIDES, SIDES
  ),
  st.builds(
    lambda w, h: b"GIF89a" + struct.pack("<HHBBB", w, h, 0, 0, 0) + b",x" * 9,
    st.integers(0, 65535), st.integers(0, 65535),
  ),
  st.builds(
    lambda w, h, bits: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40,
              w, h, 1, bits, 0, 0, 0, 0, 0, 0) + b"x" * 99,
    st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([0, 1, 4, 8, 16, 24, 32, 33]),
  ),
  st.builds(  # PostScript, which is a program.
    lambda body: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + body,
    st.sampled_from([b"", b"(mark) (w) file", b"%pipe%touch mark", b"{} loop"]),
  ),
)  # fmt: skip


@st.composite
def broken(draw, wholes):
  """A file: with bytes changed, cut short, and pieces repeated or put in."""
  data = bytearray(draw(st.sampled_from(wholes)))
  place = st.one_of(
    st.integers(0, min(len(data) - 1, 60)), st.integers(0, len(data) - 1)
  )
  for _ in range(draw(st.integers(0, 4))):
    at, kind = draw(place), draw(st.integers(0, 4))
    if kind == 0:
      data = data[:at]
      break
    if kind == 1:
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 2:
      data[at : at + 4] = draw(
        st.sampled_from([b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4)])
      )
    elif kind == 3:
      data[at:at] = data[: draw(place)]
    else:
      data[at:at] = draw(st.binary(max_size=9))
    if not data:
      break
  return bytes(data)


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

  @examples(350)
  @hypothesis.given(IMAGES)
  def run(data):
    path.write_bytes(data)
    found = abuse(each, data, folder=folder, names=[str(path)])
    other = abuse(again, folder=folder, names=[str(path)])
    if found is None and other is not None:  # Decoded at another size.
      other = None
    assert (found is None) == (other is None)
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
    (batch,) = stream.eval_batches(
      source,
      batch_size=2,
      rows=np.arange(2),
      image_size=224,
      crop_pct=0.96,
      max_unreadable=budget,
    )
    return batch["mask"].sum()

  assert abuse(score, 0, folder=folder, names=[str(path)]) is None
  assert abuse(score, 1, folder=folder) == 1
  with guarded(folder):
    files = predict.image_files([str(folder)])
    ((_, _, errors),) = predict.decoded([str(path), str(good)], 2, 224, 0.96)
  assert set(files) == {str(path), str(path.with_name("folder.jpg")), str(good)}
  assert "cannot be decoded: " in errors[0]
  assert errors[1] == ""


# --- Files of weights.


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


class Storage:
  """What the pickle of a PyTorch file names by a persistent id."""

  def __init__(self, *pid):
    self.pid = pid


class Called:
  """Pickles as a call, then attributes, items and a state."""

  def __init__(self, *reduced):
    self.reduced = reduced

  def __reduce__(self):
    return self.reduced


class Name:
  """Pickles as the global MODULE.NAME, which need not exist."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Pickler(pickle._Pickler):
  """Of any program, by Python's own, whose parts can be replaced."""

  dispatch = pickle._Pickler.dispatch.copy()

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Storage) else None

  def save_name(self, obj):
    self.write(f"c{obj.module}\n{obj.name}\n".encode(errors="replace"))

  dispatch[Name] = save_name

  def save_called(self, obj):
    function, arguments, *more = obj.reduced
    self.save(function)
    self.save(arguments)
    self.write(pickle.REDUCE)
    for part in more:
      self.save(part)
      self.write(pickle.BUILD)

  dispatch[Called] = save_called

  def save_raw(self, obj):
    self.write(obj.code)

  dispatch[types.SimpleNamespace] = save_raw


def pickled(obj, protocol=2):
  file = io.BytesIO()
  Pickler(file, protocol).dump(obj)
  return file.getvalue()


def raw(code):
  """Opcodes, put in as they are."""
  return types.SimpleNamespace(code=code)


FLOATS = Name("torch", "FloatStorage")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ODD = st.sampled_from([
  0, -1, 1, 2, 3, 5, 8, 2**31, 2**40, 2**62, 2**63, 2**64, 2**70, 10**5000,
  None, True, 1.5, float("nan"), "x", "", b"x", (), (1,), [1], {}, "a\nb",
])  # fmt: skip


def tensor(key, value, /, **changed):
  """A tensor's pickle: its storage, and how it lies in it."""
  fields = {
    "kind": "storage",
    "type": FLOATS,
    "key": key,
    "where": "cpu",
    "numbers": value.size,
    "offset": 0,
    "shape": value.shape,
    "strides": tuple(s // value.itemsize for s in value.strides),
    "rebuild": REBUILD,
  } | changed
  pid = [fields[k] for k in ("kind", "type", "key", "where", "numbers")]
  return Called(
    fields["rebuild"],
    (Storage(*pid), fields["offset"], fields["shape"], fields["strides"],
     False, Called(Name("collections", "OrderedDict"), ())),
  )  # fmt: skip


CHANGED = st.dictionaries(
  st.sampled_from(["numbers", "offset", "where", "key", "kind"]), ODD
) | st.fixed_dictionaries(
  {},
  optional={
    "shape": st.lists(ODD | st.integers(0, 9), max_size=5).map(tuple) | ODD,
    "strides": st.lists(ODD | st.integers(0, 9), max_size=5).map(tuple) | ODD,
    "type": st.sampled_from([
      Name("torch", "DoubleStorage"), Name("torch", "BoolStorage"), "x",
      Name("torch", "ComplexFloatStorage"), Name("os", "system"), None, (),
      Name("torch.storage", "UntypedStorage"), "FloatStorage",
    ]),
    "rebuild": st.sampled_from([
      Name("torch._utils", "_rebuild_parameter"), Name("torch", "Size"),
      Name("torch._utils", "_rebuild_qtensor"), Name("numpy", "dtype"),
      Name("collections", "OrderedDict"), "x", None,
    ]),
  },
)  # fmt: skip

GLOBALS = st.sampled_from("""
os system|posix system|nt system|subprocess Popen|subprocess check_output
builtins eval|builtins exec|builtins getattr|builtins open|builtins __import__
builtins compile|builtins print|builtins dict|__builtin__ eval|io open
collections OrderedDict.__class__|collections OrderedDict.fromkeys
collections namedtuple|collections defaultdict|collections _sys.modules
torch load|torch.serialization load|torch.hub load|torch._utils os.system
torch._utils _rebuild_tensor_v2.__globals__|torch.storage _load_from_bytes
torch.storage FloatStorage.__init__|torch FloatStorage.os|torch jit.load
numpy load|numpy core.multiarray.os|numpy dtype.__class__|numpy fromfile
numpy.core.multiarray _reconstruct|numpy.core.multiarray scalar.__class__
argparse Namespace.__init__.__globals__|argparse FileType|_codecs decode
_codecs encode|argparse _sys.exit|functools partial|operator attrgetter
operator methodcaller|importlib import_module|importlib reload|runpy run_path
pickle loads|pickle Unpickler|shutil rmtree|pathlib Path|webbrowser open
types CodeType|types FunctionType|ctypes CDLL|sys exit|sys modules|pty spawn
code interact|pdb run|socket socket|multiprocessing Process|marshal loads
copyreg _reconstructor|copyreg __newobj__|copyreg add_extension|timeit timeit
convmixer_jax.interop load|convmixer_jax.interop _Inert|atexit register
convmixer_jax.interop os.system|antigravity x|this x| |a. b|.. x|x\\u00e9 y
""".replace("\n", "|").strip("|").split("|")).map(
  lambda text: Name(*text.split(" ", 1))
)  # fmt: skip


# 2**60 of a letter, by doubling a tuple: what walks or hashes it never ends.
BOMB = b"X\x01\x00\x00\x00x" + b"2\x86" * 60
PID = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
U8 = struct.Struct("<Q").pack
CODES = [
  b"Nr\x00\x00\x00\x08",  # 2 GiB of it, which the limit of memory admits.
  b"r\xff\xff\xff\xffN",  # LONG_BINPUT: a memo of 4 G entries, in C.
  b"N" + b"r\xff\xff\xff\x7f",
  b"N\x94" * 50,
  b"\x8d" + U8(2**60), b"\x8e" + U8(2**60), b"\x96" + U8(2**60),
  b"\x8d" + U8(2**35), b"\x8e" + U8(2**35), b"\x96" + U8(2**35),
  b"\x95" + U8(2**60), b"\x95" + U8(2**35), b"\x95" + U8(0),
  b"X\xff\xff\xff\xff", b"T\xff\xff\xff\x7f", b"B\xff\xff\xff\xff",
  b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x8a\xff",
  b"P0\n", b"Q", b"PFloatStorage\n", b"\x82\x01", b"\x83\x01\x00",
  b"\x84\xff\xff\xff\x7f", b"\x97", b"\x98", b"N\x98", b"j\xff\xff\xff\xff",
  b"h\x09", b"g99999999999999999999\n", b"p-1\n", b"I" + b"9" * 5000 + b"\n",
  b"L" + b"9" * 5000 + b"L\n", b"F1e999\n", b"I01\n", b"Ix\n", b"S'a\\\n",
  b"V\\ud800\n", b"(" * 3000, b"]" * 3000, b"(l" * 500, b"\x80\xff", b".",
  b"0", b"1", b"2" * 3000, b"(ios\nsystem\n", b"(cos\nsystem\no", b"\x93",
  b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", b"R", b"\x81", b"\x92",
  b"b", b"(}d", b"(](d", b"(}\x91", b"\x8f(]\x90", b"\x8f(N\x90", b"(K\x01\x91",
  b"}(]Nu", b"}]Ns", b"NNs", b"](e", b"Na", b"}(Ku", b"\xff", b"\x00", b"",
  b"c\n\n", b"cos\n", b"ccollections\nOrderedDict\n)\x81", b"\x85" * 9000,
  BOMB, b"](" + BOMB + BOMB + b"e", b"}" + BOMB + b"K\x01s", BOMB + b"0N",
  b"}(" + BOMB + b"K\x01u", b"(" + BOMB + b"K\x01d",
  b"\x8f(" + BOMB + b"\x90",
  b"(" + BOMB + b"\x91",
  b"ccollections\nOrderedDict\n]](" + BOMB + b"Ke\x85R",
  b"ccollections\nOrderedDict\n](](" + BOMB + b"K\x01ee\x85R",
  PID + BOMB + b"X\x03\x00\x00\x00cpuK\x01tQ", b"(" + BOMB + b"NNNNtQ",
  PID + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + BOMB + b"tQ",
  b"(X\x07\x00\x00\x00storage" + BOMB + b"NNNtQ", BOMB + b"}" + BOMB + b"Ns0",
  b"N" + b"\x85" * 10**5, b"}N" + b"\x85" * 10**5 + b"Ns",
]  # fmt: skip

OBJECTS = st.one_of(
  ODD,
  GLOBALS,
  GLOBALS.flatmap(
    lambda name: st.builds(
      Called,
      st.just(name),
      st.sampled_from([
        (), ("touch canary",), ("open('canary', 'w')",), ("canary", "w"),
        ("os", "system"), (["touch", "canary"],), (("a", 1),), ([["a", 1]],),
        (10**9,), ("f4", False, True),
      ]),
    )
  ),
  st.builds(  # A state: attributes of what no file should change.
    lambda name, state: Called(name, (), state),
    st.sampled_from([
      Name("collections", "OrderedDict"), Name("argparse", "Namespace"),
      Name("torch", "Size"), Name("numpy", "dtype"),
    ]),
    st.sampled_from([
      {"items": 3}, {"get": None}, {"keys": "x"}, {"__class__": 1}, 3, None,
      (None, {"items": 3}), ({"get": 1}, {"keys": 2}), {1: 2}, (1, 2, 3),
      {"_metadata": {"": {"version": 1}}}, {"__dict__": {}},
    ]),
  ),
  st.builds(raw, st.sampled_from(CODES)),
  st.sampled_from([
    {1: 2}, {None: 1}, {b"x": 1}, {(1, 2): 1}, {"": {}}, {1, 2}, "x" * 10**6,
    frozenset([1]), Storage(), Storage(1), Storage("storage", FLOATS),
    Storage("storage", FLOATS, "../../../etc/passwd", "cpu", 1),
    Storage("storage", FLOATS, "/etc/passwd", "cpu", 1), bytearray(b"x"),
  ]),
)  # fmt: skip
NAMES = st.one_of(
  st.sampled_from(sorted([
    "head.weight", "head.bias", "stem.0.weight", "blocks.0.0.fn.0.weight",
    "blocks.0.1.weight", "blocks.0.3.running_var", "stem.2.num_batches_tracked",
    "blocks.999999999999.1.weight", "blocks.\u00b2.1.weight", "0.weight",
    "\u00b2.weight", "3.1.weight", "7.weight", "-1.weight", "blocks.-1.1.bias",
    "3.0.fn.0.weight", "\u0663.1.weight", "9" * 5000 + ".1.weight", "..", "",
    "module.module.head.bias", "a\nb", "head", "weight", "state_dict", "model",
    "blocks.0.0.fn.0", "blocks.00.1.bias", "blocks.1.1.weight", "0.0.weight",
  ])),
  st.text(max_size=9),
)  # fmt: skip


@st.composite
def pickles(draw):
  """(what is pickled, the storages): a state dict with something in it."""
  values = state()
  tensors = {
    name: tensor(str(i), value)
    for i, (name, value) in enumerate(values.items())
  }
  data = {str(i): value.tobytes() for i, value in enumerate(values.values())}
  for _ in range(draw(st.integers(1, 2))):
    name = draw(st.sampled_from(sorted(values)))
    kind = draw(st.integers(0, 5))
    if kind <= 1:
      i = list(values).index(name)
      tensors[name] = tensor(str(i), values[name], **draw(CHANGED))
    elif kind == 2:
      tensors[name] = draw(OBJECTS)
    elif kind == 3:
      tensors[draw(NAMES)] = tensors.pop(name)
      break
    elif kind == 4:
      key = draw(st.sampled_from(sorted(data)))
      data[key] = draw(
        st.sampled_from([b"", data[key][:-1], data[key] * 2, data[key][:4]])
      )
    else:
      shape = draw(st.sampled_from([
        (), (0,), (4,), (1, 1), (4, 4), (0, 0, 0, 0), (4, 0, 2, 2), (4,) * 5,
        (2**40, 0, 1, 1), (0, 2**62, 7, 7), (10, 4, 1), (1, 3, 2, 2),
      ]))  # fmt: skip
      strides = draw(st.sampled_from([(0,) * len(shape), (1,) * len(shape)]))
      i = list(values).index(name)
      tensors[name] = tensor(str(i), values[name], shape=shape, strides=strides)
      if not draw(st.booleans()):
        break
  found = tensors
  wrap = draw(st.integers(0, 5))
  if wrap == 0:
    found = {"state_dict": tensors, "args": draw(OBJECTS)}
  elif wrap == 1:
    found = {"epoch": draw(OBJECTS), "model": tensors}
  return found, data


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


ENTRIES = st.sampled_from([
  (), (("a/byteorder", b"big"),), (("a/byteorder", b"\xff\xfe"),),
  (("../../canary", b"x"),), (("/canary", b"x"),), (("b/data.pkl", b"N."),),
  (("a/data.pkl", b"N."),), (("a/byteorder", b"little"),), (("\n", b""),),
])  # fmt: skip


@st.composite
def torch_files(draw):
  found, data = draw(pickles())
  try:
    code = pickled(found, draw(st.sampled_from([2, 3, 4])))
  except (RecursionError, UnicodeEncodeError):
    hypothesis.reject()
  code = draw(st.one_of(st.just(code), st.just(code), broken([code])))
  if draw(st.integers(0, 3)) == 0:
    return legacy(code, data)
  method = draw(
    st.sampled_from([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])
  )
  return zipped(code, data, draw(ENTRIES), method)


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


JSON_ODD = st.sampled_from([
  0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**30, None, True, 1.5, "x", [], {},
  [1], [-1], [2**40, 2**40], [2**63, 0], [0, 10**18], [8, 4], "F32", "I8",
])  # fmt: skip


@st.composite
def safe_files(draw):
  header, data = {}, b""
  for name, value in state().items():
    header[name] = {
      "dtype": "F32",
      "shape": list(value.shape),
      "data_offsets": [len(data), len(data) + value.nbytes],
    }
    data += value.tobytes()
  name = draw(st.sampled_from(sorted(header)))
  kind = draw(st.integers(0, 5))
  if kind == 0:
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    header[name][field] = draw(JSON_ODD)
  elif kind == 1:
    header[name]["dtype"] = draw(st.sampled_from(
      ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3",
      "U64", "I64", "BOOL", "C64", "U8", "F33"]
    ))  # fmt: skip
  elif kind == 2:
    header[draw(NAMES)] = header.pop(name)
  elif kind == 3:
    shape = header[name]["shape"]
    header[name]["shape"] = draw(st.permutations(shape)) + draw(
      st.sampled_from([[], [1], [1, 1], [1, 1, 1]])
    )
  elif kind == 4:
    header[draw(st.sampled_from(["__metadata__", "x", ""]))] = draw(JSON_ODD)
  else:
    length = draw(st.sampled_from([0, 1, 8, 2**20, 2**40, 2**63, 2**64 - 1]))
    return safe(header, data, length)
  return safe(header, data)


WEIGHTS = st.one_of(
  torch_files(),
  torch_files(),
  torch_files(),
  safe_files(),
  st.deferred(lambda: broken(whole_files())),
  st.sampled_from([
    b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02N.", b"\x80",
    safe(b"{"), safe(b"{}"), safe(b"{" + b"[" * 10**5), safe(b"{",
    length=2**50),
    b"\x80\x02" + b"\x8a\x0alF\x9c\xa0o\x86j\xd1P\x19.",
    b"\x80\x04\x95" + U8(2**60),
    b"\x80\x02r\xff\xff\xff\x7f.", b"\x89HDF\r\n\x1a\n", b"GGUF", b"x" * 99,
    b"\x80\x02}" + BOMB + b"Ns.", b"\x80\x02]" + b"\x85" * 10**5 + b".",
  ]),
  st.binary(max_size=99),
)  # fmt: skip


def test_files_of_weights(folder, monkeypatch):
  monkeypatch.chdir(folder)
  path = folder / "weights"
  loaded = []

  def load(data):
    del data
    model, variables, _ = weights.load_model(str(path))
    side = 3 * model.patch_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    jax.eval_shape(
      functools.partial(model.apply, train=False), variables, images
    )
    return variables

  @examples(400)
  @hypothesis.given(WEIGHTS)
  def run(data):
    path.write_bytes(data)
    found = abuse(load, data, folder=path, names=[str(path)])
    assert os.listdir(folder) == ["weights"]
    loaded.append(found is not None)
    leaves = jax.tree.leaves(found)
    assert all(isinstance(x, np.ndarray) for x in leaves)
    assert sum(x.nbytes for x in leaves) <= 2 * len(data)

  run()
  assert sum(loaded) > 10
  path.write_bytes(whole_files()[0])  # The process is as it was.
  assert jax.tree.all(jax.tree.map(np.array_equal, load(None), load(None)))


def test_every_odd_opcode(folder):
  """Beside a model's tensors, in both of PyTorch's formats, and alone."""
  path = folder / "weights"
  values = state()
  tensors = {k: tensor(str(i), x) for i, (k, x) in enumerate(values.items())}
  data = {str(i): x.tobytes() for i, x in enumerate(values.values())}
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


# --- Workdirs.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run of two steps, each saved, in which nothing moved."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  model, shapes = train.make_model(RUN, 10)
  tx, _ = train.make_optimizer(RUN, shapes, 64)
  state = train.init_state(RUN, model, tx, sharding.make_mesh())
  log = logger.Logger(workdir, RUN.to_json(), first_step=0, total_steps=2,
                      batch_size=32, active=True)  # fmt: skip
  log.classes([str(i) for i in range(10)])
  checkpointer = checkpoint.Checkpointer(workdir)
  for step in (1, 2):
    checkpointer.save(step, state.replace(step=state.step + step))
    log.log_eval(step, {"top1": 9.0, "top5": 50.0, "loss": 2.3, "count": 64})
  checkpointer.close()
  log.close("finished", 2)
  return workdir


RUN = common.digits_config(
  **{"data.train_split": "train[:64]", "data.eval_split": "test[:64]"},
  save_every=1,
  eval_every=1,
  log_every=1,
)


def tree(folder):
  """Every file's name and bytes."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


def test_checkpoints_hold_no_pickle(run, monkeypatch):
  files = {
    name: data
    for name, data in tree(run / "checkpoints").items()
    if data is not None
  }
  assert {name.split("/")[0] for name in files} == {"1", "2"}
  kinds = set()
  for name, data in files.items():
    base = Path(name).name
    if base in ("_CHECKPOINT_METADATA", "_METADATA", "_sharding") or (
      "array_metadatas" in name
    ):
      assert isinstance(json.loads(data), dict), name
      kinds.add("json")
    elif base == "commit_success.txt":
      assert data.decode().isprintable()
    else:  # Of tensorstore: a tree of keys, or arrays that zarr has packed.
      assert base == "manifest.ocdbt" or Path(name).parent.name == "d", name
      assert data[:4] == b"\x0c\xdb\x3a\x2a" or base != "manifest.ocdbt"
      kinds.add("ocdbt")
    for word in (b"builtin", b"reduce", b"numpy", b"copyreg", b"pickle"):
      assert word not in data, name
    assert not data.startswith(b"\x80"), name
  assert kinds == {"json", "ocdbt"}

  def refuse(*args, **kwargs):
    raise AssertionError("a pickle is read")

  for name in ("load", "loads", "_load", "_loads", "Unpickler", "_Unpickler"):
    monkeypatch.setattr(pickle, name, refuse)
  with guarded(run):
    _, variables, _ = weights.load_model(str(run))
    checkpointer = checkpoint.Checkpointer(run)
    shapes = jax.tree.map(np.zeros_like, variables)
    assert weights.fit(weights.load(run), shapes, "run").keys() == shapes.keys()
    checkpointer.close()


PLACES = st.integers(0, 10**6)
# Orbax, whose event loop is closed when they end; see `cli.run`.
leaves_reads_behind = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


SPOILT = st.one_of(
  st.sampled_from([
    b"", b"\xff" * 9, b"[" * 10**5, b"null", b"{}", b"[1]\n", b"\x00", b'"x"',
    b"9" * 5000, b'{"a": ' * 500, b"1e999", b'{"lock": 3}', b'{"starts": 3}',
    b'{"starts": []}', b'{"model": {}, "data": 3}', b'{"model": {"name": 3}}',
    b'{"step": 2}\n{"step": "x", "kind": "eval"}\n3\n{"kind": "eval"}',
    b'{"step": 2, "kind": "eval", "top1": "x"}',
  ]),
  st.binary(max_size=30),
)  # fmt: skip
PARTS = ["metrics.jsonl", "run.json", "classes.txt", *3 * ["config.json"]]
WAYS = [
  "delete",
  "cut",
  "flip",
  "odd",
  "folder",
  "loop",
  "extra",
  *3 * ["json"],
]


@st.composite
def damage(draw):
  """A function that spoils something in a workdir."""
  part = draw(st.sampled_from([*PARTS, *5 * ["checkpoints"]]))
  how = draw(st.sampled_from(WAYS))
  at, value, odd = draw(PLACES), draw(JSON_ODD), draw(SPOILT)

  def spoil(workdir):
    paths = [workdir / part]
    if part == "checkpoints":
      paths += sorted(paths[0].rglob("*"))
    path = paths[at % len(paths)]
    if how == "extra":
      (path.parent / ["\u00b2", "9", "-1", "x", "1"][at % 5]).write_bytes(odd)
    elif how in ("delete", "folder", "loop") or path.is_dir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
      if how in ("folder", "loop", "odd"):
        path.write_bytes(odd) if how == "odd" else make(how, path)
    elif how == "odd":
      path.write_bytes(odd)
    elif how == "json" and path.suffix == ".json":
      found = json.loads(path.read_text())
      inner = found
      while isinstance(inner, dict) and inner:
        name = sorted(inner)[at % len(inner)]
        last, inner = inner, inner[name]
      last[name] = value
      path.write_text(json.dumps(found))
    else:
      data = bytearray(path.read_bytes())
      if how == "cut":
        del data[at % (len(data) + 1) :]
      elif data:
        data[at % len(data)] ^= 1 << at % 8
      path.write_bytes(data)
    return f"{how} {path.relative_to(workdir)}"

  spoil.__name__ = f"{how}_{part}_{at}_{value}".replace(".", "_")
  return spoil


@leaves_reads_behind
def test_damaged_workdirs_are_read_or_refused(run, folder):
  """By what reads weights and records; none of it writes."""
  readable = []

  def load(workdir):
    weights.load_model(str(workdir))

  @examples(60)
  @hypothesis.given(st.lists(damage(), min_size=1, max_size=2))
  def each(spoilers):
    workdir = folder / "run"
    shutil.copytree(run, workdir, dirs_exist_ok=False)
    try:
      with contextlib.suppress(OSError):
        for spoil in spoilers:
          spoil(workdir)
      before = tree(workdir)
      model = abuse(weights.load_model, str(workdir), folder=folder,
                    names=[str(workdir)])  # fmt: skip
      records = abuse(workdir_lib.read_metrics, workdir, folder=folder,
                      names=[str(workdir)])  # fmt: skip
      abuse(workdir_lib.config_changes, RUN, workdir, (), folder=folder,
            names=[str(workdir)])  # fmt: skip
      assert all(record["step"] in (1, 2) for record in records or ())
      readable.append(model is not None)
      assert tree(workdir) == before
    finally:
      shutil.rmtree(workdir)

  each()
  assert 0 < sum(readable) < len(readable)


@pytest.mark.slow
@leaves_reads_behind
def test_damaged_workdirs_go_on_or_are_refused(folder, tmp_path):
  """By the trainer itself, which may set a damaged checkpoint aside."""
  run = tmp_path / "whole"
  wanted = jax.device_get(train.train_and_evaluate(RUN, run).params)

  @examples(25)
  @hypothesis.given(damage())
  def each(spoil):
    workdir = folder / "run"
    shutil.copytree(run, workdir)
    try:
      with contextlib.suppress(OSError):
        spoil(workdir)
      state = abuse(
        train.train_and_evaluate, RUN, workdir, folder=folder,
        names=[str(workdir)],
      )  # fmt: skip
      if state is not None:
        jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
    finally:
      shutil.rmtree(workdir)

  each()


# --- Real processes.


def drawn(strategy, count):
  """So many examples, the same in every run."""
  found = []

  @examples(count)
  @hypothesis.given(strategy)
  def collect(example):
    found.append(example)

  collect()
  return found[-count:]


@pytest.mark.slow
def test_forty_processes(run, begin, folder, tmp_path, monkeypatch):
  """Exit code 2 and one line of error, or 0; and nothing is left elsewhere."""
  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  sandbox = tmp_path / "sandbox"
  for name in ("home", "tmp", "cwd"):
    (sandbox / name).mkdir(parents=True)
  main_module, predict_module = "convmixer_jax.main", "convmixer_jax.predict"
  commands = [(main_module, [DIGITS, f"--flagfile={sandbox}/none"])]
  for good, bad in drawn(st.tuples(st.lists(GOOD, max_size=1), BAD), 60):
    words = [*good, bad]
    # The system hands over no NUL; what is accepted would train, for hours.
    if "\0" not in "".join(words) and begin(words) is None:
      commands.append((main_module, [DIGITS, *SMALL, *words]))
  del commands[15:]
  for i, data in enumerate(drawn(FILES, 8)):
    path = folder / f"config{i}.py"
    path.write_bytes(data)
    words = [f"--config={path}", *SMALL, "--config.epochs=1"]
    commands.append((main_module, words))
  photo = folder / "photo.png"
  photo.write_bytes(picture("RGB", "PNG"))
  for i, data in enumerate(drawn(WEIGHTS, 9)):
    path = folder / f"weights{i}"
    path.write_bytes(data)
    commands.append((predict_module, [f"--weights={path}", str(photo)]))
  for i, data in enumerate(drawn(IMAGES, 4)):
    path = folder / f"image{i}\udcff\n.jpg"
    path.write_bytes(data)
    commands.append((predict_module, [f"--weights={run}", str(path)]))
  for i, spoil in enumerate(drawn(damage(), 4)):
    path = folder / f"run{i}"
    shutil.copytree(run, path)
    spoil(path)
    commands.append((predict_module, [f"--weights={path}", str(photo)]))
  assert len(commands) == 40
  monkeypatch.setenv("XDG_CACHE_HOME", cache)
  monkeypatch.setenv("HOME", str(sandbox / "home"))
  monkeypatch.setenv("TMPDIR", str(sandbox / "tmp"))
  monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
  before = tree(sandbox)
  inside = set(os.listdir(folder))

  def attempt(numbered):
    number, (module, words) = numbered
    words = [os.fsencode(word) for word in words]
    if module == main_module:
      words.insert(0, f"--workdir={folder}/new{number}")
    process = common.run_main(*words, module=module, cwd=sandbox / "cwd")
    out, err = process.communicate(timeout=200)
    lines = err.splitlines()
    refused = (
      process.returncode == 2
      and len(lines) == 1
      and lines[0].startswith("error: ")
    )
    fine = refused or (process.returncode == 0 and "Traceback" not in err)
    return process.returncode, "" if fine else f"{words}\n{out}{err}"

  with futures.ThreadPoolExecutor(2) as pool:
    codes, wrong = zip(*pool.map(attempt, enumerate(commands)))
  assert not any(wrong), "\n".join(filter(None, wrong))
  assert codes.count(2) > 25
  assert tree(sandbox) == before
  made = set(os.listdir(folder)) - inside
  assert all(name.startswith("new") for name in made)
