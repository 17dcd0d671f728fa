"""config.keep_best: the state of the best evaluation, in its own workdir."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from convmixer_jax import best
from convmixer_jax import checkpoint
from convmixer_jax import evaluate
from convmixer_jax import ops
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from tests import common
from tests import test_train

NAN = float("nan")

# Ten steps of 32 images, scored after every second one.
TEN_STEPS = {
  "data.train_split": "train[:320]",
  "eval_every": 2,
  "save_every": 5,
  "ema_decay": 0.5,
  "keep_best": "top1",
}


@pytest.fixture(scope="module", autouse=True)
def portable():
  """See conftest.py; here for the fixtures of this module too."""
  with ops.portable():
    yield


def config_of(**overrides):
  return common.digits_config(**(TEN_STEPS | overrides))


def train_digits(workdir, **overrides):
  return train.train_and_evaluate(config_of(**overrides), workdir)


def kept(workdir):
  """The state of the one checkpoint, and its record, without the clock's."""
  (folder,) = (workdir / "best" / "checkpoints").iterdir()
  record = workdir_lib.read_eval(workdir / "best", int(folder.name))
  record = {k: v for k, v in record.items() if k != "time"}
  return checkpoint.load_state(workdir / "best"), record


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """A run whose rate is so large that its best score is not its last."""
  workdir = tmp_path_factory.mktemp("unbroken")
  large = {"optim.learning_rate": 0.3, "optim.schedule": "constant"}
  train_digits(workdir, **large)
  return workdir


def test_the_best_is_a_workdir(unbroken, capsys):
  state, record = kept(unbroken)
  scores = [r for r in test_train.records(unbroken) if r["kind"] == "eval"]
  wanted = max(scores, key=lambda r: r["top1"])  # The first of equal ones.
  assert [r["step"] for r in scores] == [2, 4, 6, 8, 10]
  assert record == wanted
  assert record["step"] not in (2, 10)
  # It is whole, and what evaluation scored are its averages.
  assert {name.partition("/")[0] for name in state} == {
    "step", "params", "batch_stats", "opt_state", "ema"}  # fmt: skip
  assert state["step"] == record["step"]
  best_dir = unbroken / "best"
  loaded = checkpoint.load_variables(best_dir)["params"]["head"]["bias"]
  assert np.array_equal(loaded, state["ema/params/head/bias"])
  _, _, data = weights.load_model(str(best_dir))
  assert data["class_names"] == [*"0123456789"]
  main = ("convmixer_jax.main", f"--workdir={best_dir}")
  code, out, err = common.call(*main, "--mode=eval")
  assert code == 0, err
  found = json.loads(out.splitlines()[-1])
  assert found["loss"] == pytest.approx(record["loss"], rel=1e-5)
  assert found["step"] == record["step"]
  # The last step's is another.
  last = checkpoint.load_variables(unbroken)["params"]["head"]["bias"]
  assert not np.array_equal(loaded, last)
  # It cannot be trained; the run that it belongs to can.
  code, _, err = common.call(*main, "--config=configs/digits.py")
  assert code == 2
  assert f"holds the best checkpoint of the run in {unbroken}, and is" in err
  code, out, _ = common.call("convmixer_jax.main", f"--workdir={unbroken}")
  assert f"best top-1 at step {record['step']}, in {best_dir}" in out
  assert code == 0


def test_predict_and_export_take_it(unbroken, tmp_path):
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  flag = f"--weights={unbroken / 'best'}"
  code, out, err = common.call(
    "convmixer_jax.predict", flag, tmp_path / "a.png"
  )
  assert (code, err) == (0, "")
  assert "a.png" in out
  flags = flag, f"--out={tmp_path}", "--format=timm"
  code, _, err = common.call("convmixer_jax.export", *flags)
  assert code == 0, err
  _, ours, _ = weights.load_model(str(tmp_path / "model.safetensors"))
  _, theirs, _ = weights.load_model(str(unbroken / "best"))
  assert common.tree_error(ours, theirs) == 0


class Killed(BaseException):
  """As by SIGKILL: nothing more is written."""


