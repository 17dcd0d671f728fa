"""Code of one's own, without a change of this project: models and sweeps."""

import json
import os
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from convmixer_jax import evaluate
from convmixer_jax import imports
from convmixer_jax import models
from convmixer_jax import plan
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from experiments import scores
from experiments import slurm
from experiments import sweeps
from tests import common

MODEL = """
import flax.linen as nn
import jax.numpy as jnp

import sizes


class Linear(nn.Module):
  width: int  # No field of a config.
  num_classes: int
  patch_size: int = 4
  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, images, train):
    p = self.patch_size
    x = nn.Conv(self.width, (p, p), p, "VALID", name="patches")(images)
    return nn.Dense(self.num_classes, name="head")(nn.gelu(x).mean((1, 2)))

  def check(self, image_size):
    pass


MODEL = Linear
VARIANTS = {"wide": {"width": sizes.WIDTH}, "narrow": {"width": 4}}
"""
PARTS = {
  "infer": """
def infer(params):
  if "patches" not in params:
    return None
  patch, _, _, width = params["patches"]["kernel"].shape
  classes = params["head"]["bias"].size
  return {"width": width, "patch_size": patch, "num_classes": classes}
""",
  "TORCH_NAMES": """
TORCH_NAMES = ("patch_embed", "patches", "conv"), ("fc", "head", "linear")
""",
  "flops": """
def flops(model, image_size):
  return 6 * image_size**2 * model.width
""",
}
CONFIG = """
def get_config(patch="4"):
  return {
    "model": {"name": "mine:wide", "patch_size": int(patch)},
    "data": {"name": "digits", "image_size": 8},
    "epochs": 1, "batch_size": 64,
  }
"""
SWEEP = """
from experiments.cells import Cell
from experiments.sweeps import Sweep

WIDTHS = Sweep("How wide?", [
  Cell("wide", "own.py", {}),
  Cell("narrow", "own.py:2", {"model.name": "mine:narrow"}),
  Cell("paper", "configs/digits.py", {"model.depth": 1}),
], seeds=(3,))
EMPTY = 3
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch):
  """A process imports each module once; here each test has its own."""
  monkeypatch.setattr(models, "_OWN", {})
  before = {*sys.modules}
  yield
  for name in ("mine", "sizes", "my_sweeps"):
    if name not in before:
      sys.modules.pop(name, None)


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with code of one's own, in which the command runs."""
  (tmp_path / "sizes.py").write_text("WIDTH = 8\n")
  (tmp_path / "mine.py").write_text(MODEL + "".join(PARTS.values()))
  (tmp_path / "own.py").write_text(CONFIG)
  (tmp_path / "my_sweeps.py").write_text(SWEEP)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def own_config(name="mine:wide", **overrides):
  config = common.load_config("configs/digits.py")
  none = dict.fromkeys(("model.dim", "model.depth", "model.kernel_size"))
  config.update_from_flattened_dict(
    {
      **none,
      "model.patch_size": 4,
      "model.name": name,
      "epochs": 1,
      **overrides,
    }
  )
  return config


def test_a_model_of_ones_own(here):
  """Trains, evaluates, plans, exports, and loads from workdir and file."""
  config = own_config()
  train.train_and_evaluate(config, here / "run")
  kept = json.loads((here / "run" / "config.json").read_text())
  assert kept["model"]["name"] == "mine:wide"
  models._OWN.clear()  # As in a new process.
  config = workdir_lib.load_config(here / "run")
  assert evaluate.evaluate_checkpoint(config, here / "run")["count"] == 360
  model, variables, data = weights.load_model(str(here / "run"))
  assert (type(model).__name__, model.width, model.num_classes) == (
    "Linear",
    8,
    10,
  )
  described = sources.describe("digits", None, "train", 8)
  result = plan.plan(config, jax.devices(), described)
  assert (result["description"], result["fits"]) == ("Linear", True)
  for kind in ("stablehlo", "timm"):
    code, out, err = common.call(
      "convmixer_jax.export", f"--weights={here}/run", f"--out={here}/out",
      f"--format={kind}",
    )  # fmt: skip
    assert code == 0, err
    assert "read back" in out
  # The narrow one is told from the wide one, although no field has the width.
  file = str(here / "out" / "model.safetensors")
  assert safetensors.numpy.load_file(file)["fc.weight"].shape == (10, 8)
  models._OWN.clear()
  with pytest.raises(UserError, match="your own, name it: MODULE:VARIANT"):
    weights.load_model(file)  # Reading a file imports nothing.
  assert not models.families()[: -len(models.FAMILIES)]
  again, loaded, told = weights.load_model(file, "mine:wide")
  assert (again, told["image_size"]) == (model, 8)
  assert common.tree_error(loaded, variables) == 0
  assert told["class_names"] == data["class_names"]
  with pytest.raises(UserError, match=r"holds mine:wide; pass --model=mine:w"):
    weights.load_model(file, "mine:narrow")
  # Its weights are what another run starts from.
  other = own_config(init_from=file, **{"optim.learning_rate": 0.0})
  state = train.train_and_evaluate(other, here / "other")
  assert common.tree_error(state.params, variables["params"]) == 0


