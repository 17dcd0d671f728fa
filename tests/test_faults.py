"""Faults, each one injected for real."""

import contextlib
import errno
import json
import multiprocessing
import os
from pathlib import Path
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from convmixer_jax import checkpoint
from convmixer_jax import files
from convmixer_jax import ops
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import replay
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import workers
from convmixer_jax.errors import UserError
from tests import common
from tests import test_train
from tests.test_train import finish
from tests.test_train import FLAGS
from tests.test_train import records
from tests.test_train import same_state

photos = test_train.photos

# Ten steps of 32 images.
TEN_STEPS = {"data.train_split": "train[:320]", "log_every": 1, "save_every": 5}


def train_digits(workdir, **overrides):
  config = common.digits_config(**(TEN_STEPS | overrides))
  return train.train_and_evaluate(config, workdir)


@pytest.fixture(scope="module", autouse=True)
def portable():
  """See conftest.py; here for the fixtures of this module too."""
  with ops.portable():
    yield


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


def test_damage_is_described_by_its_cause(tmp_path):
  error = Exception("Encountered error while reading array index: (0, 1)")
  error.__cause__ = ValueError("DATA_LOSS: checksum verification failed")
  assert files.damage(tmp_path, error) == str(error.__cause__)


def test_nothing_is_said_of_reads_that_were_left():
  """Coroutines, as orbax leaves them when a checkpoint is damaged."""
  code = """if True:
    import types
    from absl import flags
    from convmixer_jax import cli

    @types.coroutine
    def wait():
      yield

    async def read():
      try:
        await wait()
      except GeneratorExit as e:
        raise Exception("array") from e

    def main():
      read()
      started = read()
      started.send(None)
      del started

    cli.run(main, flags.FLAGS)
  """
  assert not common.run_python(code).stderr


def test_a_run_goes_on_from_the_one_before_the_damaged(whole, copy, capfd):
  newest = copy / "checkpoints" / "10"
  metadata = (newest / "_CHECKPOINT_METADATA").read_text()
  changed = json.loads(metadata)  # As if the array were.
  changed["custom_metadata"]["crc32"]["params/head/bias"] ^= 1
  (newest / "_CHECKPOINT_METADATA").write_text(json.dumps(changed))
  with pytest.raises(UserError, match="head/bias does not match its checksum"):
    checkpoint.load_variables(copy)
  (newest / "_CHECKPOINT_METADATA").write_text(metadata)
  arrays = (newest / "default" / "d").iterdir()
  largest = max(arrays, key=os.path.getsize)
  os.truncate(largest, largest.stat().st_size // 2)
  with pytest.raises(UserError, match="10: is damaged"):
    checkpoint.load_variables(copy)
  state = train_digits(copy)
  assert "resuming" in capfd.readouterr().out
  assert same_state(state, whole[1])
  assert same_state(checkpoint.load_variables(copy)["params"], whole[1].params)


def test_when_all_are_damaged_nothing_is_lost(copy):
  for path in copy.glob("checkpoints/*/_CHECKPOINT_METADATA"):
    path.unlink()
  before = {*copy.rglob("*")}
  with pytest.raises(UserError, match=r"no checkpoint can be read; .* step 10"):
    train_digits(copy)
  assert {*copy.rglob("*")} == before


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "default/d/*"])
def test_a_disk_that_fails_is_not_called_damage(copy, name):
  """What cannot be read, here because of EIO, stays where it is."""
  file = max((copy / "checkpoints" / "10").glob(name), key=os.path.getsize)
  file.unlink()
  file.symlink_to("/proc/self/mem")
  for use in (train_digits, checkpoint.load_variables):
    with pytest.raises(UserError, match="10: cannot be read: Input/output err"):
      use(copy)
  assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["10", "5"]


@pytest.mark.parametrize("cut_short", [False, True])
def test_processes_that_judge_apart_stop(copy, monkeypatch, cut_short):
  """Whether it is this one or another that finds damage."""
  if cut_short:
    os.truncate(copy / "checkpoints" / "10" / "_CHECKPOINT_METADATA", 9)
  other = lambda verdict: np.array([verdict, 1 - verdict])
  monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", other)
  process = 0 if cut_short else 1
  with pytest.raises(
    UserError, match=f"10: .* in process {process}, but in ot"
  ):
    train_digits(copy)
  assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["10", "5"]


