"""Every config loads, passes the check and traces; mistakes get one line."""

import ast
from concurrent import futures
import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import errors
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from tests import common

CONFIGS = str.split("""
configs/digits.py configs/cifar10.py configs/cifar10.py:script100
configs/cifar10.py:paper configs/cifar10.py:keras configs/imagenet.py
configs/imagenet_small.py configs/imagenet_small.py:64 configs/folder.py""")
# They differ from another one in sizes or the weight decay alone.
SLOW_CONFIGS = str.split("""configs/cifar10.py:paper_wd1e-2
configs/imagenet.py:768_32 configs/imagenet.py:1024_20
configs/folder.py:finetune""")


def test_no_config_is_missing_here():
  files = {
    str(p.relative_to(common.ROOT)) for p in common.ROOT.glob("configs/*.py")
  }
  assert files == {c.partition(":")[0] for c in CONFIGS}


@pytest.mark.parametrize(
  "path",
  [*CONFIGS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_CONFIGS)],
)
def test_configs_trace_one_step_on_their_real_shapes(path):
  config = common.load_config(path)
  config_lib.check(config, num_devices=8)
  assert set(config_lib.flatten(config)) == set(config_lib.FIELDS)
  config.model.scan = True  # It is traced sooner.
  classes = 1000 if "imagenet" in path else 10
  size = config.data.image_size
  data = sources.Description(1000, classes, (size, size, 3), size)
  recipe = recipe_lib.build(config, data, jax.devices()[:1])
  assert recipe.model.dtype == jnp.dtype(config.model.dtype or "float32")
  state = jax.eval_shape(recipe.init_state)
  seed = jax.ShapeDtypeStruct((), jnp.uint32)
  new_state, metrics = jax.eval_shape(
    recipe.train_step, seed, state, recipe.batch_shapes()
  )
  assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
  assert metrics["loss"].shape == ()


