import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from convmixer_jax import checkpoint
from convmixer_jax import evaluate
from convmixer_jax import files
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import runtime
from convmixer_jax import step as step_lib
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from experiments import scores
from tests import common
from tests import test_data

tfds_dir = test_data.tfds_dir

# Ten steps of 32 images.
TEN_STEPS = {"data.train_split": "train[:320]", "log_every": 2}


def train_digits(workdir, **overrides):
  config = common.digits_config(**TEN_STEPS, **overrides)
  return train.train_and_evaluate(config, workdir)


def same_state(a, b):
  same = jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))
  return all(jax.tree.leaves(same))


def records(workdir):
  """metrics.jsonl without what depends on the clock."""
  rate = "images_per_second"
  clock = ("time", rate, f"{rate}_per_device", "mfu", "data_wait")
  return [
    {k: v for k, v in record.items() if k not in clock}
    for record in workdir_lib.read_metrics(workdir)
  ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  return workdir, train_digits(workdir, eval_every=4)


def test_a_run_that_saved_nothing_may_get_another_config(tmp_path):
  """One that ran out of memory in its first step, for example."""
  too_large = common.digits_config(**TEN_STEPS, batch_size=1000)
  (tmp_path / "config.json").write_text(too_large.to_json())
  (tmp_path / "metrics.jsonl").touch()
  assert int(train_digits(tmp_path).step) == 10
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["batch_size"] == 32


def test_a_run(unbroken, capsys):
  workdir, state = unbroken
  assert int(state.step) == 10
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["dim"] == 8
  (start,) = json.loads((workdir / "run.json").read_text())["starts"]
  assert start["status"] == "finished"
  assert start["last_step"] == 10
  assert start["versions"]["jax"] == jax.__version__
  assert start["num_devices"] == 8
  train_steps, eval_steps = (
    [r["step"] for r in records(workdir) if r["kind"] == kind]
    for kind in ("train", "eval")
  )
  assert train_steps == [2, 4, 6, 8, 10]
  assert eval_steps == [4, 8, 10]
  # In a run of one epoch the schedule falls from peak / 20 to 0 at the last.
  rates = [r["learning_rate"] for r in records(workdir) if r["kind"] == "train"]
  assert rates == pytest.approx([0.0004, 0.0003, 0.0002, 0.0001, 0], abs=1e-9)
  last = records(workdir)[-1]
  assert last["count"] == 360
  assert 0 <= last["top1"] <= last["top5"] <= 100
  assert any(
    p.name.startswith("events.out.tfevents") for p in workdir.iterdir()
  )
  assert checkpoint.latest_step(workdir) == 10
  variables = checkpoint.load_variables(workdir)
  assert same_state(variables["params"], state.params)
  # The same command again, as after a kill that left the start "running".
  end = {k: start.pop(k) for k in ("status", "last_step", "ended")}
  workdir_lib.write_run(workdir, {"starts": [start | {"status": "running"}]})
  again = train_digits(workdir, eval_every=4)
  assert scores.finished(workdir)
  end["ended"] = workdir_lib.read_metrics(workdir)[-1]["time"]
  assert workdir_lib.read_starts(workdir) == {"starts": [start | end]}
  assert "finished at step 10" in capsys.readouterr().out
  assert same_state(again, state)


def test_whatever_run_json_holds_a_finished_run_is_marked(tmp_path):
  metrics = {"kind": "eval", "step": 10}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics))
  stale = {"status": "finished", "last_step": 9}
  for starts in ([], ["odd"], [{"status": "failed"}], [{}, stale]):
    workdir_lib.write_run(tmp_path, {"starts": starts})
    workdir_lib.mark_finished(tmp_path, metrics)
    assert scores.finished(tmp_path)
  before = (tmp_path / "run.json").stat().st_mtime_ns
  workdir_lib.mark_finished(tmp_path, metrics)
  assert (tmp_path / "run.json").stat().st_mtime_ns == before