def test_a_file_of_ones_own_runs_once(here, tmp_path_factory, monkeypatch):
  """It imports those beside it, from any folder."""
  monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
  name = f"{here}/mine.py:narrow"
  model = models.create_model(name, num_classes=3)
  assert model.width == 4
  assert models.create_model(name, num_classes=3) == model
  assert str(here) not in sys.path
  relative = os.path.relpath(here / "mine.py")
  module, attribute = imports.load(f"{relative}:x")
  assert module is imports.load(name)[0]
  assert attribute == "x"


def test_parts_that_a_model_lacks_are_errors_when_needed(here):
  (here / "mine.py").write_text(MODEL)
  config = own_config()
  train.train_and_evaluate(config, here / "run")
  says = r"^model.name=mine:wide: its module has no {}, which this needs; "
  with pytest.raises(UserError, match=says.format("infer")):
    weights.load_model(str(here / "run"))
  described = sources.describe("digits", None, "train", 8)
  with pytest.raises(UserError, match=says.format("flops")):
    plan.plan(config, jax.devices(), described)
  with pytest.raises(UserError, match="its module has no TORCH_NAMES"):
    train.train_and_evaluate(own_config(init_from="x.pth"), here / "other")


def test_files_start_a_model_without_infer(here, monkeypatch):
  (here / "mine.py").write_text(MODEL + PARTS["TORCH_NAMES"])
  model = models.create_model("mine:wide", num_classes=10)
  wanted = models.variable_shapes(model, 8)
  tensors = {
    "patch_embed.weight": np.ones((8, 3, 4, 4), np.float32),
    "patch_embed.bias": np.zeros(8, np.float32),
    "fc.weight": np.zeros((10, 8), np.float32),
    "fc.bias": np.zeros(10, np.float32),
  }
  monkeypatch.setenv("HOME", str(here))
  safetensors.numpy.save_file(tensors, here / "file.safetensors")
  found = weights.load_init_from("~/file.safetensors", model, wanted)
  assert found["params"]["patches"]["kernel"].sum() == 8 * 3 * 4 * 4


RAISES = "import sizes\ndef f():\n  return sizes.NONE\nf()\n"


