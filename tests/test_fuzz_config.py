"""Abuse of --config: overrides, and config files, which are programs."""

import contextlib
import functools
import importlib
import os
from pathlib import Path
import sys
import types

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import main
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import step as step_lib
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from tests import common
from tests.fuzzing import abuse
from tests.fuzzing import examples
from tests.fuzzing import make

pytestmark = pytest.mark.usefixtures("little_memory")

# --- Overrides.

NUMBERS = st.one_of(
  st.integers(-3, 40),
  st.sampled_from([2**16, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 10**30]),
  st.sampled_from([0.0, 0.5, 1.0, -0.1, 1e-12, 1e-300, 1e30, 1e38, 1e300]),
  st.floats(),
)
WORDS = st.one_of(
  st.text(max_size=20),
  st.sampled_from(str.split(r"""
    digits folder cifar10 train test train[:1%] val gelu batch bfloat16
    cosine
    random nothing_saveable convmixer_128_4 rand-m9-inc1 head
    torchvision-n2-m12 None true train[-1:] train[5:2] train[::2]
    train[abs:] train[:1e3] hf-hub:a/b/c kaggle:y a/b:1.0.0 mnist:9.9.9
    ../.. ~nobody/x /dev/zero /proc/self/mem http://x/y gs://x $(id) `id`
    ;id >x %s {0} \x00 \ ' ''' --seed -1 0x10 0o17 1_000 1e3 ١٢ ² NaN -inf
    1e999 1j""")),
  st.sampled_from(["", " ", "\n", "a\nb", "\x00", "\u2028", "9" * 5000,
    "0x" + "f" * 5000, "(" * 500, "1," * 999, "lambda: 0", "\udcff\udc80",
    "__import__('os')", "\U0001f600", "(1, 'a"]),
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
VALUES = st.one_of(NUMBERS.map(repr), WORDS, LITERALS.map(repr))
# The edges of what one field or another accepts.
POOL = (
  0, 1, 2, 3, 5, 8, 16, 64, 1000, 10**4, 10**5, 10**6, 2**20, 2**31, 2**32 - 1,
  0.0, 1e-12, 1e-3, 0.25, 0.999999, 1.0, 7.5, 1e30, 1e300, True, False, None,
  "", "digits", "no_such_set", "train", "train[-1:]", "test+train[5:9]", "gelu",
  "relu", "batch", "layer", "nothing_saveable", "bfloat16",
  "random", "bicubic", "convmixer_1536_20", "convmixer_128_4", "pixel", "const",
  "rand-m9-mstd0.5-inc1", "torchvision-n2-m12", "cosine", "onecycle",
  "constant", (), (0.001, 1.0), (1.0, 1.0), (0.02, 0.02), (0.9, 0.0),
  (100.0, 100.0), (0.01, 100), (0, 0), (0, 0, 0), (1.0, 0.001, 0.5), ("head",),
  ("stem", "block_0/depthwise"), ("block_9",), ("",),
)  # fmt: skip
FIELDS = st.sampled_from(sorted(config_lib.FIELDS))
SET = "--config.{}={}".format
GOOD = FIELDS.flatmap(  # As far as the field alone tells.
  lambda field: st.builds(
    SET,
    st.just(field),
    st.sampled_from(
      [
        v
        for v in POOL
        if config_lib.FIELDS[field].rule.accepts(v)
        and not (field == "model.depth" and v and v > 8)  # Slow to trace.
      ]
    ),
  )
)
BAD = st.one_of(
  st.builds(SET, FIELDS, VALUES),
  st.builds(SET, WORDS, VALUES),
  st.builds(
    SET, st.sampled_from(["model", "data", "augment", "", "."]), VALUES
  ),
  st.builds("-config.{}={}".format, FIELDS, VALUES),
  st.builds("--{}config.{}".format, st.sampled_from(["", "no"]), FIELDS),
  st.builds("--config.{}[{}]={}".format, FIELDS, VALUES, VALUES),
  st.builds("--config.{}.{}={}".format, FIELDS, WORDS, VALUES),
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
  build, init_state = recipe_lib.build, step_lib.init_state

  def keep_recipe(config, *args):
    begun.config, begun.recipe = config, build(config, *args)
    return begun.recipe

  def keep_state(*args):
    begun.state = init_state(*args)
    return begun.state

  def stop(*workdir):
    raise Traced

  monkeypatch.setattr(recipe_lib, "jax", NothingComputes())
  monkeypatch.setattr(recipe_lib, "build", keep_recipe)
  monkeypatch.setattr(workdir_lib, "locked", stop)
  monkeypatch.setattr(step_lib, "init_state", keep_state)
  # The data set by default is not on every machine.
  field = config_lib.FIELDS["data.name"]._replace(default="digits")
  monkeypatch.setitem(config_lib.FIELDS, "data.name", field)

  def run(argv):
    monkeypatch.setattr(sys, "argv", argv)
    importlib.reload(main)  # Fresh flags.
    sys.modules.pop("config_config", None)  # What ml_collections loaded last.
    if stray := cli.parse_flags(argv, main._FLAGS)[1:]:
      raise UserError(f"{stray[0]}: not a flag")  # As cli.run does.
    with contextlib.suppress(Traced):
      main.main()
      return None  # --mode=eval
    shape, seed = jax.ShapeDtypeStruct, np.uint32(0)
    state = jax.tree.map(lambda x: shape(x.shape, x.dtype), begun.state)
    batch = begun.recipe.batch_shapes()
    new_state, metrics = begun.recipe.train_step(seed, state, batch)
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
  @examples(80)
  @hypothesis.given(
    st.lists(GOOD, max_size=2), st.lists(BAD, min_size=1, max_size=2)
  )
  def run(good, bad):
    begin([*good, *bad])

  run()


@pytest.mark.parametrize(
  "count", [12, pytest.param(80, marks=pytest.mark.slow)]
)
def test_what_passes_the_check_traces(begin, count):
  """Values at the edges of what each field accepts, up to three together."""
  accepted = []

  @examples(count)
  @hypothesis.given(st.lists(GOOD, min_size=1, max_size=3))
  @hypothesis.example(["--config.data.image_size=10000"])  # > 2**31 pixels.
  def run(overrides):
    accepted.append(bool(begin(overrides)))

  run()
  assert sum(accepted) > count / 4


# --- Config files.

WHOLE = Path(common.ROOT, "configs", "digits.py").read_text()
RETURNS = str.split("""
    None 0 () {} 'x' object get_config ... {'model':1} config.model
config.to_dict() [config] config_dict.FrozenConfigDict(config)
config_dict.ConfigDict() config_dict.ConfigDict({'model':{}})
config_dict.ConfigDict({'a.b':1}) config_dict.placeholder(int)""")
FIELD_VALUES = r"""
None 10**5000 float('nan') float('inf') 'x'*10**5 b'x' [] {} object() print
[1]*10**5 'a\nb' '\0' '\ud800' 1j (1,)*3 __import__('numpy').ones(3)
__import__('numpy').float32(1) [[[]]] config.model {'a':{'b':1}} True 0 1.0
config_dict.placeholder(int) type('A',(),{'__repr__':lambda_s:1/0})()
type('A',(int,),{})(3) type('A',(str,),{})('x') lambda:0
""".replace("lambda_s", "lambda s").split()
STATEMENTS = [
  "raise SystemExit", "raise SystemExit('bye\\nbye')", "raise RecursionError",
  "import sys; sys.exit(0)", "raise StopIteration", "raise GeneratorExit",
  "raise BaseException('a\\nb')", "raise MemoryError", "raise KeyError('')",
  "import no_such_module", "raise OSError(2, 'x\\ny', 'z')", "get_config()",
  "raise ExceptionGroup('a', [ValueError('b')])", "raise ValueError('\\n')",
  "raise Exception(10**5000)", "raise UnicodeDecodeError('x', b'', 0, 1, 'y')",
  "1 / 0", "yield 1", "return", "return 1, 2", "config.x = config",
  "config = 3", "config.lock()", "del config.model", "config.update({'a': 1})",
  "config.model.scan = config.data", "config['a b\\nc'] = 1", "(" * 300,
  "config.__dict__.clear()", "'" * 7, "\x00", "\tif", "raise warnings.warn",
  "async def x(): await", "class get_config: pass",
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
assert WHOLE.endswith(AT_END)


def with_lines(*lines):
  """The whole file with more lines in get_config."""
  lines = "".join(f"  {line}\n" for line in lines)
  text = WHOLE.removesuffix(AT_END) + lines + AT_END
  return text.encode(errors="surrogatepass")


FILES = st.one_of(
  st.lists(BODIES, min_size=1, max_size=2).map(lambda x: with_lines(*x)),
  BODIES.map(lambda x: f"{WHOLE}\n{x}\n".encode(errors="surrogatepass")),
  st.integers(0, len(WHOLE) - 1).map(lambda n: WHOLE[:n].encode()),
  st.binary(max_size=200),
  st.sampled_from([b"", b"\xff\xfe", b"def get_config(): pass",
    b"get_config = 3", b"def get_config(a, b): pass", b"#" * 10**6,
    b"def get_config(): return get_config()", b"def get_config(*a): return a",
    b"# coding: nope\n", b"x = " + b"[" * 10**5, b"from x import *",
    b"class get_config: x = 1", b"async def get_config(): pass"]),
)  # fmt: skip


def test_config_files(begin, folder):
  path = folder / "config.py"

  @examples(80)
  @hypothesis.given(FILES, st.sampled_from(["", ":", ":x", ":a:b", ":\n"]))
  def run(data, variant):
    path.write_bytes(data)
    begin([], f"--config={path}{variant}", names=["."])  # A field, or the file.

  run()


def test_every_odd_config(begin, folder):
  """Each value in one field or other, each statement, each result."""
  path = folder / "config.py"
  bodies = [*STATEMENTS, *map("return {}".format, RETURNS)]
  for i, value in enumerate(FIELD_VALUES):
    for field in sorted(config_lib.FIELDS)[i % 30 :: 30]:
      bodies.append(f"config.{field} = {value}")
  for body in bodies:
    path.write_bytes(with_lines(body))
    begin([], f"--config={path}", names=["."])


def test_what_is_no_config_file(begin, folder):
  for kind in ("absent", "folder", "loop", "fifo", "empty"):
    path = folder / f"{kind}.py"
    make(kind, path)
    assert begin([], f"--config={path}", names=[str(path)]) is None
  assert begin([], "--config=", names=["--config="]) is None