def raise_signal_before(monkeypatch, step, signum):
  """The signal comes while the batch of that update is being made."""
  batches = train.stream.train_batches

  def interrupted(*args, start, **kwargs):
    for done, batch in enumerate(batches(*args, start=start, **kwargs), start):
      if done + 1 == step:
        signal.raise_signal(signum)
      yield batch

  monkeypatch.setattr(train.stream, "train_batches", interrupted)


@pytest.mark.parametrize(
  ("signum", "step"),
  [
    (signal.SIGTERM, 5),
    # A step that is evaluated.
    pytest.param(signal.SIGINT, 8, marks=pytest.mark.slow),
  ],
)
def test_five_steps_and_five_more_equal_ten(
  unbroken, tmp_path, monkeypatch, signum, step
):
  handler = signal.getsignal(signum)
  with monkeypatch.context() as context:
    raise_signal_before(context, step, signum)
    with pytest.raises(SystemExit) as e:
      train_digits(tmp_path, eval_every=4)
  assert e.value.code == 128 + signum
  assert checkpoint.latest_step(tmp_path) == step
  assert signal.getsignal(signum) == handler
  # Records of a run that went on after its last checkpoint, and a broken line.
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 9, "kind": "train", "loss": 7.0}\n{"step": 9, "ki')
  state = train_digits(tmp_path, eval_every=4)
  workdir, expected = unbroken
  assert same_state(state, expected)
  by_step = lambda workdir: {
    (r["step"], r["kind"]): r for r in records(workdir)
  }
  ours, theirs = by_step(tmp_path), by_step(workdir)
  assert ours.keys() == theirs.keys()
  for key, record in ours.items():
    # A mean over an interval that was cut in two has fewer steps in it.
    if record.get("steps") == 1:
      assert (key, step) == ((6, "train"), 5)
    else:
      assert record == theirs[key]
  starts = json.loads((tmp_path / "run.json").read_text())["starts"]
  assert [s["status"] for s in starts] == ["interrupted", "finished"]
  # TensorBoard's are those of the log, in one file.
  (events,) = tmp_path.glob("events.*")
  accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
  for kind, name in (("train", "loss"), ("eval", "top1")):
    expected = {step: r[name] for (step, k), r in ours.items() if k == kind}
    found = accumulator.Scalars(f"{kind}/{name}")
    assert {e.step: e.value for e in found} == pytest.approx(expected, rel=1e-6)
    assert len(found) == len(expected)


def test_tensorboard_shows_the_confusion_matrix(unbroken):
  """A heat map of 40 pixels a class: white is none, dark blue all of a row."""
  workdir, _ = unbroken
  confusion = evaluate.evaluate_checkpoint(
    workdir_lib.load_config(workdir), workdir
  )["confusion"]
  (events,) = workdir.glob("events.*")
  accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
  images = accumulator.Images("eval/confusion")
  assert [e.step for e in images] == [4, 8, 10]
  last = images[-1]
  pixels = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
  assert pixels.shape == (last.height, last.width, 3) == (400, 400, 3)
  shares = confusion / confusion.sum(1, keepdims=True)
  assert confusion.sum() == 360
  shades = 255 - shares[..., None] * (255 - np.array([8, 48, 107]))
  for corner in (0, 39):
    found = pixels[corner::40, corner::40]
    np.testing.assert_allclose(found, shades, atol=0.51)


def test_the_commit_is_of_the_package_s_own_repository(tmp_path, monkeypatch):
  git = lambda *args: subprocess.run(
    ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
    cwd=tmp_path, check=True, capture_output=True, text=True,
  ).stdout.strip()  # fmt: skip
  git("init")
  inside = tmp_path / ".venv" / "site-packages" / "convmixer_jax"
  for package in (inside, tmp_path / "convmixer_jax"):
    package.mkdir(parents=True)
    (package / "errors.py").touch()
  git("add", "convmixer_jax")
  git("commit", "-mfirst")
  commit = git("rev-parse", "HEAD")

  def found(package):
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    return runtime.provenance()["commit"]

  assert found(tmp_path / "convmixer_jax") == commit
  assert found(inside) is None
  git("add", "--force", ".venv")  # Some commit theirs.
  assert found(inside) is None
  assert found(tmp_path / "convmixer_jax") == f"{commit}+changes"


def test_sighup_stops_a_run_unless_nohup_ignores_it():
  before = signal.getsignal(signal.SIGHUP)
  try:
    for handler, heard in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
      signal.signal(signal.SIGHUP, handler)
      with runtime.stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
      assert received == [signal.SIGHUP] * heard
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_an_evaluation_that_a_signal_stops_is_repeated(
  tmp_path, monkeypatch, portable
):
  """That of step 4, and in the next start the third one, of the last step."""
  eval_batches, calls = evaluate.stream.eval_batches, []

  def stopped(*args, **kwargs):
    calls.append(1)
    if len(calls) in (1, 4):
      signal.raise_signal(signal.SIGTERM)
    yield from eval_batches(*args, **kwargs)

  monkeypatch.setattr(evaluate.stream, "eval_batches", stopped)
  for last_step, evaluated in ((4, []), (10, [4, 8])):
    with pytest.raises(SystemExit):
      train_digits(tmp_path, eval_every=4)
    assert checkpoint.latest_step(tmp_path) == last_step
    steps = [r["step"] for r in records(tmp_path) if r["kind"] == "eval"]
    assert steps == evaluated
  train_digits(tmp_path, eval_every=4)
  steps = [r["step"] for r in records(tmp_path) if r["kind"] == "eval"]
  assert steps == [4, 8, 10]
  starts = workdir_lib.read_starts(tmp_path)["starts"]
  statuses = [start["status"] for start in starts]
  assert statuses == ["interrupted", "interrupted", "finished"]


WITHOUT_TENSORFLOW = """
import importlib.machinery, pathlib, sys

finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *args: (
  None if name == "tensorflow" else find(name, *args)
)
from tensorboard.backend.event_processing import event_accumulator
from convmixer_jax import train
from convmixer_jax.data import sources
from tests import common

workdir, prepared = sys.argv[1:]
config = common.digits_config(**{"data.train_split": "train[:64]"})
train.train_and_evaluate(config, workdir)
(events,) = pathlib.Path(workdir).glob("events.*")
accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
assert [e.step for e in accumulator.Scalars("eval/top1")] == [2]
assert len(sources.open_source("small", prepared, "train", 8)) == 24
"""


def test_it_works_without_tensorflow(tmp_path, tfds_dir):
  """Trains, writes TensorBoard events, and reads a prepared TFDS set."""
  root, _ = tfds_dir
  process = common.run_python(WITHOUT_TENSORFLOW, tmp_path / "run", root)
  assert "Total: 322 -- 1,288 bytes" in process.stdout  # clu's overview.


def test_it_works_without_tensorboard(tmp_path, monkeypatch, capsys, portable):
  monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
  train_digits(tmp_path)
  out = capsys.readouterr().out
  assert "no TensorBoard events" in out
  assert "Total: 322 -- 1,288 bytes" in out  # clu's overview of the parameters.
  chosen = ops.chosen(None, np.float32)
  assert out.count(f"convolutions and BatchNorm: {chosen}\n") == 1
  assert not list(tmp_path.glob("events.*"))
  assert records(tmp_path)


def test_data_wait_is_the_share_of_the_time(tmp_path, monkeypatch):
  """Three seconds for a batch, one for its step, by a clock of our own."""
  now = [0.0]
  clock = types.SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
  monkeypatch.setattr(logger, "time", clock)

  def batches():
    for step in range(1, 9):
      now[0] += 3
      yield step

  log = logger.Logger(
    tmp_path, "{}", first_step=0, total_steps=8, batch_size=2, active=True,
    num_devices=4, peak_rate=1.0,
  )  # fmt: skip
  for step in log.timed(batches()):
    now[0] += 1
    if step == 1:
      log.start_clock(step)
    if step % 3 == 0:
      now[0] += 10  # An evaluation counts neither here nor there.
      log.log_eval(step, None)
    if step in (2, 8):
      log.log_train(step, [{"loss": 1.0}, {"loss": 3.0}])
  log.close("finished", 8)
  for record in workdir_lib.read_metrics(tmp_path):
    assert record["data_wait"] == 75
    assert record["images_per_second"] == 0.5
    assert record["images_per_second_per_device"] == 0.125
    assert record["mfu"] == 12.5
    assert record["loss"] == 2


@pytest.mark.parametrize("more", [{}, {"top5": 2}])  # Of few classes, and old.
def test_records_up_to_the_first_step_stay(tmp_path, more):
  score = {"top1": 1, "loss": 3, "count": 4} | more
  rows = [(4, "train"), (5, "train"), (5, "eval"), (5, "eval"), (6, "eval")]
  lines = [
    json.dumps({"step": step, "kind": kind, "row": i} | score)
    for i, (step, kind) in enumerate(rows)
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  (tmp_path / "first_batch.png").write_bytes(b"\x89PNG\r\n\x1a\n")  # Cut off.
  log = logger.Logger(
    tmp_path, "{}", first_step=5, total_steps=8, batch_size=2, active=True
  )
  log.close("interrupted", 7)
  found = workdir_lib.read_metrics(tmp_path)
  assert [(r["step"], r["kind"]) for r in found] == rows[:4]
  assert workdir_lib.read_eval(tmp_path, 5)["row"] == 3  # The last.
  assert workdir_lib.read_eval(tmp_path, 7) is None
  (start,) = workdir_lib.read_starts(tmp_path)["starts"]
  assert (start["first_step"], start["last_step"]) == (5, 7)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
  path = tmp_path / "run.json"
  path.write_text("old")
  with pytest.raises(UnicodeEncodeError):
    files.write_whole(path, "new, but for \ud800")
  assert path.read_text() == "old"


@pytest.mark.parametrize(
  ("mistake", "error"),
  [
    (lambda x: None, None),
    (lambda x: x + 1, "Disallowed host-to-device"),
    (lambda x: float(x), "an array was read"),
  ],
)
def test_the_loop_moves_only_what_it_means_to(
  tmp_path, monkeypatch, portable, mistake, error
):
  """No implicit transfer, and so no hidden wait, from the first batch on.

  jax's guard sees what goes to a CPU device. What comes from it needs no
  transfer there, so here nothing but jax.device_get may make an array a number.
  """
  batches = recipe_lib.Recipe.train_batches
  device_get = jax.device_get
  x = jax.device_put(np.float32(1))
  read, running, meant = type(x)._value, [], []
  stack = contextlib.ExitStack()

  def guarded(*args):
    stack.enter_context(jax.transfer_guard("disallow"))
    running.append(True)
    yield from batches(*args)

  def get(tree):
    meant.append(True)
    try:
      return device_get(tree)
    finally:
      meant.pop()

  def checked(self):
    assert meant or not running, "an array was read"
    return read.fget(self)

  monkeypatch.setattr(recipe_lib.Recipe, "train_batches", guarded)
  monkeypatch.setattr(jax, "device_get", get)
  monkeypatch.setattr(type(x), "_value", property(checked))
  preempted = lambda self, step: mistake(x) and False
  monkeypatch.setattr(checkpoint.Checkpointer, "preempted", preempted)
  if error:
    stack.enter_context(pytest.raises(Exception, match=error))
  with stack:
    train_digits(tmp_path, eval_every=4, save_every=2)
  assert running
  if not error:
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == ["10", "6", "8"]


def test_seeds_share_a_compiled_program():
  """So that all runs of a sweep's cell but the first start from the cache."""

  def program(**overrides):
    data = sources.Description(64, 10, (8, 8, 3), 8)
    config = common.digits_config(**overrides)
    recipe = recipe_lib.build(config, data, jax.devices()[:1])
    assert recipe.seed == config.seed
    state = jax.eval_shape(recipe.init_state)
    lowered = recipe.train_step.lower(recipe.seed, state, recipe.batch_shapes())
    return lowered.as_text()

  assert program(seed=0) == program(seed=1)
  assert program() != program(**{"augment.flip": True})


def test_init_from_a_run(unbroken, tmp_path, monkeypatch, portable):
  state = unbroken[1]
  source = shutil.copytree(unbroken[0], tmp_path / "source")
  frozen = {"init_from": str(source), "freeze": ("stem", "block_0"), "seed": 3,
            "ema_decay": 0.5}  # fmt: skip

  def stop_before_a_step(*args, **kwargs):
    signal.raise_signal(signal.SIGTERM)
    yield from ()

  with monkeypatch.context() as context:
    context.setattr(train.stream, "train_batches", stop_before_a_step)
    with pytest.raises(SystemExit):
      train_digits(tmp_path / "tuned", **frozen)
  assert checkpoint.latest_step(tmp_path / "tuned") == 0
  tuned = train_digits(tmp_path / "tuned", **frozen)
  for name in ("stem", "block_0"):
    assert same_state(tuned.params[name], state.params[name])
    assert same_state(tuned.ema["params"][name], state.params[name])
  assert not same_state(tuned.params["head"], state.params["head"])
  with pytest.raises(UserError, match=r"is \(8,\); the model\'s is \(4,\)"):
    train_digits(tmp_path / "other", init_from=str(source), **{"model.dim": 4})
  assert not (tmp_path / "other").exists()
  with pytest.raises(UserError, match="none: No such file"):
    train_digits(tmp_path / "other", init_from=str(tmp_path / "none"))
  shutil.rmtree(source)  # Which a resume does not need.
  assert same_state(train_digits(tmp_path / "tuned", **frozen), tuned)


def test_evaluation_refuses_another_model(unbroken, portable):
  config = common.digits_config(**TEN_STEPS)
  config.model.activation, config.data.std = "relu", (0.5, 0.5, 0.5)
  says = (
    r"data\.std is .*; model\.activation is None there and relu here\. Pass"
    r" --config .*/config\.json to start from its own$"
  )
  with pytest.raises(UserError, match=says):
    evaluate.evaluate_checkpoint(config, unbroken[0])
  # Where and how it is scored is free.
  config = common.digits_config(**TEN_STEPS)
  config.data.eval_split = "train[:7]+test[:4]"
  config.batch_size, config.accum_steps = 5, 3
  assert evaluate.evaluate_checkpoint(config, unbroken[0])["count"] == 11


def test_a_run_is_evaluated_with_its_own_config(unbroken, portable):
  workdir, _ = unbroken
  main = functools.partial(common.call, "convmixer_jax.main", "--mode=eval")
  code, out, err = main(f"--workdir={workdir}")
  assert code == 0, err
  expected = records(workdir)[-1]["loss"]
  metrics = json.loads(out.splitlines()[-1])
  assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
  code, out, err = main(
    f"--config={workdir}/config.json", "--config.data.eval_split=train[:7]"
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])["count"] == 7
  code, out, err = common.call("convmixer_jax.main", f"--workdir={workdir}")
  assert (code, err) == (0, "")
  assert "finished at step 10" in out  # Resumed.


@pytest.mark.slow
def test_an_unreadable_image_is_named(photos, tmp_path):
  root = shutil.copytree(photos, tmp_path / "photos")
  broken = root / "train" / CLASSES[1] / "3.jpeg"
  broken.write_bytes(broken.read_bytes()[:300])
  flags = common.flags(
    "configs/digits.py",
    f"data.name=folder data.dir={root} data.eval_split=val"
    " data.num_workers=1 batch_size=16",
  )
  _, err = finish(common.run_main(*flags, f"--workdir={tmp_path / 'run'}"), 2)
  assert err.startswith(f"error: {UserError(str(broken))}: cannot be")
  assert "Traceback" not in err


# Bytes that are not UTF-8; characters that end a line for str.splitlines.
CLASSES = ["Caf\udce9", "a\u2028猫, \x85", "caf\udce9"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Folders of JPEGs: three classes, 33 to train on and 33 to score."""
  root = tmp_path_factory.mktemp("photos")
  for split in ("train", "val"):
    for label, name in enumerate(CLASSES):
      folder = root / split / name
      folder.mkdir(parents=True)
      for i in range(11):
        data = test_data.encoded(test_data.photo(20 * label + i, 40, 30))
        (folder / f"{i}.jpeg").write_bytes(data)
  return root


def test_splits_of_other_classes_are_refused(photos, tmp_path):
  image = next(photos.rglob("*.jpeg"))
  for folder in ("a/cat", "b/dog"):
    (tmp_path / folder).mkdir(parents=True)
    shutil.copy(image, tmp_path / folder)
  config = common.digits_config(**{"data.name": "folder"})
  config.data.update(dir=str(tmp_path), train_split="a", eval_split="b")
  with pytest.raises(
    UserError, match="eval_split=b: its classes are not those"
  ):
    train.train_and_evaluate(config, tmp_path / "run")


def test_encoded_images_train(photos, tmp_path, portable):
  """The path of ImageNet: a folder of JPEGs, cropped by grain on the host."""
  config = common.load_config("configs/imagenet.py")
  config.update_from_flattened_dict({
    "model.name": "convmixer_128_4", "model.dim": 8, "model.depth": 1,
    "model.patch_size": 8, "model.kernel_size": 3, "model.bn_group_size": 8,
    "data.name": "folder", "data.dir": str(photos), "data.eval_split": "val",
    "data.num_workers": 0,  # test_data and test_faults have processes.
    # All fifteen operations take several times as long to compile.
    "augment.randaugment": "rand-m9-mstd0.5-inc1:Rotate",
    "augment.mix_group_size": 8, "data.image_size": 32, "batch_size": 16,
    "accum_steps": 2, "epochs": 2, "log_every": 1, "eval_every": 5,
  })  # fmt: skip
  state = train.train_and_evaluate(config, tmp_path / "run")
  assert int(state.step) == 5  # ceil(2 * 33 / 16)
  assert state.params["head"]["bias"].shape == (3,)
  assert records(tmp_path / "run")[-1]["count"] == 33
  _, _, data = weights.load_model(tmp_path / "run")
  assert data["class_names"] == CLASSES
  metrics = evaluate.evaluate_checkpoint(config, tmp_path / "run")
  assert metrics["count"] == 33
  assert metrics["top1"] == records(tmp_path / "run")[-1]["top1"]


@pytest.mark.slow
def test_a_run_with_moving_averages_resumes_and_evaluates(tmp_path):
  """Everything of the recipe on, so that all of it is resumed exactly."""
  recipe = {
    "ema_decay": 0.8,
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 0.25,
    "augment.randaugment": "rand-m9-mstd0.5-inc1:Rotate,Equalize",
    "augment.mixup_alpha": 0.5,
    "augment.erase_prob": 0.25,
    "model.norm": "layer",
    "save_every": 5,
  }
  state = train_digits(tmp_path / "whole", **recipe)
  shutil.copytree(tmp_path / "whole", tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "checkpoints" / "10")
  assert same_state(train_digits(tmp_path / "broken", **recipe), state)
  config = common.digits_config(**TEN_STEPS, **recipe)
  metrics = evaluate.evaluate_checkpoint(config, tmp_path / "whole")
  last = records(tmp_path / "whole")[-1]
  assert metrics["loss"] == pytest.approx(last["loss"], rel=1e-6)
  loaded = checkpoint.load_variables(tmp_path / "whole")
  assert same_state(loaded["params"], state.ema["params"])
  assert not same_state(loaded["params"], state.params)
  tuned = train_digits(
    tmp_path / "tuned",
    init_from=str(tmp_path / "whole"),
    **{"model.norm": "layer", "ema_decay": 0.5, "optim.learning_rate": 0.0},
  )
  assert same_state(tuned.params, loaded["params"])


def test_a_checkpoint_fits_scanned_and_unrolled_models(tmp_path):
  """To the bit, the optimiser's state and the averages too."""

  @functools.cache
  def fresh(scan, seed):
    model = common.tiny_model(scan=scan)
    tx = common.adamw(models.variable_shapes(model)["params"])
    init = lambda key: step_lib.init_state(key, model, tx, 8, ema=True)
    state = jax.jit(init)(jax.random.key(seed))
    mu = lambda s: s._replace(mu=state.params) if hasattr(s, "mu") else s
    opt_state = jax.tree.map(
      mu, state.opt_state, is_leaf=lambda x: hasattr(x, "mu")
    )
    averages = jax.tree.map(lambda x: x + 1, state.ema)
    return state.replace(opt_state=opt_state, ema=averages)

  for scan in (True, False):
    workdir = tmp_path / str(scan)
    with contextlib.closing(checkpoint.Checkpointer(workdir)) as checkpointer:
      checkpointer.save(1, fresh(scan, 1))
    with contextlib.closing(checkpoint.Checkpointer(workdir)) as checkpointer:
      for template in (fresh(scan, 2), fresh(not scan, 2)):
        restored = checkpointer.restore(template)
        assert same_state(restored, fresh("blocks" in template.params, 1))
        assert not same_state(restored, template)
    loaded = checkpoint.load_variables(workdir)
    assert same_state(loaded, fresh(False, 1).ema)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_a_run_goes_on_with_scan_switched(tmp_path, scan):
  """Within rounding: the same sums in another order."""
  settings = {"model.depth": 2, "ema_decay": 0.8, "save_every": 5}
  other = {"model.scan": scan, "model.remat": "nothing_saveable"}
  plain = {"model.scan": not scan}
  whole = train_digits(tmp_path, **settings, **plain)
  shutil.rmtree(tmp_path / "checkpoints" / "10")
  ours = train_digits(tmp_path, **settings, **other)
  assert ("blocks" in ours.params) == scan
  assert ("blocks" in whole.params) != scan
  ours, whole = map(models.unstack_blocks, (ours, whole))
  assert common.tree_error(ours, whole) <= 2e-5
  # Scored, loaded and tuned from either way.
  config = common.digits_config(**TEN_STEPS, **settings, **plain)
  metrics = evaluate.evaluate_checkpoint(config, tmp_path)
  last = records(tmp_path)[-1]
  assert metrics["loss"] == pytest.approx(last["loss"], rel=1e-5)
  model, variables, _ = weights.load_model(str(tmp_path))
  assert not model.scan
  assert same_state(variables["params"], ours.ema["params"])
  still = {"init_from": str(tmp_path), "optim.learning_rate": 0.0}
  tuned = train_digits(tmp_path / "tuned", **settings, **other, **still)
  assert same_state(
    models.unstack_blocks(tuned.params), jax.device_get(ours.ema["params"])
  )


# --- Real processes.

FLAGS = common.flags(
  "configs/digits.py",
  "model.dim=8 model.depth=1 batch_size=32 epochs=1"
  " log_every=1 eval_every=1000 save_every=4",
)


def finish(process, code=0):
  out, err = process.communicate(timeout=300)
  assert process.returncode == code, out + err
  return out, err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_loses_nothing(photos, tmp_path, signum):
  """Ctrl-C and Slurm reach the processes that decode, too. In any locale."""
  flags = common.flags(
    "configs/imagenet.py",
    "model.name=convmixer_128_4 model.dim=8 model.bn_group_size=0"
    " data.name=folder data.eval_split=val data.image_size=32"
    f" data.num_workers=2 data.dir={photos} augment.mix_group_size=8"
    " batch_size=16 epochs=100000 log_every=1",
  )
  process = common.run_main(
    *flags,
    f"--workdir={tmp_path / 'run'}",
    start_new_session=True,
    environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  )
  for line in process.stdout:
    if line.startswith("step 3/"):
      break
  names = (tmp_path / "run" / "classes.txt").read_bytes()
  assert names == os.fsencode("".join(f"{name}\n" for name in CLASSES))
  os.killpg(process.pid, signum)
  out, err = finish(process, 128 + signum)
  assert "Traceback" not in err
  step = checkpoint.latest_step(tmp_path / "run")
  assert f"step {step} is saved" in out


def read_one_line(process):
  process.stdout.readline()
  process.stdout.close()
  process.stdout = None


@pytest.mark.slow
def test_output_that_nobody_reads(tmp_path):
  """As `| head -1`: a training goes on to its end, predict ends."""
  process = common.run_main(*FLAGS, f"--workdir={tmp_path / 'run'}")
  read_one_line(process)
  finish(process)
  assert scores.finished(tmp_path / "run")
  Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
  process = common.run_main(
    f"--weights={tmp_path / 'run'}", *1000 * [tmp_path / "a.png"],
    module="convmixer_jax.predict",
  )  # fmt: skip
  read_one_line(process)
  _, err = finish(process, 128 + signal.SIGPIPE)
  assert err == ""


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
  """README's figure: the mean of three seeds is at least 98.0 %."""
  top1 = []
  for seed in range(3):
    flags = common.flags("configs/digits.py", f"seed={seed}")
    process = common.run_main(*flags, f"--workdir={tmp_path / str(seed)}")
    assert "finished" in finish(process)[0]
    top1.append(records(tmp_path / str(seed))[-1]["top1"])
  print(top1)
  assert np.mean(top1) >= 98.0


@pytest.mark.slow
def test_cifar10_learns(tmp_path):
  """A hundred steps on the real images end well above chance."""
  if why := common.cifar10_absent():
    pytest.skip(why)
  flags = common.flags(
    "configs/cifar10.py",
    "model.name=convmixer_128_4 model.patch_size=4 batch_size=128 epochs=1"
    " data.train_split=train[:12800] data.eval_split=test[:1000]",
  )
  finish(common.run_main(*flags, f"--workdir={tmp_path}"))
  last = records(tmp_path)[-1]
  assert last["count"] == 1000
  assert last["top1"] > 35


def test_steps_ahead_are_few():
  waited = []
  step = lambda i: types.SimpleNamespace(
    block_until_ready=lambda: waited.append(i)
  )
  results = []
  for i in range(5):
    results.append({"loss": step(i)})
    runtime.bound_memory(results)
  assert waited == [*range(5 - runtime.AHEAD)]


FREED_MEMORY = """
import types
from unittest import mock
import numpy as np
import psutil
from convmixer_jax import runtime

resident = lambda: psutil.Process().memory_info().rss

def bounded(left):
  memory = lambda: types.SimpleNamespace(available=left)
  with mock.patch.object(psutil, "virtual_memory", memory):
    runtime.bound_memory([])
    held = resident()
    runtime._memory_checked = -9  # A second passes.
    runtime.bound_memory([])
  return held, resident()

runtime.keep_pages()
start = resident()
array = np.ones(2**26)
after = np.ones(2**20)  # The heap could not shrink by itself.
del array
print(start, resident(), *bounded(2**40), *bounded(2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_kept_memory_is_returned_when_little_is_left():
  out = common.run_python(FREED_MEMORY).stdout
  start, kept, *roomy, soon, tight = map(int, out.split())
  size = 8 * 2**26
  assert kept - start > size  # Faster steps.
  assert min(*roomy, soon) - start > size
  assert tight - start < size / 2
