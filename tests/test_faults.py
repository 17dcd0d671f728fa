"""Faults, each one injected for real."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from convmixer_jax import checkpoint
from convmixer_jax import replay
from convmixer_jax import train
from convmixer_jax import UserError
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from tests import common
from tests import test_data
from tests.test_train import records
from tests.test_train import same_state

# Ten steps of 32 images.
TEN_STEPS = {"data.train_split": "train[:320]", "log_every": 1, "save_every": 5}


def train_digits(workdir, **overrides):
  config = common.digits_config(**(TEN_STEPS | overrides))
  return train.train_and_evaluate(config, workdir)


# orbax leaves the other reads running when one has failed.
other_reads = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Ten steps, of which the fifth and the last are saved."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, jax.device_get(train_digits(workdir))


@pytest.fixture
def copy(whole, tmp_path):
  return shutil.copytree(whole[0], tmp_path / "copy")


# --- Damaged checkpoints.


def cut(path, rng):
  os.truncate(path, rng.integers(path.stat().st_size))


def flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


@pytest.mark.slow
@other_reads
@pytest.mark.parametrize("damage", [cut, flip, lambda path, rng: path.unlink()])
def test_a_damaged_checkpoint_is_said_and_passed_over(
  whole, tmp_path, capfd, damage
):
  """Every file of the newest one, in turn."""
  source, tenth = whole
  rng = np.random.default_rng(0)
  newest = source / "checkpoints" / "10"
  files = [p.relative_to(source) for p in newest.rglob("*") if p.is_file()]
  passed_over = 0
  for i, name in enumerate(sorted(files)):
    workdir = shutil.copytree(source, tmp_path / str(i))
    if not (workdir / name).stat().st_size:
      continue
    damage(workdir / name, rng)
    with contextlib.closing(checkpoint.Checkpointer(workdir)) as checkpointer:
      state = checkpointer.restore(tenth_like(tenth))
      err = capfd.readouterr().err
      if int(state.step) == 10:  # The damage was of no consequence.
        assert same_state(state, tenth), name
        continue
      passed_over += 1
      assert int(state.step) == 5
      assert "the checkpoint of step 10 is damaged" in err, name
      assert (workdir / "damaged" / "10").is_dir()
      # The run may save this step again.
      checkpointer.save(10, jax.device_put(tenth))
    assert same_state(checkpoint.load_variables(workdir)["params"],
                      tenth.params)  # fmt: skip
  assert passed_over >= 4


def tenth_like(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.device_put(state, device)


@other_reads
def test_a_run_goes_on_from_the_one_before_the_damaged(whole, copy, capfd):
  # As large as they are, the arrays are where bits flip.
  data = max((copy / "checkpoints" / "10").rglob("d/*"), key=os.path.getsize)
  flip(data, np.random.default_rng(1))
  with pytest.raises(UserError, match="10: is damaged"):
    checkpoint.load_variables(copy)
  state = train_digits(copy)
  assert "going on in" in capfd.readouterr().out
  assert same_state(state, whole[1])
  assert same_state(checkpoint.load_variables(copy)["params"], whole[1].params)


@other_reads
def test_when_all_are_damaged_nothing_is_lost(copy):
  for path in copy.glob("checkpoints/*/_CHECKPOINT_METADATA"):
    path.unlink()
  before = sorted(copy.rglob("*"))
  with pytest.raises(UserError, match="no checkpoint can be read; of step 10"):
    train_digits(copy)
  assert [p for p in sorted(copy.rglob("*")) if p.name != "lock"] == [
    p for p in before if p.name != "lock"
  ]


# --- Two runs in a workdir, and other configs.


def test_a_second_run_is_refused_and_a_stale_lock_is_not(whole, copy):
  with (
    workdir_lib.locked(copy),
    pytest.raises(UserError, match=f"in use by process {os.getpid()} on "),
  ):
    train_digits(copy)
  (copy / "lock").write_text("process 1 on another since long ago\n")
  assert same_state(train_digits(copy), whole[1])


def test_a_changed_config_is_accepted_when_told(copy):
  shutil.rmtree(copy / "checkpoints" / "10")
  config = common.digits_config(**TEN_STEPS)
  config.optim.learning_rate = 0.5
  change = r"optim\.learning_rate is 0\.01 there and 0\.5 here"
  with pytest.raises(UserError, match=rf"{change}.*--accept_changes"):
    train.train_and_evaluate(config, copy)
  state = train.train_and_evaluate(config, copy, accept_changes=True)
  assert int(state.step) == 10
  start = json.loads((copy / "run.json").read_text())["starts"][-1]
  assert start["changes"] == ["optim.learning_rate is 0.01 there and 0.5 here"]
  assert start["first_step"] == 5
  config.model.dim = 4
  with pytest.raises(UserError, match=r"10: .* is \(8,\) there and \(4,\) in"):
    train.train_and_evaluate(config, copy, accept_changes=True)
  assert (copy / "checkpoints" / "10").is_dir()


# --- No numbers.


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_no_number_stops_the_run(
  tmp_path, monkeypatch, log_every
):
  """A learning rate that leaps: the update of step 7 ruins the parameters."""
  make_schedule = train.optim.make_schedule

  def leaping(*args):
    schedule = make_schedule(*args)
    return lambda count: jax.numpy.where(count == 6, 1e38, schedule(count))

  monkeypatch.setattr(train.optim, "make_schedule", leaping)
  with pytest.raises(UserError, match=r"step 8: loss (nan|inf)") as e:
    train_digits(tmp_path, log_every=log_every, save_every=3)
  assert "step 6 is saved" in str(e.value)
  assert f"replay --workdir {tmp_path} --step 8" in str(e.value)
  assert checkpoint.latest_step(tmp_path) == 6
  params = checkpoint.load_variables(tmp_path)["params"]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  record = json.loads((tmp_path / "nonfinite.json").read_text())
  assert record["step"] == 8
  (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
  assert start["status"] == "failed"
  again = replay.replay(tmp_path, 8)
  assert again["start"] == 6
  assert str(np.float32(again["metrics"]["loss"])) == record["loss"]
  assert again["images"] == record["images"]
  assert len(set(record["images"])) == 32


def test_replay_is_the_step_that_was_done(whole, tmp_path):
  """From the beginning, and from a checkpoint."""
  by_step = {r["step"]: r for r in records(whole[0]) if r["kind"] == "train"}
  for step, start in ((2, 0), (7, 5)):
    again = replay.replay(whole[0], step)
    assert (again["step"], again["start"]) == (step, start)
    for name in ("loss", "grad_norm", "top1"):
      assert again["metrics"][name] == by_step[step][name]
    norms = np.array([*again["layers"].values()])
    assert np.hypot.reduce(norms) == pytest.approx(
      again["metrics"]["grad_norm"], rel=1e-5
    )
    assert set(again["layers"]) == {
      "stem", "stem_norm", "block_0/depthwise", "block_0/depthwise_norm",
      "block_0/pointwise", "block_0/pointwise_norm", "head",
    }  # fmt: skip
  with pytest.raises(UserError, match="--step=11: the run has 10"):
    replay.replay(whole[0], 11)
  with pytest.raises(UserError, match=r"config\.json: No such file"):
    replay.replay(tmp_path, 1)


# --- Processes that decode.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  root = tmp_path_factory.mktemp("photos")
  for label in range(2):
    folder = root / "train" / f"class_{label}"
    folder.mkdir(parents=True)
    for i in range(8):
      data = test_data.encoded(test_data.photo(8 * label + i, 40, 30))
      (folder / f"{i}.jpeg").write_bytes(data)
  return sources.open_source("folder", str(root), "train", 32)


def decode_for_ever(photos, **settings):
  return stream.train_batches(
    photos,
    seed=0,
    batch_size=4,
    rows=np.arange(4),
    start=0,
    stop=10**6,
    image_size=32,
    num_workers=1,
    scale=(0.5, 1.0),
    ratio=(1.0, 1.0),
    interpolation="bilinear",
    **settings,
  )


@pytest.mark.parametrize(
  ("signum", "message"),
  [
    (signal.SIGKILL, "terminated unexpectedly with exit code -9"),
    (signal.SIGSTOP, r"no batch came in 4 s .*process \d+, T \(stopped\)"),
  ],
)
def test_a_worker_that_is_killed_or_stuck_is_named(
  photos, monkeypatch, signum, message
):
  monkeypatch.setattr(stream, "PATIENCE", 4.0)
  before = set(multiprocessing.active_children())
  stopped = []
  batches = decode_for_ever(photos, stopped=lambda: stopped)
  monkeypatch.setattr(stream, "PATIENCE", 60.0)  # It takes a while to start.
  next(batches)
  monkeypatch.setattr(stream, "PATIENCE", 4.0)
  (worker,) = set(multiprocessing.active_children()) - before
  os.kill(worker.pid, signum)
  with pytest.raises(UserError, match=message):
    for _ in batches:
      pass
  worker.join(10)
  assert not worker.is_alive()


def test_a_signal_is_seen_while_a_worker_is_stuck(photos):
  before = set(multiprocessing.active_children())
  signalled = []
  comes = lambda: signalled and time.monotonic() > signalled[0] + 2
  batches = decode_for_ever(photos, stopped=comes)
  next(batches)
  (worker,) = set(multiprocessing.active_children()) - before
  os.kill(worker.pid, signal.SIGSTOP)
  signalled.append(time.monotonic())
  for _ in batches:  # Those that it had made before, and then no more.
    pass
  worker.join(10)
  assert not worker.is_alive()
