"""README and docs: commands parse, Python runs, and what is named exists."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
from PIL import Image
import pytest

from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import weights
from tests import common

PAGES = {
  str(path.relative_to(common.ROOT)): path.read_text()
  for path in [common.ROOT / "README.md", *common.ROOT.glob("docs/*.md")]
}
TEXT = "\n".join(PAGES.values())
# `tpu_pod.sh NAME sweep` is the runner on each worker.
COMMANDS = re.findall(
  r"^(?:scripts/tpu_pod.sh NAME run )?python -m"
  r" ((?:convmixer_jax|benchmarks|examples|experiments)\.\w+)(.*)$",
  TEXT.replace("NAME sweep ", "NAME run python -m experiments.run "),
  re.M,
)
PYTHON = [
  (page, code)
  for page, text in PAGES.items()
  for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """With a run, and with the model of one's own that training.md shows."""
  folder = tmp_path_factory.mktemp("checkout")
  for path in common.ROOT.iterdir():
    if path.name != "runs":
      (folder / path.name).symlink_to(path)
  (folder / "runs" / "mine").mkdir(parents=True)
  config = common.load_config("configs/folder.py")
  (folder / "runs" / "mine" / "config.json").write_text(config.to_json())
  model = next(code for _, code in PYTHON if "VARIANTS" in code)
  (folder / "my_model.py").write_text(model)
  return folder


def test_all_are_found():
  assert len(COMMANDS) >= 40
  assert len(PYTHON) >= 2


@pytest.mark.parametrize(("module", "command"), sorted(set(COMMANDS)))
def test_commands_parse(module, command, checkout, monkeypatch):
  """Flags known, overrides of the right type, and a config that may run."""
  monkeypatch.chdir(checkout)
  monkeypatch.setattr(models, "_OWN", {})  # A process keeps what it imports.
  argv = [module, *shlex.split(command)]
  monkeypatch.setattr("sys.argv", argv)  # Overrides are looked for there.
  path = common.ROOT / module.replace(".", "/")
  path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  flag_values = runpy.run_path(str(path))["_FLAGS"]
  rest = flag_values(argv)[1:]
  takes_names = (".predict", ".run", ".slurm", ".tables", ".report")
  assert bool(rest) == module.endswith(takes_names)
  if "config" in flag_values and "--mode eval" not in command:
    config_lib.check(flag_values.config, num_devices=8)


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_runs(page, code, monkeypatch, tmp_path):
  """As it stands, with a tiny model in place of any weights."""

  def load_model(where):
    depth = 16 if "hf-hub" in where else 1
    model = common.tiny_model(depth=depth)
    images = jnp.zeros((1, 8, 8, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    data = {"image_size": 32, "crop_pct": 0.96, "mean": (0.5,) * 3}
    data |= {"std": (0.5,) * 3, "class_names": list("0123456789")}
    return model, variables, data

  monkeypatch.setattr(weights, "load_model", load_model)
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (64, 48)).save("photo.jpg")
  exec(compile(code, page, "exec"), {})


@pytest.mark.slow
def test_tour_runs(tmp_path):
  """The notebook's cells, one after the other, in a checkout without runs."""
  text = (common.ROOT / "examples" / "tour.ipynb").read_text("utf-8")
  cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
  assert all(cell["outputs"] for cell in cells[1:])  # As GitHub shows it.
  for name in ("configs", "convmixer_jax", "examples", "experiments"):
    (tmp_path / name).symlink_to(common.ROOT / name)
  (tmp_path / "tour.py").write_text(
    "\n\n".join("".join(cell["source"]) for cell in cells), "utf-8"
  )
  done = subprocess.run(
    [sys.executable, "tour.py"], cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | {"MPLBACKEND": "Agg"}, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert re.search(r"^9\d\.\d\d% of 360 are right$", done.stdout, re.M)
  assert "(1, 3) 2,744,067 parameters" in done.stdout


def test_make_targets_exist():
  makefile = (common.ROOT / "Makefile").read_text()
  for target in re.findall(r"^make (\S+)|`make ([\w.-]+)`", TEXT, re.M):
    name = "".join(target)
    assert re.search(rf"^{re.escape(name)}:", makefile, re.M), name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
  """Links are relative to the page, names of files to the root."""
  text = PAGES[page]
  folder = (common.ROOT / page).parent
  for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
    assert (folder / link).exists(), link
  for name in re.findall(
    r"`((?:convmixer_jax|tests|configs|experiments|benchmarks|examples|scripts)"
    r"/[\w./-]*)`",
    text,
  ):
    assert (common.ROOT / name).exists(), name


def test_the_tree_is_the_checkout():
  tree = re.search(r"^```\n(configs/ .*?)^```", TEXT, re.M | re.S)[1]
  folder = common.ROOT
  for line in tree.splitlines():
    names = re.split(" {2,}", line.strip())[0].split(", ")
    if not line.startswith(" "):
      folder = common.ROOT
    for name in names:
      assert (folder / name).exists(), name
    if line.strip() == "convmixer_jax/":
      folder = common.ROOT / "convmixer_jax"
