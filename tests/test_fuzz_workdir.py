"""Abuse of workdirs: damaged files of a run; and of whole processes."""

import contextlib
import json
import os
from pathlib import Path
import pickle
import shutil

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from convmixer_jax import checkpoint
from convmixer_jax import logger
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from tests import common
from tests.fuzzing import abuse
from tests.fuzzing import examples
from tests.fuzzing import guarded
from tests.fuzzing import make
from tests.test_fuzz_images import picture
from tests.test_fuzz_weights import JSON_ODD

pytestmark = pytest.mark.usefixtures("little_memory")

RUN = common.digits_config(
  **{"data.train_split": "train[:64]", "data.eval_split": "test[:64]"},
  save_every=1,
  eval_every=1,
  log_every=1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run of two steps, each saved, in which nothing moved."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  data = sources.Description(64, 10, (8, 8, 3), 8)
  state = recipe_lib.build(RUN, data).init_state()
  log = logger.Logger(workdir, RUN.to_json(), first_step=0, total_steps=2,
                      batch_size=32, active=True)  # fmt: skip
  log.write_classes([str(i) for i in range(10)])
  checkpointer = checkpoint.Checkpointer(workdir)
  for step in (1, 2):
    checkpointer.save(step, state.replace(step=state.step + step))
    log.log_eval(step, {"top1": 9.0, "top5": 50.0, "loss": 2.3, "count": 64})
  checkpointer.close()
  log.close("finished", 2)
  return workdir


def tree(folder):
  """Every file's name and bytes."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


def test_checkpoints_hold_no_pickle(run, monkeypatch):
  """But JSON and tensorstore's: a tree of keys, or arrays that zarr packed."""
  files = {k: v for k, v in tree(run / "checkpoints").items() if v is not None}
  assert {name.split("/")[0] for name in files} == {"1", "2"}
  assert {"_METADATA", "manifest.ocdbt"} <= {Path(name).name for name in files}
  for name, data in files.items():
    path = Path(name)
    if path.name == "manifest.ocdbt":
      assert data[:4] == b"\x0c\xdb\x3a\x2a", name
    elif path.parent.name != "d" and path.name != "commit_success.txt":
      assert isinstance(json.loads(data), dict), name
    for word in (b"builtin", b"reduce", b"numpy", b"copyreg", b"pickle"):
      assert word not in data, name
    assert not data.startswith(b"\x80"), name

  def refuse(*args, **kwargs):
    raise AssertionError("a pickle is read")

  for name in ("load", "loads", "_load", "_loads", "Unpickler", "_Unpickler"):
    monkeypatch.setattr(pickle, name, refuse)
  with guarded(run):
    _, variables, _ = weights.load_model(str(run))
    checkpointer = checkpoint.Checkpointer(run)
    shapes = jax.tree.map(np.zeros_like, variables)
    assert weights.match(weights.load(run), shapes, "").keys() == shapes.keys()
    checkpointer.close()


SPOILT = [
  b"", b"\xff" * 9, b"[" * 10**5, b"null", b"{}", b"[1]\n", b"\x00", b'"x"',
  b"9" * 5000, b'{"a": ' * 500, b"1e999", b'{"starts": 3}', b'{"starts": []}',
  b'{"model": {}, "data": 3}', b'{"model": {"name": 3}}',
  b'{"step": 2}\n{"step": "x", "kind": "eval"}\n3\n{"kind": "eval"}',
  b'{"step": 2, "kind": "eval", "top1": "x"}',
]  # fmt: skip
PARTS = ["metrics.jsonl", "run.json", "classes.txt", *3 * ["config.json"],
         *5 * ["checkpoints"]]  # fmt: skip
WAYS = str.split("delete cut flip odd folder loop extra json json json")


@st.composite
def damage(draw):
  """A function that spoils something in a workdir."""
  part, how = draw(st.sampled_from(PARTS)), draw(st.sampled_from(WAYS))
  at, value = draw(st.integers(0, 10**6)), draw(st.sampled_from(JSON_ODD))
  odd = draw(st.sampled_from(SPOILT) | st.binary(max_size=30))

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

  spoil.__name__ = f"{how}_{part}_{at}_{value}".replace(".", "_")
  return spoil


@contextlib.contextmanager
def spoilt(run, folder, spoilers):
  """A copy of a run, damaged."""
  workdir = shutil.copytree(run, folder / "run")
  try:
    with contextlib.suppress(OSError):
      for spoil in spoilers:
        spoil(workdir)
    yield workdir
  finally:
    shutil.rmtree(workdir)


def read(workdir, folder):
  """By what reads weights and records; says whether there is a model."""
  before = tree(workdir)
  said = dict(folder=folder, names=[str(workdir)])
  model = abuse(weights.load_model, str(workdir), **said)
  records = abuse(workdir_lib.read_metrics, workdir, **said)
  abuse(workdir_lib.config_changes, RUN, workdir, (), **said)
  assert all(record["step"] in (1, 2) for record in records or ())
  assert tree(workdir) == before
  return model is not None


def test_every_odd_file_of_a_run(run, folder):
  workdir = shutil.copytree(run, folder / "run")
  for odd in SPOILT:
    for name in ("config.json", "metrics.jsonl", "classes.txt"):
      (workdir / name).write_bytes(odd)
    assert not read(workdir, folder)
  config = json.loads((run / "config.json").read_text())
  config["model"]["name"] = "x"
  (workdir / "config.json").write_text(json.dumps(config))
  assert not read(workdir, folder)


def test_damaged_workdirs_are_read_or_refused(run, folder):
  readable = []

  @examples(30)
  @hypothesis.given(st.lists(damage(), min_size=1, max_size=2))
  def each(spoilers):
    with spoilt(run, folder, spoilers) as workdir:
      readable.append(read(workdir, folder))

  each()
  assert 0 < sum(readable) < len(readable)


@pytest.mark.slow
def test_damaged_workdirs_go_on_or_are_refused(folder, tmp_path):
  """By the trainer itself, which may set a damaged checkpoint aside."""
  run = tmp_path / "whole"
  wanted = jax.device_get(train.train_and_evaluate(RUN, run).params)

  @examples(25)
  @hypothesis.given(damage())
  def each(spoil):
    with spoilt(run, folder, [spoil]) as workdir:
      state = abuse(train.train_and_evaluate, RUN, workdir, folder=folder,
                    names=[str(workdir)])  # fmt: skip
      if state is not None:
        jax.tree.map(np.testing.assert_array_equal, state.params, wanted)

  each()


@pytest.mark.slow
def test_real_processes(run, folder, tmp_path, monkeypatch):
  """Exit code 2 and one line of error; and nothing is left elsewhere."""
  cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
  sandbox = tmp_path / "sandbox"
  for name in ("home", "tmp", "cwd"):
    (sandbox / name).mkdir(parents=True)
  config, odd = folder / "config.py", folder / "image\udcff\n.jpg"
  config.write_text("raise SystemExit(0)")
  odd.write_bytes(picture("RGB", "PNG")[:99])
  shutil.copytree(run, folder / "damaged")
  (folder / "damaged" / "config.json").write_bytes(b"[" * 10**5)
  main, predict = "convmixer_jax.main", "convmixer_jax.predict"
  digits = f"--config={common.ROOT}/configs/digits.py"
  commands = [
    (main, digits, f"--flagfile={sandbox}/none"),
    (main, digits, "--config.seed=" + "9" * 5000),
    (main, digits, "--config.data.name=\udcff\n"),
    (main, f"--config={config}"),
    (predict, f"--weights={run}", str(odd)),
    (predict, f"--weights={odd}", str(odd)),
    (predict, f"--weights={folder}/damaged", str(odd)),
  ]
  monkeypatch.setenv("XDG_CACHE_HOME", cache)
  monkeypatch.setenv("HOME", str(sandbox / "home"))
  monkeypatch.setenv("TMPDIR", str(sandbox / "tmp"))
  monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
  before = tree(sandbox), {*os.listdir(folder)}
  for module, *words in commands:
    workdir = [f"--workdir={folder}/new"] * (module == main)
    process = common.run_main(
      *map(os.fsencode, [*workdir, *words]), module=module, cwd=sandbox / "cwd"
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, f"{words}\n{out}{err}"
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
  assert (tree(sandbox), {*os.listdir(folder)}) == before
