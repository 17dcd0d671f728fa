"""Scores by class; weights that meet data of other classes."""

import csv
import functools
import json
import re
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets
import tensorflow_datasets as tfds

from convmixer_jax import augment
from convmixer_jax import classes
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import step as step_lib
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import decode
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from tests import common

NAMES = ['ant, "red"', "bee", "cat"]
main = functools.partial(common.call, "convmixer_jax.main")


@pytest.fixture(autouse=True)
def portably():
  with ops.portable():
    yield


def write_digits(root, names, count):
  """Real digits as PNGs, the label's digit in the folder of its name."""
  digits = datasets.load_digits()
  for split, start in (("train", 0), ("val", count)):
    for label, name in enumerate(names):
      folder = root / split / name
      folder.mkdir(parents=True)
      rows = np.flatnonzero(digits.target == label % 10)
      for i in rows[start : start + count]:
        pixels = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
  return root


def config_of(root, **overrides):
  return common.digits_config(**{
    "data.name": "folder", "data.dir": str(root), "data.eval_split": "val",
    "batch_size": 24, "epochs": 3, **overrides,
  })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run on three classes with unequal numbers of images; and its images."""
  root = write_digits(tmp_path_factory.mktemp("data"), NAMES, 40)
  for path in sorted((root / "val" / "bee").iterdir())[:10]:
    path.unlink()
  workdir = tmp_path_factory.mktemp("run") / "run"
  with ops.portable():
    train.train_and_evaluate(config_of(root), workdir)
  model, variables, data = weights.load_model(workdir)
  weights.save(workdir / "run.safetensors", model, variables, data)
  return workdir, root


def copied(run, tmp_path, names):
  """The run, as if the classes of its data had had these names."""
  workdir = tmp_path / "copy"
  shutil.copytree(run[0], workdir)
  (workdir / "classes.txt").write_text("".join(f"{n}\n" for n in names))
  return workdir


def test_every_class_has_its_score(run, tmp_path):
  workdir, root = run
  path = tmp_path / "matrix.csv"
  path.write_text("old")
  code, out, err = main(
    f"--workdir={workdir}", "--mode=eval", f"--confusion={path}"
  )
  assert (code, err) == (0, "")
  model, variables, data = weights.load_model(workdir)
  source = sources.open_source("folder", str(root), "val", 8)
  normalize = augment.make_normalize(data["mean"], data["std"])
  files, labels = zip(*map(source.read, range(len(source))))
  images = [decode.eval_image(file, 8, 1.0) for file in files]
  logits = model.apply(variables, normalize(np.stack(images)), train=False)
  matrix = np.zeros((3, 3), int)
  np.add.at(matrix, (np.array(labels), logits.argmax(-1)), 1)
  assert matrix.sum(1).tolist() == [40, 30, 40]
  with path.open(newline="") as file:
    rows = [*csv.reader(file)]
  assert rows[0] == ["true \\ predicted", *NAMES]
  assert [row[0] for row in rows[1:]] == NAMES
  assert np.array_equal(np.array([r[1:] for r in rows[1:]], int), matrix)
  assert [*tmp_path.iterdir()] == [path]

  line, *table, last = out.splitlines()
  metrics = json.loads(last)
  assert line.startswith("step 15  top-1 ")
  assert [*metrics] == ["top1", "loss", "count", "step", "per_class"]
  assert metrics["top1"] == pytest.approx(100 * np.trace(matrix) / 110)
  for k, found in enumerate(metrics["per_class"]):
    wrong = np.where(np.arange(3) == k, 0, matrix[k])
    most = wrong.argmax() if wrong.any() else None
    assert found == {
      "name": NAMES[k],
      "images": matrix[k].sum(),
      "top1": pytest.approx(100 * matrix[k, k] / matrix[k].sum()),
      "mistaken_for": None if most is None else NAMES[most],
      "mistakes": wrong.max(),
    }
  assert 0 < metrics["top1"] < 100  # Or else the table shows little.
  assert re.split("  +", table[0]) == [
    "3 classes", "images", "top-1 %", "most often taken for"
  ]  # fmt: skip
  for found, text in zip(metrics["per_class"], table[1:], strict=True):
    assert text.startswith(f"{found['name']} ")
    assert f" {found['images']} " in text
    assert f" {found['top1']:.2f}" in text
    taken = f"  {found['mistaken_for']} ({found['mistakes']})"
    assert text.endswith(taken) == bool(found["mistakes"])
  # Nothing of this is in the records of a run.
  last = workdir_lib.read_metrics(workdir)[-1]
  assert [*last] == ["step", "kind", "time", "top1", "loss", "count"]


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--confusion={}/none/m.csv", "--mode=eval"], "folder does not exist"),
    (["--confusion={}", "--mode=eval"], "exists and is not a file"),
    (["--confusion={}/m.csv"], "needs --mode eval"),
    (["--confusion={}/m.csv", "--mode=eval"], "is a directory"),
  ],
)
def test_a_matrix_that_cannot_be_written(run, tmp_path, flags, says):
  if says == "is a directory":
    (tmp_path / "m.csv.tmp").mkdir()
  flags = [flag.format(tmp_path) for flag in flags]
  code, out, err = main(f"--workdir={run[0]}", *flags)
  assert code == 2
  assert err.startswith(f"error: {flags[0]}: ")
  assert says in err.lower()
  assert len(err.splitlines()) == 1
  assert bool(out) == (says == "is a directory")  # The scores are not lost.


def test_of_many_classes_the_worst_are_shown(tmp_path, monkeypatch):
  """A model that says 3 whatever it sees."""
  names = [f"{k:02}" for k in range(21)]
  root = write_digits(tmp_path / "data", names, 2)
  shutil.rmtree(root / "val" / "20")  # A class without images is not shown.
  path = tmp_path / "a.safetensors"
  model = common.tiny_model(depth=1, num_classes=21)
  variables = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32), models.variable_shapes(model, 8)
  )
  variables["params"]["head"]["bias"][3] = 1
  data = {"image_size": 8, "crop_pct": 1.0, "mean": [0.5] * 3}
  data |= {"std": [0.5] * 3, "class_names": names}
  weights.save(path, model, variables, data)
  flags = (
    "--config=configs/digits.py", "--mode=eval", f"--workdir={tmp_path / 'no'}",
    f"--config.init_from={path}", "--config.data.name=folder",
    f"--config.data.dir={root}", "--config.data.eval_split=val",
    "--config.model.dim=8", "--config.model.depth=1",
    "--config.model.patch_size=2",
  )  # fmt: skip
  code, out, err = main(*flags)
  assert (code, err) == (0, "")
  _, head, *table, last = out.splitlines()
  assert head.startswith("the 10 worst of 21 classes  images")
  assert [row.split() for row in table] == [
    [name, "2", "0.00", "03", "(2)"] for name in names[:11] if name != "03"
  ]
  assert json.loads(last)["per_class"] == [
    {"name": name, "images": 2, "top1": 0, "mistaken_for": "03", "mistakes": 2}
    for name in names[:11]
    if name != "03"
  ]
  # The matrix of too many classes is not counted.
  monkeypatch.setattr(step_lib, "MOST_COUNTED", 20)
  code, out, err = main(*flags, f"--confusion={tmp_path / 'm.csv'}")
  assert code == 2
  assert err.endswith("for at most 20 classes and one label an image\n")
  assert [*json.loads(out.splitlines()[-1])] == [
    "top1", "top5", "loss", "count", "step"
  ]  # fmt: skip


# --- Weights of other classes.


def evaluate(tmp_path, root, init_from):
  """(exit code, output, errors) of the command."""
  return main(
    "--config=configs/digits.py", "--mode=eval", f"--workdir={tmp_path / 'no'}",
    f"--config.init_from={init_from}", "--config.data.name=folder",
    f"--config.data.dir={root}", "--config.data.eval_split=val",
    "--config.model.dim=8", "--config.model.depth=1",
  )  # fmt: skip


def test_another_number_of_classes(run, tmp_path, capsys):
  root = write_digits(tmp_path / "data", ["ant", "bee"], 12)
  says = (
    "run: the weights have 3 classes, the data 2 (ant, bee): evaluate on data"
    " of the weights' classes, or train on these with config.init_from, which"
    " starts a new head\n"
  )
  code, _, err = evaluate(tmp_path, root, run[0])
  assert code == 2
  assert err.startswith("error: config.init_from=")
  assert err.endswith(says)
  code, _, err = main(
    f"--config={run[0]}/config.json", "--mode=eval", f"--config.data.dir={root}"
  )
  assert code == 2
  assert err.endswith(says)
  model = weights.load_model(run[0])[0].clone(num_classes=2)
  wanted = jax.tree.map(
    lambda x: np.full(x.shape, 7.0), models.variable_shapes(model, 8)
  )
  capsys.readouterr()
  loaded = weights.load_init_from(
    str(run[0]), model, wanted, class_names=["ant", "bee"], new_head=True
  )
  assert np.all(loaded["params"]["head"]["bias"] == np.full(2, 7))
  assert np.all(loaded["params"]["stem"]["bias"] != 7)
  line = "init_from: the weights have 3 classes, the data 2: the head starts"
  assert capsys.readouterr() == (f"{line} anew\n", "")


@pytest.mark.parametrize("source", ["workdir", "file"])
def test_other_names_are_a_warning(run, tmp_path, source, capsys):
  names = [NAMES[0], "bee", "dog"]
  root = write_digits(tmp_path / "data", names, 8)
  where = run[0] if source == "workdir" else run[0] / "run.safetensors"
  warning = (
    f"warning: {where}: class 2 is cat in the weights and dog in the data; the"
    f" weights have {', '.join(NAMES)}; the data {', '.join(names)}"
  )
  code, out, err = evaluate(tmp_path, root, where)
  assert (code, err) == (0, warning + "\n")
  assert json.loads(out.splitlines()[-1])["count"] == 24
  config = config_of(root, init_from=str(where), epochs=1)
  train.train_and_evaluate(config, tmp_path / "tuned")
  out, err = capsys.readouterr()
  assert err == f"{warning}. The head starts from the weights, not anew\n"
  assert "starts anew" not in out


def test_another_order_is_an_error(run, tmp_path, capsys):
  workdir, root = copied(run, tmp_path, [NAMES[0], "cat", "bee"]), run[1]
  says = (
    f"{workdir}: class 1 is cat in the weights and bee in the data; the weights"
  )
  code, out, err = evaluate(tmp_path, root, workdir)
  assert (code, out) == (2, "")
  assert err.startswith(f"error: config.init_from={says}")
  code, out, err = main("--mode=eval", f"--workdir={workdir}")
  assert (code, out) == (2, "")
  assert err.startswith(f"error: {says}")
  assert len(err.splitlines()) == 1
  # So it is when a run resumes, but weights may be trained anew.
  with pytest.raises(UserError, match="class 1 is cat in the weights and bee"):
    train.train_and_evaluate(config_of(root), workdir)
  config = config_of(root, init_from=str(workdir), epochs=1)
  train.train_and_evaluate(config, tmp_path / "tuned")
  assert says in capsys.readouterr().err


def test_a_path_may_begin_with_the_home_folder(run, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(run[0]))
  for where in ("~/run.safetensors", "~"):
    assert weights.load_model(where)[2]["class_names"] == NAMES
    classes.check(where, ["a", "b", "c"], trains=False)
    assert f"warning: {where}: class 0" in capsys.readouterr().err


def test_names_that_are_not_told_are_not_compared(run, tmp_path):
  workdir = copied(run, tmp_path, ["a", "b", "c", "d"])
  code, _, err = evaluate(tmp_path, run[1], workdir)
  assert (code, err) == (0, "")
  (workdir / "classes.txt").unlink()
  code, _, err = evaluate(tmp_path, run[1], workdir)
  assert (code, err) == (0, "")


def test_wordnet_ids_are_imagenets_names(capsys):
  """TFDS's names, which are those of ImageNet's folders."""
  ids = tfds.builder("imagenet2012").info.features["label"].names
  assert len(ids) == len(classes.imagenet()) == 1000
  for pair in ((ids, classes.imagenet()), (classes.imagenet(), ids)):
    classes.compare("weights", *pair, trains=False)
  assert capsys.readouterr() == ("", "")
  for others in ([*ids[:-1], "n99999999"], ids[1::-1] + ids[2:]):
    classes.compare("weights", classes.imagenet(), others, trains=False)
    assert "warning: weights: class 0 is tench" in capsys.readouterr().err