@pytest.mark.parametrize(
  ("name", "text", "says"),
  [
    ("none:x", "", "none:x: no module none here; run the command in its"),
    ("none.py:x", "", "none.py:x: no such file; run the"),
    (".mine:x", "", "TypeError"),
    (":x", "", ":x: unknown; nearest of"),
    ("mine:x", RAISES, "mine:x: AttributeError: module 'sizes' has no attr"),
    ("mine:x", RAISES, "mine.py, line 3)"),
    ("mine.py:x", RAISES, "mine.py, line 3)"),
    ("mine:x", "import none_such\n", "No module named 'none_such' ("),
    ("mine:x", "import sys\nsys.exit(3)\n", "SystemExit: 3 ("),
    ("mine.py:x", "a b\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
    ("mine:x", "", "mine lacks MODEL, a linen module with check(image_size)"),
    ("mine:wide", MODEL.replace("  dtype:", "  other:"), "mine lacks MODEL,"),
    ("mine:x", MODEL, "mine:x: unknown; nearest of 2 are mine:wide, mine:nar"),
    ("mine:", MODEL, "mine:: unknown; nearest of 2"),
    ("mine:wide", f"{MODEL}VARIANTS = 3\n", "mine lacks VARIANTS, a dict"),
    ("mine:a", f"{MODEL}VARIANTS = {{'a': {{'b': 1}}}}\n", "argument 'b'"),
  ],
)  # fmt: skip
def test_a_model_that_is_none(here, name, text, says):
  (here / "mine.py").write_text(text)
  with pytest.raises(UserError) as e:
    models.create_model(name)
  assert str(e.value).startswith(f"model.name={name}")
  assert says in str(e.value)
  assert "mine.py" not in sys.modules


def test_a_run_whose_model_is_not_here(here):
  (here / "run").mkdir()
  config = own_config().to_json()
  (here / "run" / "config.json").write_text(config)
  (here / "mine.py").unlink()
  args = f"--workdir={here}/run", "--mode=eval"
  code, out, err = common.call("convmixer_jax.main", *args)
  assert (code, out) == (2, "")
  assert err.startswith("error: model.name=mine:wide: no module mine here; run")


def test_a_sweep_of_ones_own(here):
  sweep = sweeps.get("my_sweeps:WIDTHS")
  assert sweep.name == "WIDTHS"
  assert sweeps.get(f"{here}/my_sweeps.py:WIDTHS").cells == sweep.cells
  wide, narrow, paper = sweep.cells
  assert wide.resolve(3).model.name == "mine:wide"
  assert narrow.resolve(3).model.patch_size == 2
  assert paper.config == "configs/digits.py"
  # The runner starts commands in this folder, and a Slurm job does too.
  command = narrow.command(3, here / "runs")
  assert "--config=own.py:2" in command
  assert os.path.isfile(paper.command(3, here)[3].partition("=")[2])
  name, tasks = slurm._sweep("my_sweeps:WIDTHS", here)
  assert (name, tasks[0].folder, len(tasks)) == ("WIDTHS", str(here), 3)
  # Results are in the folder of its name.
  module = f"{here}/my_sweeps.py:WIDTHS"
  for cell in sweep.cells:
    common.finished_run(here / "runs" / "WIDTHS", cell, 3, 90.0)
  results, problems = scores.collect(*scores.locate([module], f"{here}/runs"))
  assert problems == []
  assert [list(result.scores) for result in results] == [[3]] * 3
  assert results[1].costs == (4 * 12 + 4 + 10 * 4 + 10, 6 * 64 * 4)


@pytest.mark.parametrize(
  ("name", "more", "says"),
  [
    ("none:X", "", "none:X: no module none here; run the command in its fold"),
    ("my_sweeps:WIDTH", "", "WIDTH: not there; its sweeps are WIDTHS"),
    ("my_sweeps.py:EMPTY", "", "must be an experiments.sweeps.Sweep of experi"),
    ("my_sweeps:WIDTHS", "1 / 0", "ZeroDivisionError: division by zero ("),
    ("my_sweeps:A", "A = Sweep('', [3])", "must be an experiments.sweeps.Swee"),
    (
      "my_sweeps:A",
      "A = Sweep('', [Cell('a', 'none.py', {})])",
      "my_sweeps:A: cell a: none.py: FileNotFoundError: [Errno 2] No such file",
    ),
    (
      "my_sweeps:A",
      "A = Sweep('', [Cell('a', 'own.py', {'modle.dim': 3})])",
      "own.py: modle.dim=3: no such field; nearest is model.d",
    ),
    (
      "my_sweeps:A",
      "A = Sweep('', 2 * [Cell('a', 'own.py', {})])",
      "my_sweeps:A: several cells are called a",
    ),
  ],
)
def test_a_sweep_that_is_none(here, name, more, says):
  with (here / "my_sweeps.py").open("a") as file:
    file.write(f"{more}\n")
  with pytest.raises(UserError) as e:
    sweeps.get(name)
  assert str(e.value).startswith(f"{name}: ")
  assert says in str(e.value)


@pytest.mark.slow
def test_commands_run_a_sweep_of_ones_own(here):
  """In a folder of one's own, with this project on PYTHONPATH."""
  # The third cell is left out.
  text = SWEEP.replace('  Cell("paper", "configs', "  #")
  (here / "my_sweeps.py").write_text(text)
  for module, *flags in (
    ("run",),
    ("tables", "--format=csv"),
    ("report", "--out=page.html"),
  ):
    process = common.run_main(
      "my_sweeps:WIDTHS", "--root=runs", *flags, cwd=here,
      module=f"experiments.{module}",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    if module == "tables":
      assert [line.split(",")[0] for line in out.splitlines()[1:]] == [
        "wide",
        "narrow",
      ]
  assert "WIDTHS" in (here / "page.html").read_text()
  assert scores.finished(here / "runs/WIDTHS/narrow/seed3")
