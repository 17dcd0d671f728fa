"""Every config loads, passes the check and traces; mistakes get one line."""

import ast
from concurrent import futures
import contextlib
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import recipe as recipe_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from tests import common

CONFIGS = [
  "configs/digits.py",
  "configs/cifar10.py",
  "configs/cifar10.py:script100",
  "configs/cifar10.py:paper",
  "configs/cifar10.py:paper_wd1e-2",
  "configs/cifar10.py:keras",
  "configs/imagenet.py",
  "configs/imagenet.py:768_32",
  "configs/imagenet.py:1024_20",
]
# They differ from another one in sizes or the weight decay alone.
SLOW_CONFIGS = ("configs/imagenet.py:768_32", "configs/imagenet.py:1024_20",
                "configs/cifar10.py:paper_wd1e-2")  # fmt: skip


def test_no_config_is_missing_here():
  files = {
    str(p.relative_to(common.ROOT)) for p in common.ROOT.glob("configs/*.py")
  }
  assert files == {c.partition(":")[0] for c in CONFIGS}


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(path, marks=pytest.mark.slow) if path in SLOW_CONFIGS else path
    for path in CONFIGS
  ],
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
  ("model.norm", "group", "batch, layer"),
  ("model.remat", "everything", "nothing_saveable"),
  ("model.dtype", "float16", "float32, bfloat16"),
  ("model.bn_group_size", 7, "must divide the 64"),
  ("data.mean", (0.5,), "3 values"),
  ("data.std", (0.0, 1.0, 1.0), "3 values"),
  ("data.image_size", -8, "from 1 to 10000"),
  ("augment.crop_scale", (1.0, 0.5), "ascending"),
  ("augment.interpolation", "lanczos", "bilinear"),
  ("augment.label_smoothing", 1.5, "from 0"),
  ("augment.randaugment", "rand-m9", "inc is missing"),
  ("augment.randaugment", None, "a policy, or empty"),
  ("augment.erase_mode", "noise", "pixel, const"),
  ("augment.mix_group_size", 48, "must divide batch_size=64"),
  ("optim.schedule", "step", "onecycle, cosine, constant"),
  ("optim.warmup_epochs", 1.0, "onecycle has its own"),
  ("ema_decay", 1.0, "from 0"),
  ("optim.weight_decay", -1.0, "at least 0"),
  ("optim.betas", (0.9, 1.0), "2 values"),
  ("epochs", 0, "from 1 to 1000000"),
  ("batch_size", 60, "multiple of the 8"),
  ("accum_steps", 3, "must divide batch_size=64"),
  ("freeze", (1,), "strings"),
  ("backbone_lr_scale", float("nan"), "at least 0"),
  ("optim.learning_rate", float("inf"), "at least 0"),
  ("seed", 2**32, "from 0 to 4294967295"),
  ("model.patch_size", 9, "larger than data.image_size=8"),
  ("model.name", "convmixer_256_9", "nearest is convmixer_256_8"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_check_refuses(field, value, says):
  config = common.load_config("configs/digits.py")
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=says) as e:
    config_lib.check(config, num_devices=8)
  assert field in str(e.value)
  assert "\n" not in str(e.value)


def test_check_refuses_missing_and_unknown_fields():
  config = common.load_config("configs/digits.py")
  with config.unlocked():
    del config.optim.eps
  with pytest.raises(UserError, match=r"config.optim.eps: missing"):
    config_lib.check(config, 1)
  config = common.load_config("configs/digits.py")
  with config.unlocked():
    config.model.heads = 3
  with pytest.raises(UserError, match=r"config.model.heads=3: no such field"):
    config_lib.check(config, 1)


def test_flatten():
  config = ml_collections.ConfigDict({"a": 1, "b": {"c": {"d": (2, 3)}}})
  assert config_lib.flatten(config) == {"a": 1, "b.c.d": (2, 3)}