def test_what_is_saved_outlasts_a_power_failure(tmp_path, monkeypatch):
  """Each file is forced to the disk after its last change."""
  forced = {}

  def fsync(number):
    status = os.fstat(number)
    forced[status.st_ino] = status.st_mtime_ns, status.st_size

  monkeypatch.setattr(os, "fsync", fsync)
  train_digits(tmp_path, save_every=4)
  names = ["config.json", "run.json", "classes.txt", "metrics.jsonl"]
  files = [p for p in tmp_path.glob("checkpoints/**/*") if p.is_file()]
  assert len({p.relative_to(tmp_path).parts[1] for p in files}) == 3
  for path in [*files, *map(tmp_path.joinpath, names)]:
    status = path.stat()
    wanted = status.st_mtime_ns, status.st_size
    assert forced.get(status.st_ino) == wanted, path
  for folder in (tmp_path, tmp_path / "checkpoints"):
    assert folder.stat().st_ino in forced


# --- Two runs in a workdir, and other configs.


def test_a_second_run_is_refused_and_a_stale_lock_is_not(whole, copy):
  with (
    workdir_lib.locked(copy),
    pytest.raises(UserError, match=f"in use by process {os.getpid()} on "),
  ):
    train_digits(copy)
  stale = f"process 1 on {'another' * 20} since long ago\n"
  (copy / "lock").write_text(stale)
  assert same_state(train_digits(copy), whole[1])
  (line,) = (copy / "lock").read_text().splitlines()
  assert line.startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EIO"])
def test_a_file_system_without_locks_is_used(
  tmp_path, monkeypatch, capsys, name
):
  def fail(*args):
    raise OSError(getattr(errno, name), "is what flock says")

  monkeypatch.setattr(workdir_lib.fcntl, "flock", fail)
  if name == "EIO":  # It has locks, and does not work.
    with pytest.raises(UserError, match="lock: is what flock says"):
      workdir_lib.locked(tmp_path).__enter__()
    return
  with workdir_lib.locked(tmp_path):
    assert "has no locks; do not start a second" in capsys.readouterr().err


def test_a_changed_config_is_accepted_when_told(copy):
  shutil.rmtree(copy / "checkpoints" / "10")
  config = common.digits_config(**TEN_STEPS)
  config.optim.learning_rate = 0.5
  change = r"optim\.learning_rate is 0\.01 there and 0\.5 here"
  with pytest.raises(UserError, match=rf"{change}.*--accept_changes"):
    train.train_and_evaluate(config, copy)
  # Neither may the images of a step change: epochs would leap.
  for name, value, refused in (
    ("batch_size", 64, "batch_size is 32 there and 64 here"),
    (
      "data.train_split",
      "train[:352]",
      r"had 320 .* and has 352 here",
    ),
  ):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=refused):
      train.train_and_evaluate(other, copy, accept_changes=True)
  config.data.train_split = "train[320:640]"  # As many.
  state = train.train_and_evaluate(config, copy, accept_changes=True)
  assert int(state.step) == 10
  start = json.loads((copy / "run.json").read_text())["starts"][-1]
  assert start["changes"] == [
    "data.train_split is train[:320] there and train[320:640] here",
    "optim.learning_rate is 0.01 there and 0.5 here",
  ]
  assert start["first_step"] == 5
  # What was done before has no config any more.
  assert replay.replay(copy, 7)["start"] == 5
  with pytest.raises(
    UserError, match=r"=3: .* at step 5 \(.*optim.*0\.5 here\)"
  ):
    replay.replay(copy, 3)
  config.model.dim = 4
  with pytest.raises(UserError, match=r"10: .* is \(8,\) in the .* and \(4,\)"):
    train.train_and_evaluate(config, copy, accept_changes=True)
  assert (copy / "checkpoints" / "10").is_dir()