@pytest.mark.parametrize(
  ("scores", "step"),
  [
    ([5, 9, 7, 9, 8], 4),  # Before the checkpoint, and a tie after it.
    ([5, 6, 9, 7, 9], 6),  # Its record is dropped, and made again.
  ],
)
def test_a_killed_run_ends_with_the_best_of_an_unbroken_one(
  tmp_path, monkeypatch, scores, step
):
  """Killed at step 8. It goes on from step 5; its states do not change."""
  states, batches = {}, train.stream.train_batches

  def evaluation(state, stopped):
    now = int(jax.device_get(state.step))
    states.setdefault(now, jax.device_get(state))
    score = {"top1": scores[now // 2 - 1], "top5": 100.0, "loss": 1.0}
    return score | {"count": 360}

  def killed(*args, **kwargs):
    for i, batch in enumerate(batches(*args, **kwargs)):
      if i == 8:
        raise Killed
      yield batch

  monkeypatch.setattr(evaluate, "make_evaluate", lambda *args: evaluation)
  with monkeypatch.context() as context:
    context.setattr(train.stream, "train_batches", killed)
    with pytest.raises(Killed):
      train_digits(tmp_path)
  assert [*states] == [2, 4, 6, 8]
  assert checkpoint.latest_step(tmp_path) == 5
  train_digits(tmp_path)
  state, record = kept(tmp_path)
  assert record["step"] == state["step"] == step
  assert record["top1"] == 9
  assert np.array_equal(
    state["ema/params/head/bias"], states[step].ema["params"]["head"]["bias"]
  )
  scored = [r for r in test_train.records(tmp_path) if r["kind"] == "eval"]
  assert [r["top1"] for r in scored] == scores


@pytest.mark.parametrize("moment", ["half", "whole"])
def test_a_kill_while_the_best_is_replaced(tmp_path, monkeypatch, moment):
  """The old one can be loaded, or the new one is whole."""
  rows = [(4, 50, 1.0), (6, 60, 1.0)]
  save_only = checkpoint.Checkpointer.save_only

  def killed(self, step, *args):
    if step < 6:
      return save_only(self, step, *args)
    tmp = self._directory / "6.orbax-checkpoint-tmp"
    shutil.copytree(self._directory / "4", tmp)
    raise Killed

  def undeleted(self, step):
    raise Killed

  with monkeypatch.context() as context:
    if moment == "half":
      context.setattr(checkpoint.Checkpointer, "save_only", killed)
    else:
      manager = checkpoint.ocp.CheckpointManager
      context.setattr(manager, "delete", undeleted)
    with pytest.raises(Killed):
      offered(tmp_path, "top1", rows)
  step = 4 if moment == "half" else 6
  assert checkpoint.latest_step(tmp_path / "best") == step
  assert checkpoint.load_state(tmp_path / "best")["step"] == step
  rows.append((8, 70, 1.0))
  assert offered(tmp_path, "top1", rows)[0] == 8
  state, record = kept(tmp_path)
  assert state["step"] == record["step"] == 8


def offered(folder, metric, rows):
  """The step that is kept of `rows`: (step, top1, loss)."""
  folder.mkdir(exist_ok=True)
  chosen = best.Best(config_of(keep_best=metric), folder)
  (folder / "config.json").write_text(config_of(keep_best=metric).to_json())
  for step, top1, loss in rows:
    metrics = {"top1": top1, "top5": 100, "loss": loss, "count": 360}
    chosen.offer(step, metrics, STATE.replace(step=np.int32(step)))
  chosen.offer(99, None, STATE)  # A stopped evaluation.
  return checkpoint.latest_step(folder / "best"), chosen.describe()


STATE = train.step_lib.TrainState(
  step=np.int32(0), params={"w": np.ones(2)}, batch_stats={}, opt_state=()
)


def test_which_is_the_best(tmp_path):
  rows = [(1, 50, 2.0), (2, 60, 2.5), (3, 60, NAN), (4, 55, 1.5), (5, 60, 1.5)]
  assert offered(tmp_path / "top1", "top1", rows)[0] == 2
  step, says = offered(tmp_path / "loss", "loss", rows)
  assert (step, says) == (4, f"; best loss at step 4, in {tmp_path}/loss/best")
  assert offered(tmp_path / "nan", "top1", [(1, NAN, NAN)]) == (None, "")
  assert offered(tmp_path / "off", "", rows) == (None, "")
  # What is repeated after a restart does not count again.
  rows = [(4, 50, 1.0), (2, 90, 0.1), (4, 90, 0.1), (5, 51, 1.0)]
  assert offered(tmp_path / "again", "top1", rows[:3])[0] == 4
  assert offered(tmp_path / "then", "top1", rows)[0] == 5


def test_a_best_of_other_scores_is_refused(tmp_path):
  offered(tmp_path / "run", "top1", [(1, 50, 2.0)])
  folder = tmp_path / "run" / "best"
  refuses = lambda says, **overrides: pytest.raises(
    UserError, match=f"{folder}: was chosen under another config .*{says}"
  )
  seed = config_of(seed=1)
  with refuses("seed is 0 there"):
    best.Best(seed, tmp_path / "run")
  # The run goes on: what was accepted of it changes no score's meaning.
  shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
  best.Best(seed, tmp_path / "run")
  other = config_of(**{"data.eval_split": "train[320:]"})
  with refuses("data.eval_split is test there"):
    best.Best(other, tmp_path / "run")
  best.Best(config_of(seed=1, keep_best=""), tmp_path / "run")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  root = tmp_path_factory.mktemp("photos")
  for split in ("train", "val", "test"):
    for name in "ab":
      (root / split / name).mkdir(parents=True)
      for i in range(3):
        Image.new("RGB", (8, 8)).save(root / split / name / f"{i}.png")
  return str(root)


@pytest.mark.parametrize(
  ("name", "trained", "scored", "says"),
  [
    ("digits", "train", "test", "best of many test scores is not a fair score"),
    ("digits", "train[:50%]", "train[50%:]+test[:3]", "best of many"),
    ("digits", "train[:50%]", "train[10%:]", "are in data.train_split=train"),
    ("digits", "train[:4]", "train[4:]", ""),
    ("digits", "test+train[:2]", "train[4:]", ""),
    ("digits", "test", "train", "best of many test scores"),
    ("folder", "train", "val", ""),
    ("folder", "train", "test", "best of many test scores"),
    ("folder", "train[:50%]", "train[10%:]", "are in data.train_split=train"),
  ],
)
def test_an_unfair_choice_is_said(
  tmp_path, photos, name, trained, scored, says
):
  data = {"data.name": name}
  data |= {"data.train_split": trained, "data.eval_split": scored}
  config = config_of(**data)
  opened = [
    sources.open_source(name, photos, split, 8) for split in (trained, scored)
  ]
  warning = best.Best(config, tmp_path).warning(*opened)
  assert says in warning
  assert bool(warning) == bool(says)
  if warning:
    assert f"data.eval_split={scored}" in warning
    first = min(name for name, _ in opened[0].ranges)
    assert f"--config.data.eval_split='{first}[98%:]'" in warning
  off = config_of(keep_best="", **data)
  assert not best.Best(off, tmp_path).warning(*opened)


def test_a_folder_called_best_may_be_trained(tmp_path):
  (tmp_path / "config.json").write_text("{}")  # Something else's.
  best.Best(config_of(), tmp_path / "best")