# Values that no config may have, and what the message must name.
BAD = [
  ("model.kernel_size", 0, "from 1 to 1000"),
  ("model.kernel_size", 2.5, "integer"),
  ("model.activation", "swish", "gelu, relu"),
  ("model.heads", 3, "no such field"),
  ("model.bn_group_size", 7, "must divide the 64"),
  ("data.mean", (0.5,), "3 values"),
  ("data.std", (0.0, 1.0, 1.0), "3 values"),
  ("augment.crop_scale", (1.0, 0.5), "ascending"),
  ("augment.randaugment", "rand-m9", "inc is missing"),
  ("augment.randaugment", None, "a policy, or empty"),
  ("augment.mix_group_size", 48, "must divide batch_size=64"),
  ("optim.warmup_epochs", 1.0, "onecycle has its own"),
  ("ema_decay", 1.0, "from 0"),
  ("optim.weight_decay", -1.0, "at least 0"),
  ("batch_size", 60, "multiple of the 8"),
  ("accum_steps", 3, "must divide batch_size=64"),
  ("freeze", (1,), "strings"),
  ("backbone_lr_scale", float("nan"), "at least 0"),
  ("optim.learning_rate", float("inf"), "at least 0"),
  ("seed", 2**32, "from 0 to 4294967295"),
  ("model.patch_size", 9, "larger than data.image_size=8"),
  ("model.name", "convmixer_256_9", "are convmixer_256_8,"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_check_refuses(field, value, says):
  config = common.load_config("configs/digits.py")
  section, _, name = field.rpartition(".")
  with config.unlocked(), config.ignore_type():
    (config[section] if section else config)[name] = value
  with pytest.raises(UserError, match=says) as e:
    config_lib.check(config, num_devices=8)
  assert field in str(e.value)
  assert "\n" not in str(e.value)


def test_check_refuses_a_missing_field():
  config = common.load_config("configs/digits.py")
  with config.unlocked():
    del config.optim.eps
  with pytest.raises(UserError, match=r"config.optim.eps: missing"):
    config_lib.check(config, 1)


# Command lines, and what the one line of error must say.
DIGITS = "--config=configs/digits.py"
MISTAKES = [
  ([], "holds no run to go on with; pass --config to start one"),
  (["--workdir="], "--config is missing, and no --workdir holds a run; try"),
  (["--config=configs/digits.py", "--workdir="], "--workdir: is empty"),
  (["--config=configs/none.py"], "configs/none.py"),
  (["--config=configs/imagenet.py:99"], "1536_20, 768_32, 1024_20"),
  ([DIGITS, "--config.batchsize=3"], "batchsize=3: no such field"),
  ([DIGITS, "--config.modle.dim=3"], "nearest is model.dim"),
  ([DIGITS, "--config.batch_size=many"], "integer from 1 to"),
  ([DIGITS, "--config.deterministic=7"], "true or false"),
  ([DIGITS, "--config.batch_size=None"], "an integer from 1 to"),
  ([DIGITS, "--config.model.heads=2"], "no such field: heads; leave it None"),
  ([DIGITS, "--config.batch_size=30"], "multiple of the 4 devices"),
  ([DIGITS, "--config.data.name=digit"], "nearest are digits"),
  ([DIGITS, "--config.data.train_split=trian"], "has train, test"),
  ([DIGITS, "--mode=test"], "train|eval"),
  ([DIGITS, "--mode=eval"], "holds no checkpoints"),
  (["--workdir=tests"], "tests/config.json: No such file"),
  ([DIGITS, "--wrokdir=x"], "wrokdir"),
  ([DIGITS, "extra"], "extra: not a flag"),
  (["--config.seed=1", DIGITS], "config.seed"),
  (["--config.seed=1"], "--config.seed: needs a --config before it"),
  (["--config=none.json"], "--config=none.json: no such file"),
  ([DIGITS, "--process_id=1"], "need --distributed"),
  ([DIGITS, "--distributed"], "--distributed: no cluster"),
  ([DIGITS, "--workdir=README.md/x"], "--workdir=README.md/x: Not a directory"),
  ([DIGITS, "--workdir=s3://b/r"], "on a disk or in gs:// only"),
  ([DIGITS, "--workdir=caf\udce9"], "must be UTF-8"),
]  # fmt: skip


@pytest.mark.slow
def test_mistakes_get_one_line_and_exit_code_2(tmp_path):
  workdir = tmp_path / "workdir"
  with futures.ThreadPoolExecutor(2) as pool:

    def attempt(mistake):
      args, says = mistake
      process = common.run_main(f"--workdir={workdir}", *args, devices=4)
      out, err = process.communicate(timeout=120)
      problems = []
      if process.returncode != 2:
        problems.append(f"exit code {process.returncode}")
      if says not in err or not err.startswith("error: "):
        problems.append(f"does not say {says!r}")
      if len(err.strip().splitlines()) != 1 or out:
        problems.append("is not one line")
      return f"{args}: {problems}\n{out}{err}" if problems else ""

    wrong = [text for text in pool.map(attempt, MISTAKES) if text]
  assert not wrong, "\n".join(wrong)
  assert not workdir.exists()


def parse(monkeypatch, *argv):
  """The config of a command line."""
  command = cli.Flags()
  config = command.define_config()
  monkeypatch.setattr("sys.argv", ["main", *argv])  # config_flags reads it.
  cli.parse_flags(["main", *argv], command)
  return config.value


def test_fields_take_none_from_the_command_line(monkeypatch):
  optional = [
    field
    for field, (_, rule, _) in config_lib.FIELDS.items()
    if rule.accepts(None)
  ]
  none = [f"--config.{field}=None" for field in optional]
  config = parse(monkeypatch, DIGITS, *none)
  values = config_lib.flatten(config)
  assert "model.kernel_size" in optional
  assert all(values[field] is None for field in optional)
  config_lib.check_values(values, "")


@pytest.mark.parametrize("kind", ["", ":ConfigDict"])
def test_a_config_states_what_differs(tmp_path, monkeypatch, kind):
  """A file anywhere, with a file beside it; flags set what it leaves out."""
  (tmp_path / "beside_it.py").write_text("DIM = 24\n")
  (tmp_path / "x.py").write_text(
    "import beside_it\nimport ml_collections\n"
    "def get_config(kind='dict'):\n"
    "  model = {'dim': beside_it.DIM, 'scan': True}\n"
    "  own = {'model': model, 'optim': {'betas': [0.5, 0.9]}, 'epochs': 2}\n"
    "  return own if kind == 'dict' else ml_collections.ConfigDict(own)\n"
  )
  monkeypatch.setenv("HOME", str(tmp_path))
  config = parse(
    monkeypatch, f"--config=~/x.py{kind}", "--config.optim.eps=0.5",
    "--config.model.depth=3", "--config.model.scan=false",
  )  # fmt: skip
  assert str(tmp_path) not in sys.path
  assert config.is_locked
  default = config_lib.flatten(config_lib.defaults())
  assert config_lib.flatten(config) == default | {
    "model.dim": 24,
    "model.scan": False,
    "optim.betas": (0.5, 0.9),
    "epochs": 2,
    "optim.eps": 0.5,
    "model.depth": 3,
  }
  config_lib.check(config, 1)


@pytest.mark.parametrize(
  ("returns", "says"),
  [
    ("{'modle': {'dim': 3}}", "modle.dim=3: no such field; nearest is model.d"),
    (
      "{'model': {'kernel_size': 0}}",
      "model.kernel_size=0: must be an integer",
    ),
    ("{'model': 3}", "model=3: no such field; nearest is model."),
    ("None", "get_config() gives a NoneType, neither dict nor"),
  ],
)
def test_a_config_that_states_a_mistake(tmp_path, returns, says):
  path = tmp_path / "x.py"
  path.write_text(f"def get_config():\n  return {returns}\n")
  code, out, err = common.call("convmixer_jax.main", f"--config={path}")
  assert (code, out) == (2, "")
  assert err.startswith(f"error: --config={path}: {says}"), err
  assert len(err.splitlines()) == 1


def test_too_little_memory_is_one_line():
  text = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAnd more."
  said = str(errors.of_jax(RuntimeError(text)))
  assert said.startswith("out of memory: take a smaller batch"), said
  assert said.endswith(
    "(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)"
  )
  assert errors.of_jax(RuntimeError("something else")) is None


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
  for module, *flags in (
    ("convmixer_jax.main", DIGITS, f"--workdir={tmp_path / 'run'}"),
    ("convmixer_jax.plan", DIGITS),
    ("benchmarks.throughput", "--model=convmixer_128_4", "--batch=2"),
  ):
    process = common.run_main(
      *flags, module=module, environment={"JAX_PLATFORMS": "nonsense"}
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.startswith("error: JAX_PLATFORMS=nonsense: Unable to init"), err
    assert len(err.splitlines()) == 1, err
  assert not (tmp_path / "run").exists()


FOLDERS = ("convmixer_jax", "configs", "experiments", "benchmarks", "examples")
FILES = [p for x in FOLDERS for p in sorted((common.ROOT / x).rglob("*.py"))]
COMMANDS = [
  str(path.relative_to(common.ROOT))
  for path in FILES
  if "cli.run(" in path.read_text() and path.name != "cli.py"
]


@pytest.mark.parametrize("path", COMMANDS)
def test_help_explains_every_flag(path):
  module = path.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
  code, out, err = common.call(module, "--help")
  assert code == 0, err
  flags = [*runpy.run_path(str(common.ROOT / path))["_FLAGS"]]
  assert flags
  for flag in flags:
    # Its explanation holds an example of it.
    explanation = out.split(f"\n--{flag}\n")[1].split("\n--")[0]
    assert re.search(f"--(no)?{flag}", explanation), flag


@pytest.mark.parametrize("only_prints", [True, False])
def test_output_that_nobody_reads_ends_no_work(monkeypatch, only_prints):
  read, write = os.pipe()
  os.close(read)
  for name in ("stdout", "stderr"):
    stream = os.fdopen(write, "w", closefd=False)
    monkeypatch.setattr(sys, name, stream)
  cli.guard_output(only_prints)
  for stream in (sys.stderr, sys.stdout):
    with contextlib.ExitStack() as stack:
      if only_prints and stream is sys.stdout:
        error = stack.enter_context(pytest.raises(SystemExit))
      print("a line", file=stream, flush=True)
  print("more, as Python writes when it ends", flush=True)
  assert not only_prints or error.value.code == 128 + signal.SIGPIPE
  os.close(write)


def test_output_that_is_lost_is_an_error(monkeypatch):
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", None)  # As after 2>&-.
    cli.guard_output(only_prints=False)
    print("a line", file=sys.stderr)
    with pytest.raises(UserError, match="standard output: No space left"):
      print("a line", flush=True)


@pytest.mark.parametrize("command", ["convmixer_jax.main", "experiments.run"])
def test_ctrl_c_while_modules_are_imported(tmp_path, command):
  """It ends the command, in silence."""
  (tmp_path / "ml_collections.py").write_text(
    "import os, signal, time\n"
    "os.kill(os.getpid(), signal.SIGINT)\n"
    "time.sleep(60)\n"
  )
  process = subprocess.run(
    [sys.executable, "-m", command, "--help"],
    cwd=common.ROOT,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (process.returncode, process.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
  "args", [["lib.py"], ["lib.py", "-m", "experiments.run"]]
)
def test_a_library_leaves_signals_alone(tmp_path, args):
  (tmp_path / "lib.py").write_text(
    "import signal, convmixer_jax\n"
    "assert signal.getsignal(2) is signal.default_int_handler\n"
  )
  env = os.environ | {"PYTHONPATH": str(common.ROOT)}
  subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, check=True)


# --- The import rule: every module may import those in the rows before its own,
# and others of its own row only where it is a package.

LAYERS = (
  ("errors", "peaks"),
  ("buckets",),
  ("files", "imports", "sheet"),
  ("ops", "writers"),
  ("augment", "optim", "sharding"),
  ("models", "runtime"),
  ("step", "torch_pickle"),
  ("interop",),
  ("rules",),
  ("config",),
  ("workdir", "distributed", "checkpoint", "classes"),
  ("logger",),
  ("weights", "data"),
  ("best",),
  ("recipe",),
  ("evaluate",),
  ("train",),
  ("cli",),
  ("main", "predict", "export", "preview", "replay", "plan"),
)


def imported_modules(path):
  """Every module that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


def package_files():
  for path in sorted((common.ROOT / "convmixer_jax").rglob("*.py")):
    part = path.relative_to(common.ROOT / "convmixer_jax").parts[0]
    yield path, part.removesuffix(".py")


def test_imports_go_one_way():
  rank = {part: i for i, row in enumerate(LAYERS) for part in row}
  for path, part in package_files():
    if part == "__init__":
      continue
    assert part in rank, f"{path}: has no rule"
    for module in imported_modules(path):
      package, _, rest = module.partition(".")
      sibling = rest.partition(".")[0]
      if package == "convmixer_jax":
        lower = rank[sibling] < rank[part]
        assert lower or sibling == part, f"{path}: imports {module}"
      assert package not in ("experiments", "benchmarks", "tests"), path
  for path in common.ROOT.glob("configs/*.py"):
    for module in imported_modules(path):
      allowed = ("ml_collections", "convmixer_jax.config")
      assert module.startswith(allowed), f"{path}: imports {module}"


def test_nobody_imports_private_names_or_commands():
  for path in FILES:
    tree = ast.parse(path.read_text())
    names = {}  # Local name -> module, for modules of ours.
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          full = f"{node.module}.{alias.name}"
          if not full.startswith(FOLDERS):
            continue
          assert not alias.name.startswith("_"), f"{path}: imports {full}"
          names[alias.asname or alias.name] = full
          command = full.replace(".", "/") + ".py" in COMMANDS
          assert not command, f"{path}: imports the command {full}"
      elif isinstance(node, ast.Attribute):
        value = node.value
        if isinstance(value, ast.Name) and value.id in names:
          private = node.attr.startswith("_") and node.attr[1] != "_"
          assert not private, f"{path}: uses {names[value.id]}.{node.attr}"


def test_the_longest_module():
  for path in FILES:
    assert len(path.read_text().splitlines()) <= 350, path


def test_config_page_is_current():
  page = (common.ROOT / "docs" / "config.md").read_text()
  assert page == config_lib.markdown(), "run make docs"


def test_only_checkpoint_names_orbax():
  users = [
    path.name
    for path, _ in package_files()
    if any(m.startswith("orbax") for m in imported_modules(path))
  ]
  assert users == ["checkpoint.py"]


def test_the_model_and_the_step_need_no_data_library():
  """They run where only jax, flax, optax and ml_collections are installed."""
  heavy = "tensorflow tensorflow_datasets grain torch orbax clu sklearn PIL"
  code = (
    "import sys, convmixer_jax.models, convmixer_jax.step, convmixer_jax.ops,"
    " convmixer_jax.augment, convmixer_jax.optim, convmixer_jax.sharding\n"
    f"print([m for m in {heavy.split()} if m in sys.modules])"
  )
  assert common.run_python(code).stdout.strip() == "[]"


# --- The compilation cache.

COMPILES = """
import jax
from convmixer_jax import runtime
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
runtime.keep_compiled()
jax.jit(lambda x: 3 * x)(1.0)
"""


def compile_with(cache, **more):
  """Compiles in a fresh process, for which every warning is an error."""
  env = os.environ | {"XDG_CACHE_HOME": str(cache)}
  del env["JAX_COMPILATION_CACHE_DIR"]
  return subprocess.run(
    [sys.executable, "-W", "error", "-c", COMPILES],
    cwd=common.ROOT,
    env=env | more,
    check=True,
  )


def test_compiled_programs_are_kept_for_the_user(tmp_path):
  compile_with(tmp_path)
  (folder,) = (tmp_path / "convmixer_jax" / "xla").iterdir()
  assert folder.name.endswith(f"-{len(os.sched_getaffinity(0))}")
  assert list(folder.glob("jit__lambda-*-cache"))
  compile_with(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
  assert list((tmp_path / "own").glob("jit__lambda-*-cache"))
  # Where nothing can be written a run goes on without.
  (tmp_path / "file").touch()
  compile_with(tmp_path / "file")


def test_a_field_that_an_older_run_lacks_has_its_default(tmp_path):
  config = common.digits_config(**{"optim.eps": 0.5}).to_dict()
  del config["model"]["implementation"], config["freeze"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  loaded = workdir_lib.load_config(tmp_path)
  assert loaded.model.implementation is None
  assert loaded.freeze == ()
  assert loaded.optim.eps == 0.5
  del config["model"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"config.model.name: missing"):
    workdir_lib.load_config(tmp_path)