def test_a_run_beyond_its_end_is_refused(copy, monkeypatch):
  monkeypatch.setattr(recipe_lib.Recipe, "total_steps", 7)
  with pytest.raises(UserError, match=r"is at step 10, but .* give 7 steps"):
    train_digits(copy)


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/*"])
def test_records_without_checkpoints_are_kept(copy, gone):
  for path in copy.glob(gone):
    shutil.rmtree(path)
  before = (copy / "metrics.jsonl").read_bytes()
  for _ in range(2):
    with pytest.raises(UserError, match="of a run, but no checkpoints; put"):
      train_digits(copy)
  assert (copy / "metrics.jsonl").read_bytes() == before
  # A run that was killed before its first checkpoint begins again.
  (copy / "checkpoints").mkdir(exist_ok=True)
  (copy / "run.json").write_text('{"starts": [{"first_step": 0}]}')
  assert not workdir_lib.lacks_checkpoints(copy)


# --- No numbers.


@pytest.mark.parametrize(
  "log_every", [1, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_loss_that_is_no_number_stops_the_run(
  tmp_path, monkeypatch, log_every
):
  """A learning rate that leaps: the update of step 7 ruins the parameters."""
  make_schedule = recipe_lib.optim.make_schedule

  def leaping(*args):
    schedule = make_schedule(*args)
    return lambda count: jax.numpy.where(count == 6, 1e38, schedule(count))

  monkeypatch.setattr(recipe_lib.optim, "make_schedule", leaping)
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
  images = np.random.default_rng((0, 0)).permutation(320)[7 * 32 : 8 * 32]
  assert record["images"] == again["images"] == images.tolist()


@pytest.mark.slow
def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
  norm = lambda _: jax.numpy.float32(np.nan)
  monkeypatch.setattr(recipe_lib.step_lib.optax.tree, "norm", norm)
  with pytest.raises(UserError, match=r"step 1: loss 2\..*, gradient norm nan"):
    train_digits(tmp_path, log_every=1)


def test_replay_is_the_step_that_was_done(whole, tmp_path):
  """From the beginning, and from a checkpoint."""
  by_step = {r["step"]: r for r in records(whole[0]) if r["kind"] == "train"}
  for step, start in ((5, 0), (7, 5)):
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


@pytest.fixture
def decoding(photos):
  """`stopped` -> batches of which the first has come, and their only worker."""
  source = sources.open_source("folder", str(photos), "train", 32)
  before = set(multiprocessing.active_children())

  def begin(stopped):
    batches = common.decode_for_ever(source, stopped=stopped)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    return batches, worker

  yield begin
  for worker in set(multiprocessing.active_children()) - before:
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize(
  ("signum", "message"),
  [
    (signal.SIGKILL, r"^Data worker \d+ exited with code -9 \(out of mem"),
    (signal.SIGBUS, r"^Data worker \d+ .* -7: .*, /dev/shm, is full; enl"),
    (signal.SIGSTOP, r"^No batch was loaded in 4 s \(worker \d+, T \(sto"),
  ],
)
def test_a_worker_that_is_killed_or_stuck_is_named(
  decoding, monkeypatch, signum, message
):
  batches, worker = decoding(stopped=lambda: False)
  monkeypatch.setattr(workers, "PATIENCE", 4.0)
  os.kill(worker.pid, signum)
  with pytest.raises(UserError, match=message):
    for _ in batches:
      pass


@pytest.mark.slow
def test_a_worker_that_dies_with_a_lock_is_not_waited_for(photos, tmp_path):
  """Neither when the batches end nor when the program does."""
  process = common.run_main(
    photos, tmp_path / "flag", module="tests.dying_worker"
  )
  out, err = process.communicate(timeout=120)
  assert process.returncode == 2, err
  assert out.startswith("a batch\n")
  assert re.match(
    r"error: Data worker \d+ exited with code -9 \(out of memory\?\); .*\n",
    err,
  )


def test_a_signal_is_seen_while_a_worker_is_stuck(decoding):
  signalled = []
  comes = lambda: signalled and time.monotonic() > signalled[0] + 2
  batches, worker = decoding(stopped=comes)
  os.kill(worker.pid, signal.SIGSTOP)
  signalled.append(time.monotonic())
  for _ in batches:  # Those that it had made before, and then no more.
    pass


# --- Disks.


@pytest.fixture
def mounted(tmp_path):
  """Mounts a file system of so many bytes; returns its folder."""
  folder = tmp_path / "mounted"
  folder.mkdir()

  def mount(size):
    done = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
      capture_output=True,
      text=True,
    )
    if done.returncode:
      pytest.skip(f"NO RIGHT TO MOUNT: {done.stderr.strip()}")
    return folder

  yield mount
  subprocess.run(["umount", "-l", folder], capture_output=True)


def fill(path):
  """Writes to it until the disk is full."""
  with open(path, "wb", buffering=0) as file:
    for size in (1 << 16, 1 << 9, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))
    with pytest.raises(OSError, match="No space left on device"):
      file.write(b"0")


def before_step(monkeypatch, step, act):
  """Calls `act` while the batch of that update is being made."""
  batches = recipe_lib.Recipe.train_batches

  def acting(self, start, *args):
    for done, batch in enumerate(batches(self, start, *args), start):
      if done + 1 == step:
        act()
      yield batch

  monkeypatch.setattr(recipe_lib.Recipe, "train_batches", acting)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("full_at", "log_every"),
  [
    (6, 1),  # The log and TensorBoard's events cannot be written any more,
    (7, 100),  # or else the checkpoint of step 10,
    (5, 100),  # or that of step 5, the first.
  ],
)
def test_a_full_disk_loses_nothing(
  whole, mounted, monkeypatch, capfd, full_at, log_every
):
  folder = mounted("2m")
  workdir, filler = folder / "run", folder / "filler"

  def fill_disk():
    while full_at > 5 and not (workdir / "checkpoints" / "5").exists():
      time.sleep(0.01)  # It is written in the background.
    fill(filler)

  with monkeypatch.context() as context:
    before_step(context, full_at, fill_disk)
    with pytest.raises(UserError, match="No space left on device"):
      train_digits(workdir, log_every=log_every)
  saved = [5] if full_at > 5 else []
  with contextlib.closing(checkpoint.Checkpointer(workdir)) as checkpointer:
    state = checkpointer.restore(tenth_like(whole[1]))
    assert ([int(state.step)] if state else []) == saved
  assert "Traceback" not in capfd.readouterr().err
  filler.unlink()
  assert same_state(train_digits(workdir, log_every=log_every), whole[1])
  if log_every == 1:
    assert records(workdir) == records(whole[0])


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(whole, mounted):
  folder = mounted("2m")
  shutil.copytree(whole[0], folder / "run")
  shutil.rmtree(folder / "run" / "checkpoints" / "10")
  remount = ["mount", "-o", "remount,ro", folder]
  subprocess.run(remount, check=True)
  for workdir in (folder / "run", folder / "new"):
    with pytest.raises(UserError, match=f"{workdir}: Read-only file system"):
      train_digits(workdir)
  subprocess.run([*remount[:2], "remount,rw", folder], check=True)
  assert same_state(train_digits(folder / "run"), whole[1])


@pytest.mark.slow
def test_a_power_failure_after_the_end(tmp_path):
  """The disk is copied without what is only in memory."""

  def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f"NO RIGHT TO MOUNT: {done.stderr.strip()}")

  disk, copied, folder = (tmp_path / name for name in ("disk", "copied", "at"))
  folder.mkdir()
  disk.touch()
  os.truncate(disk, 64 << 20)
  run("mkfs.ext4", "-q", "-F", disk)
  states = []
  for image in (disk, copied):
    run("mount", "-o", "loop,noauto_da_alloc", image, folder)
    try:
      states.append(train_digits(folder / "run"))
      if image is disk:
        shutil.copy(disk, copied)
        expected = records(folder / "run")
      assert records(folder / "run") == expected
      (start,) = workdir_lib.read_starts(folder / "run")["starts"]
    finally:
      run("umount", "-l", folder)
  assert start["status"] == "finished"
  assert same_state(*states)


@pytest.mark.slow
def test_a_disk_that_goes_away(mounted, monkeypatch):
  folder = mounted("2m")

  def go_away():
    while not (folder / "run" / "checkpoints" / "5").exists():
      time.sleep(0.01)  # It is written in the background.
    subprocess.run(["umount", "-l", folder], check=True)

  before_step(monkeypatch, 7, go_away)
  with pytest.raises(UserError, match="checkpoints: no longer exists"):
    train_digits(folder / "run")
  assert not [*folder.iterdir()]


# --- Signals to real processes.


def save_files(workdir):
  """Those of checkpoints that are being written."""
  return [*Path(workdir).glob("checkpoints/*.orbax-checkpoint-tmp*")]


@pytest.mark.slow
def test_sigkill_at_thirty_moments(tmp_path):
  """One before the first checkpoint, the others uniform, in one run.

  Some come while a checkpoint is being written. At the end the whole state, and
  the log, are those of a run that nothing happened to; and so is its evaluation
  on four devices, by batches of 50 that neither divides.
  """
  flags = (*FLAGS, "--config.epochs=40", "--config.save_every=10")
  whole = common.run_main(*flags, f"--workdir={tmp_path / 'whole'}")
  killed = tmp_path / "killed"
  rng = random.Random()
  moments = [5, *sorted(rng.uniform(11, 1796) for _ in range(29))]
  print(f"moments: {[round(m) for m in moments]}")
  inside = 0
  for number, moment in enumerate(moments):
    process = common.run_main(*flags, f"--workdir={killed}")
    for line in process.stdout:
      step = re.match(r"step (\d+)/", line)
      if step and int(step[1]) >= moment:
        break
    # Every third waits for the next checkpoint to be begun.
    deadline = time.monotonic() + 10
    while number % 3 == 0 and time.monotonic() < deadline:
      if save_files(killed):
        break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    inside += bool(save_files(killed))
  print(f"inside a write: {inside}")
  assert inside >= 5
  out, err = finish(common.run_main(*flags, f"--workdir={killed}"))
  assert "warning" not in err
  assert "step 1797/1797" in out
  finish(whole)
  whole_state, ours = map(checkpoint.load_state, (tmp_path / "whole", killed))
  assert same_state(ours, whole_state)
  assert records(killed) == records(tmp_path / "whole")
  assert not save_files(killed)
  flags = (*flags, f"--workdir={killed}", "--mode=eval")
  process = common.run_main(*flags, "--config.batch_size=50", devices=4)
  line, *_, last = finish(process)[0].strip().splitlines()
  metrics, expected = json.loads(last), records(killed)[-1]
  assert f"top-1 {expected['top1']:.2f} %" in line
  assert metrics["count"] == 360
  for name in ("top1", "top5", "loss"):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
def test_sigterm_saves_and_ends_within_ten_seconds(tmp_path):
  flags = (*FLAGS, "--config.epochs=100000", f"--workdir={tmp_path}")
  process = common.run_main(*flags)
  for line in process.stdout:
    if line.startswith("step 100/"):
      break
  # While it runs, another is refused, and does it no harm.
  _, err = finish(common.run_main(*flags), 2)
  assert err.startswith(f"error: --workdir={tmp_path}: in use by process ")
  assert len(err.splitlines()) == 1
  process.terminate()
  start = time.monotonic()
  out, err = finish(process, 128 + signal.SIGTERM)
  assert time.monotonic() - start < 10
  assert not err
  step = checkpoint.latest_step(tmp_path)
  assert f"stopped by SIGTERM: step {step} is saved" in out
  assert step > 100
  # Before the first step there is nothing to save, and it ends at once.
  process = common.run_main(*flags, "--config.log_every=1000000")
  for line in process.stdout:
    if line.startswith("resuming"):
      break
  process.terminate()
  process.communicate(timeout=10)
  assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
  assert checkpoint.latest_step(tmp_path) >= step


@pytest.mark.slow
def test_a_clock_that_jumps_loses_nothing(tmp_path):
  """Ten years ahead, and eleven back.

  If that happens while a checkpoint is being written, tensorstore ends the
  process, or orbax takes the write to have timed out: the run is started again.
  """
  library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
  if library is None:
    pytest.skip("NO LIBFAKETIME: apt-get install faketime")
  flags = (*FLAGS, "--config.epochs=4")
  jumping, steady = tmp_path / "jumping", tmp_path / "steady"
  now = tmp_path / "now"
  now.write_text("+0d")
  code = steps = 0
  for _ in range(10):
    process = common.run_main(
      *flags,
      f"--workdir={jumping}",
      environment={
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
      },
    )
    for line in process.stdout:
      steps += line.startswith("step ")
      now.write_text(("+3650d", "-400d")[steps // 50 % 2])
    _, err = process.communicate()
    code = process.returncode
    print(f"exit code {code} after {steps} steps", err)
    if code == 0:
      break
    if code != -signal.SIGABRT:
      assert code == 2
      assert re.fullmatch(
        r"error: .*/checkpoints: cannot be written: .* timed out after .*\."
        r" What is saved there is intact; rerun the command to resume from it",
        err.splitlines()[-1],
      )
  assert code == 0
  finish(common.run_main(*flags, f"--workdir={steady}"))
  assert records(jumping) == records(steady)
  assert len({r["time"][:4] for r in workdir_lib.read_metrics(jumping)}) > 1
  assert same_state(*map(checkpoint.load_state, (jumping, steady)))