# Command lines, and what the one line of error must say.
DIGITS = "--config=configs/digits.py"
MISTAKES = [
    ([], "--config is missing; try"),
    (["--config=configs/none.py"], "configs/none.py"),
    (["--config=configs/imagenet.py:99"], "1536_20, 768_32, 1024_20"),
    ([DIGITS, "--config.batchsize=3"], "batchsize=3: no such field"),
    ([DIGITS, "--config.modle.dim=3"], "nearest is model.dim"),
    ([DIGITS, "--config.batch_size=many"], "integer from 1 to"),
    ([DIGITS, "--config.epochs=1.5"], "integer from 1 to"),
    ([DIGITS, "--config.deterministic=7"], "true or false"),
    ([DIGITS, "--config.batch_size=30"], "multiple of the 4 devices"),
    ([DIGITS, "--config.model.kernel_size=0"], "config.model.kernel_size=0"),
    ([DIGITS, "--config.model.patch_size=9"], "larger than data.image_size=8"),
    ([DIGITS, "--config.model.name=convmixer_1"], "nearest is convmixer_1"),
    ([DIGITS, "--config.data.name=digit"], "nearest are digits"),
    ([DIGITS, "--config.data.name=folder", "--config.data.dir=no/where"],
     "data.dir=no/where: no such directory"),
    ([DIGITS, "--config.data.train_split=trian"], "has train, test"),
    ([DIGITS, "--mode=test"], "train|eval"),
    ([DIGITS, "--mode=eval"], "holds no checkpoints"),
    ([DIGITS, "--wrokdir=x"], "wrokdir"),
    ([DIGITS, "extra"], "extra: not a flag"),
    (["--config.seed=1", DIGITS], "config.seed"),
  ([DIGITS, "--process_id=1"], "need --distributed"),
  ([DIGITS, "--distributed"], "--distributed: no cluster"),
  ([DIGITS, "--workdir=README.md/x"], "--workdir=README.md/x: Not a directory"),
  ([DIGITS, "--workdir=gs://b/r"], "mount the bucket"),
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


@pytest.mark.parametrize(
  ("module", "flags"),
  [
    (
      "convmixer_jax.main",
      "config workdir mode distributed coordinator num_processes process_id"
      " timeout accept_changes",
    ),
    (
      "convmixer_jax.plan",
      "config topology find_batch num_images num_classes json",
    ),
    ("convmixer_jax.preview", "config out step num"),
    ("convmixer_jax.predict", "weights model top batch_size json"),
    ("convmixer_jax.export", "weights model out"),
    ("examples.segmentation", "weights out steps"),
    ("experiments.run", "root only dry_run jobs"),
    (
      "experiments.slurm",
      "root partition nodes gpus cpus hours parallel sbatch",
    ),
    ("experiments.tables", "root format"),
    ("experiments.report", "root out figures"),
    (
      "experiments.pictures",
      "workdir out against blocks num_images batch_size data_dir",
    ),
    ("benchmarks.augment", "config repeats step"),
    ("benchmarks.decode", "photos repeats json"),
    (
      "benchmarks.throughput",
      "model patch_size kernel_size image_size num_classes batch dtype mode"
      " implementation against repeats json profile",
    ),
  ],
)
def test_help_explains_every_flag(module, flags):
  code, out, err = common.call(module, "--help")
  assert code == 0, err
  for flag in flags.split():
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


# --- The import rule: every module may import those in the rows before its own,
# and others of its own row only where it is a package.

LAYERS = (
  ("errors",),
  ("ops", "augment", "optim", "sharding"),
  ("models",),
  ("step", "torch_pickle"),
  ("interop",),
  ("config",),
  ("workdir", "distributed", "runtime", "checkpoint"),
  ("logger",),
  ("weights", "data"),
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
  folders = (
    "convmixer_jax",
    "configs",
    "experiments",
    "benchmarks",
    "examples",
  )
  for folder in folders:
    for path in sorted((common.ROOT / folder).rglob("*.py")):
      tree = ast.parse(path.read_text())
      names = {}  # Local name -> module, for modules of ours.
      for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
          for alias in node.names:
            full = f"{node.module}.{alias.name}"
            if not full.startswith(folders):
              continue
            assert not alias.name.startswith("_"), f"{path}: imports {full}"
            names[alias.asname or alias.name] = full
            file = common.ROOT / (full.replace(".", "/") + ".py")
            if file.exists():
              is_command = "cli.run(" in file.read_text()
              is_command &= file.name != "cli.py"
              assert not is_command, f"{path}: imports the command {full}"
        elif isinstance(node, ast.Attribute):
          value = node.value
          if isinstance(value, ast.Name) and value.id in names:
            private = node.attr.startswith("_") and node.attr[1] != "_"
            assert not private, f"{path}: uses {names[value.id]}.{node.attr}"


def test_the_longest_module():
  for folder in ("convmixer_jax", "configs", "experiments", "benchmarks"):
    for path in (common.ROOT / folder).rglob("*.py"):
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
  out = subprocess.run(
    [sys.executable, "-c", code],
    cwd=common.ROOT,
    capture_output=True,
    text=True,
  )
  assert out.stdout.strip() == "[]", out.stdout + out.stderr


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
