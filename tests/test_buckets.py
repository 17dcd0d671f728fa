"""Runs, data and weights in a bucket, with faults; see gcs.py."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from convmixer_jax import checkpoint
from convmixer_jax import files
from convmixer_jax import ops
from convmixer_jax import train
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.buckets import cache
from convmixer_jax.buckets import lease
from convmixer_jax.buckets import mirror
from convmixer_jax.buckets import paths
from convmixer_jax.data import folder as folder_lib
from convmixer_jax.data import sources
from convmixer_jax.errors import InUse
from convmixer_jax.errors import UserError
from experiments import cells as cells_lib
from experiments import run as run_lib
from experiments import runs as runs_lib
from experiments import sweeps
from tests import common
from tests import gcs
from tests import test_data
from tests import test_distributed
from tests import test_train
from tests.test_train import finish
from tests.test_train import FLAGS
from tests.test_train import records
from tests.test_train import same_state

pytestmark = [
  pytest.mark.skipif(gcs.MISSING != "", reason=gcs.MISSING),
  # Connections that nobody needs any more are closed by their deletion.
  pytest.mark.filterwarnings("ignore::ResourceWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
tfds_dir = test_data.tfds_dir
photos = test_train.photos

TEN_STEPS = {"data.train_split": "train[:320]", "log_every": 1, "save_every": 5}


@pytest.fixture(scope="module", autouse=True)
def portable():
  """See conftest.py; here for the fixtures of this module too."""
  with ops.portable():
    yield


@pytest.fixture(scope="module")
def service():
  """One for all tests: clients keep their connections."""
  with gcs.Bucket() as bucket, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment.items():
      patch.setenv(name, value)
    yield bucket


@pytest.fixture
def bucket(service, tmp_path, monkeypatch):
  """A bucket without faults, and with a cache of its own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  yield service
  service.start()
  service.faults.clear()
  service.delay, service.bandwidth = 0.0, float("inf")


COUNTER = itertools.count()


@pytest.fixture
def url(bucket):
  """A folder of the bucket for one test."""
  return f"{bucket.url}/{next(COUNTER)}"


def train_digits(workdir, accept_changes=False, **overrides):
  config = common.digits_config(**(TEN_STEPS | overrides))
  return train.train_and_evaluate(
    config, workdir, accept_changes=accept_changes
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Ten steps on a disk."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, jax.device_get(train_digits(workdir))


def key(url):
  """The name of an object without the bucket's."""
  return str(url).removeprefix(f"{gcs.Bucket.url}/")


# --- Paths.


def test_a_bucket_path_is_used_as_pathlibs(url):
  top = files.path(url)
  assert str(files.path(str(top).replace("//", "/"))) == str(top)
  file = top / "a" / "b.json"
  assert (file.name, file.suffix, file.parent) == ("b.json", ".json", top / "a")
  assert file.with_name("c") == top / "a" / "c"
  assert files.absolute(file) == file
  assert not file.exists()
  assert not top.is_dir()
  assert [*top.iterdir()] == []
  with pytest.raises(FileNotFoundError, match=re.escape(str(file))):
    file.read_bytes()
  with pytest.raises(FileNotFoundError):
    file.unlink()
  file.unlink(missing_ok=True)
  file.write_text("é\n")
  assert file.read_text() == "é\n"
  assert (file.exists(), file.is_file(), file.is_dir()) == (True, True, False)
  assert (top.exists(), top.is_dir(), top.is_file()) == (True, True, False)
  assert [*top.iterdir()] == [top / "a"]
  assert [*top.objects()] == [file]
  file.copy(top / "copy")
  with pytest.raises(FileExistsError):
    file.create(b"x")
  file.unlink()
  assert [*top.iterdir()] == [top / "copy"]
  with pytest.raises(UserError, match=r"^gs:.*: must be gs://BUCKET/PATH$"):
    files.path("gs://")
  with pytest.raises(UserError, match=r"^nope://: must be gs:// or s3://$"):
    files.exists("nope://a/b")


def test_the_client_of_a_scheme_is_named(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
  with pytest.raises(UserError, match=r"^s3://: .*; pip install s3fs, or"):
    files.exists("s3://a/b")


def test_a_role_that_lacks_a_permission(bucket, url):
  """orbax asks for the bucket's kind before it deletes a checkpoint."""
  with (
    bucket.inject(403, r"GET /storage/v1/b/runs\?"),
    pytest.raises(UserError, match=rf"{url}/checkpoints: cannot be wri.*403"),
  ):
    train_digits(url, save_every=2)
  assert checkpoint.latest_step(url) >= 6


def test_orbax_needs_gs(capsys):
  text = "=s3://b/r: orbax keeps checkpoints on a disk or in gs:// only"
  with pytest.raises(UserError, match=f"--workdir{text}"):
    train_digits("s3://b/r")
  code, _, err = common.call("experiments.run", "smoke", "--root=s3://b/r")
  assert (code, err) == (2, f"error: --root{text}\n")


@pytest.mark.parametrize("status", [401, 403])
def test_a_denial_is_one_line(bucket, url, status):
  with bucket.inject(status, key(url)), pytest.raises(UserError) as e:
    train_digits(url)
  assert str(e.value).startswith(f"{url}/config.json: ")
  assert "\n" not in str(e.value)


# --- Runs.


def test_a_run_is_the_same_as_on_a_disk(bucket, url, whole):
  state = jax.device_get(train_digits(url))
  assert same_state(state, whole[1])
  assert records(url) == records(whole[0])
  assert same_state(checkpoint.load_state(url), checkpoint.load_state(whole[0]))
  (start,) = workdir_lib.read_starts(url)["starts"]
  assert (start["status"], start["last_step"]) == ("finished", 10)
  names = {path.name for path in files.path(url).iterdir()}
  events = {name for name in names if name.startswith("events.out.tfevents.")}
  assert len(events) == 1
  assert names - events == {
    "checkpoints", "classes.txt", "config.json", "first_batch.png", "lock.1",
    "metrics.jsonl", "run.json",
  }  # fmt: skip
  # TensorBoard's file is whole, and a resumed run's replaces it.
  before = bucket.read(key(f"{url}/{events.pop()}"))
  assert before.count(b"train/loss") == 10
  train_digits(url, accept_changes=True, epochs=2)
  assert checkpoint.latest_step(url) == 20
  names = [path.name for path in files.path(url).iterdir()]
  assert sum(name.startswith("events") for name in names) == 1
  assert not mirror._open


def test_the_best_state_is_kept(url, tmp_path):
  for workdir in (url, tmp_path):
    train_digits(workdir, keep_best="top1", eval_every=2)
  best = files.path(url) / "best"
  assert records(best) == records(tmp_path / "best")
  assert same_state(
    checkpoint.load_state(best), checkpoint.load_state(tmp_path / "best")
  )
  with pytest.raises(UserError, match="holds the best checkpoint of the run"):
    train_digits(best)


def test_a_damaged_checkpoint_is_passed_over(bucket, url, whole, capfd):
  train_digits(url)
  (name,) = (
    name
    for name in bucket.names(key(f"{url}/checkpoints/10/"))
    if re.search(r"10/default/d/\w+$", name)
  )
  path = files.path(f"{bucket.url}/{name}")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
  state = train_digits(url)
  assert "checkpoint of step 10 is damaged" in capfd.readouterr().err
  assert same_state(state, whole[1])
  assert records(url) == records(whole[0])
  assert bucket.names(key(f"{url}/damaged/10/"))


def test_a_failing_bucket_is_no_damage(bucket, url, monkeypatch):
  train_digits(url)
  names = bucket.names("")
  with (
    bucket.inject(403, key(f"{url}/checkpoints/10/default")),
    pytest.raises(UserError, match=r"cannot be read: .* need not be damaged"),
  ):
    train_digits(url)
  assert [n for n in bucket.names("") if "/lock." not in n] == [
    n for n in names if "/lock." not in n
  ]


def test_an_unfinished_checkpoint_is_none(bucket, url, whole):
  """One of a process that was killed: it lacks the last object."""
  train_digits(url)
  (files.path(url) / "checkpoints/10/commit_success.txt").unlink()
  assert checkpoint.latest_step(url) == 5
  assert same_state(train_digits(url), whole[1])


def test_what_grows_is_copied_meanwhile(url, monkeypatch):
  monkeypatch.setattr(mirror, "INTERVAL", 0.05)
  copied = mirror.Mirror(files.path(url))
  with (copied.local / "log.txt").open("w", buffering=1) as log:
    for text in ("one\n", "one\ntwo\n"):
      log.write(text.splitlines()[-1] + "\n")
      deadline = time.time() + 20
      target = files.path(url) / "log.txt"
      while not target.exists() or target.read_text() != text:
        assert time.time() < deadline
    log.write("three")
  copied.close()
  assert target.read_text() == "one\ntwo\nthree"
  assert not copied.local.exists()


# --- Leases.


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(lease, "BEAT", 0.1)
  monkeypatch.setattr(lease, "SILENT", 1.0)


def test_a_second_run_is_refused(url, fast):
  with lease.lock(files.path(url) / "lock", wait=False):
    time.sleep(1.5)  # It lives longer than that by signs of life.
    with pytest.raises(InUse, match=rf"--workdir={url}: in use by process \d+"):
      train_digits(url)
    assert "process" in workdir_lib.holder(url)
  assert workdir_lib.holder(url) is None
  train_digits(url)


def silence(url, monkeypatch):
  """A lease whose owner hangs, or is cut off from the bucket."""
  monkeypatch.setattr(lease.Lease, "_beat_on", lambda self: None)
  content = lease._ours() | {"host": "another", "holder": "process 7 on B"}
  path = files.path(url) / "lock"
  (files.path(url) / "lock.3").write_text(json.dumps(content))
  return lease.Lease(path, 3, content)


def test_a_silent_owner_is_succeeded(url, fast, monkeypatch, capsys):
  owner = silence(url, monkeypatch)
  start = time.monotonic()
  train_digits(url)
  assert time.monotonic() - start > lease.SILENT
  assert "sign of life of process 7 on B\n" in capsys.readouterr().out
  names = [path.name for path in files.path(url).iterdir()]
  assert [name for name in names if "lock" in name] == ["lock.4"]
  # It comes back, and finds that it has lost, before it writes anything.
  config = files.path(url) / "config.json"
  before = config.read_text()
  lease._held.append(owner)
  try:
    with pytest.raises(UserError, match=r"another process has taken over"):
      files.write_whole(config, "{}")
    with pytest.raises(UserError, match=r"another process has taken over"):
      checkpoint.Checkpointer(url).save(11, None)
  finally:
    lease._held.remove(owner)
  assert config.read_text() == before
  owner.release()
  names = [path.name for path in files.path(url).iterdir()]
  assert [name for name in names if "lock" in name] == ["lock.4"]


def test_a_run_that_was_taken_over_ends(url, fast, whole, monkeypatch):
  """It hangs before the sixth step; another process continues its run."""
  monkeypatch.setattr(lease.Lease, "_beat_on", lambda self: None)
  step = train.recipe_lib.Recipe.is_due

  def hang(recipe, step_number, every, done=[]):  # noqa: B006
    if step_number == 6 and not done:
      done.append(1)
      lock = files.path(url) / "lock"
      while lease.holder(lock):
        time.sleep(0.05)
      with lease.lock(lock, wait=False):
        pass
    return step(recipe, step_number, every)

  monkeypatch.setattr(train.recipe_lib.Recipe, "is_due", hang)
  # The test's own process is the other one.
  monkeypatch.setattr(lease, "_host", lambda: str(time.monotonic()))
  with pytest.raises(UserError, match=r"another process has taken over"):
    train_digits(url)
  assert checkpoint.latest_step(url) == 5
  monkeypatch.undo()
  assert same_state(train_digits(url), whole[1])


def test_a_gap_of_the_observer_is_no_silence(url, fast, monkeypatch):
  """A bucket that nobody could reach for a while."""
  owner, path = silence(url, monkeypatch), files.path(url) / "lock"
  assert lease.holder(path) == "process 7 on B"
  time.sleep(1.5)
  assert lease.holder(path) == "process 7 on B"
  deadline = time.monotonic() + 30
  while lease.holder(path):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  owner.release()


def test_a_lease_that_comes_late_is_given_back(url, fast, monkeypatch):
  """Others come and go while the request to create it is under way."""
  path, create, calls = files.path(url) / "lock", paths.BucketPath.create, []

  def late(self, data):
    calls.append(self.name)
    if len(calls) == 1:
      for _ in range(2):
        with lease.lock(path, wait=False):
          pass
    create(self, data)

  monkeypatch.setattr(paths.BucketPath, "create", late)
  with lease.lock(path, wait=False):
    assert [x.name for x in files.path(url).iterdir()] == ["lock.3"]
    (held,) = lease._held
    assert held._number == 3
  assert calls == ["lock.1", "lock.1", "lock.2", "lock.3"]


def test_one_of_many_gets_a_lease(bucket, url):
  """Also if the answer to its request is lost, and it asks again."""
  bucket.inject(gcs.LOSE, gcs.writes(key(f"{url}/lock")), times=1)
  barrier, got = threading.Barrier(8), []

  def take():
    barrier.wait()
    lock = lease.lock(files.path(url) / "lock", wait=False)
    with contextlib.suppress(InUse), lock:
      got.append(1)
      done.wait(60)

  done = threading.Event()
  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  deadline = time.time() + 60
  while not got or sum(thread.is_alive() for thread in threads) > 1:
    assert time.time() < deadline
    time.sleep(0.05)
  assert got == [1]
  done.set()
  for thread in threads:
    thread.join()


# --- Data, weights and outputs.


def is_unicode(path):
  """A bucket has no other names."""
  return not any("\ud800" <= c <= "\udfff" for c in str(path))


def upload(folder, url):
  for file in folder.rglob("*"):
    if file.is_file() and is_unicode(file):
      target = files.path(url) / file.relative_to(folder).as_posix()
      target.write_bytes(file.read_bytes())


def test_data_in_a_bucket_are_copied_once(
  bucket, url, tfds_dir, photos, monkeypatch
):
  root, images = tfds_dir
  upload(root / "small", f"{url}/tfds/small")
  for _ in range(2):
    source = sources.open_source("small", f"{url}/tfds", "train[4:]", 8)
    assert np.array_equal(source.images, images[4:])
    bucket.inject(403, "alt=media")  # Nothing is read again.
  bucket.faults.clear()
  upload(photos, f"{url}/photos")
  there = sources.open_source("folder", f"{url}/photos", "train", 32)
  assert there.size == sum(map(is_unicode, folder_lib.images(photos / "train")))
  # A data set that has changed is copied again; who reads the old one may.
  file = files.path(there.read.name(0))
  name = file.relative_to(cache.local_copy(files.path(f"{url}/photos")))
  old = there.read(0)[0]
  (files.path(f"{url}/photos") / name.as_posix()).write_bytes(b"new")
  changed = sources.open_source("folder", f"{url}/photos", "train", 32)
  assert changed.read(0)[0] == b"new"
  assert there.read(0)[0] == old
  while cache._used:
    cache._used.pop().close()  # As at the end of their processes.
  (files.path(f"{url}/photos") / name.as_posix()).write_bytes(b"newer")
  again = sources.open_source("folder", f"{url}/photos", "train", 32)
  assert again.read(0)[0] == b"newer"
  assert not file.exists()
  usage = lambda path: type("", (), {"free": 10})
  monkeypatch.setattr(cache.shutil, "disk_usage", usage)
  with pytest.raises(UserError, match=r"GiB do not fit .* XDG_CACHE_HOME"):
    sources.open_source("folder", f"{url}/tfds", "train", 32)
  with pytest.raises(UserError, match=r"has no folder wide; prepare wide on a"):
    sources.open_source("wide", f"{url}/tfds", "train", 8)
  with pytest.raises(UserError, match=r"data\.dir=.*/x: no such directory"):
    sources.open_source("folder", f"{url}/x", "train", 8)


def test_commands_read_and_write_a_bucket(url, whole, photos, tmp_path):
  upload(whole[0], f"{url}/run")
  image = next(photos.rglob("*.jpeg"))
  outputs = []
  for run, out in ((f"{url}/run", f"{url}/out"), (whole[0], tmp_path / "out")):
    texts = []
    for module, *args in (
      ("main", "--mode=eval", f"--workdir={run}",
       f"--confusion={out}/confusion.csv"),
      ("main", "--mode=eval", f"--config={run}/config.json"),
      ("export", f"--weights={run}", f"--out={out}", "--format=timm"),
      ("predict", f"--weights={out}/model.safetensors", image),
      ("export", f"--weights={out}/model.safetensors", f"--out={out}/again"),
      ("replay", f"--workdir={run}", "--step=7"),
      ("preview", f"--config={run}/config.json", f"--out={out}/sheet.png"),
    ):  # fmt: skip
      if not isinstance(out, str):
        out.mkdir(exist_ok=True)
      code, text, err = common.call(f"convmixer_jax.{module}", *args)
      assert code == 0, err
      texts.append(text.replace(str(out), "OUT").replace(str(run), "RUN"))
    outputs.append(texts)
  assert outputs[0] == outputs[1]
  written = [*files.path(f"{url}/out").objects()]
  assert len(written) == 5
  for path in written:
    local = tmp_path / "out" / path.relative_to(files.path(f"{url}/out"))
    if path.suffix == ".safetensors":
      assert same_state(weights.load(path), weights.load(local))
    elif path.suffix != ".stablehlo":  # It names lines of the source.
      assert path.read_bytes() == local.read_bytes()


def test_training_starts_from_weights_in_a_bucket(url, whole, tmp_path):
  upload(whole[0], f"{url}/run")
  states = [
    train_digits(tmp_path / str(i), init_from=str(run))
    for i, run in enumerate((whole[0], f"{url}/run"))
  ]
  assert same_state(*states)
  with pytest.raises(UserError, match=r"config\.init_from=gs.*/x: no such"):
    weights.load_init_from(f"{url}/x", common.tiny_model(), {})


# --- Sweeps.


def test_a_sweep_is_read_from_a_bucket(url, tmp_path):
  sweep = sweeps.get("smoke")
  for top1, (cell, seed) in enumerate(sweep.runs(), 90):
    common.finished_run(tmp_path / "smoke", cell, seed, top1)
  (tmp_path / "smoke" / "more").mkdir()
  (tmp_path / "smoke" / "more" / "x").write_text("x")
  upload(tmp_path, url)
  tables = []
  for root in (url, tmp_path):
    code, out, err = common.call(
      "experiments.tables", "smoke", f"--root={root}"
    )
    assert code == 0
    tables.append((out, err.replace(str(root), "ROOT")))
  assert tables[0] == tables[1]
  assert "left out: ROOT/smoke/more: not part" in tables[0][1]
  code, _, err = common.call(
    "experiments.report", "smoke", f"--root={url}", f"--out={url}/page.html"
  )
  assert (code, err.count("left out")) == (0, 1)
  assert "90.00" in (files.path(url) / "page.html").read_text()
  code, out, _ = common.call(
    "experiments.run", "smoke", f"--root={url}", "--watch"
  )
  assert code == 0
  assert out.endswith(f"\n{len(sweep.runs())} finished\n")
  _, _, err = common.call("experiments.tables", "smoke", f"--root={url}/x")
  assert "has no folder smoke" in err


def test_a_run_of_a_sweep_is_claimed_in_a_bucket(url, fast):
  cell = sweeps.get("smoke").cells[0]
  make = lambda: runs_lib.Run.of(files.path(url), cell, 0)
  mine, other = make(), make()
  assert mine.take()
  assert not other.take()
  assert other.status == "running elsewhere"
  mine.log.write_text("of the first\n")
  mine.release()
  assert other.take()
  with other.log.open("a") as log:
    log.write("of the second\n")
  other.release()
  log = files.path(url) / cell.name / "seed0" / "log.txt"
  assert log.read_text() == "of the first\nof the second\n"


def test_a_sweep_goes_on_when_the_bucket_answers_again(
  bucket, url, fast, monkeypatch, capsys
):
  monkeypatch.setattr(run_lib, "LOOK_AGAIN_IN_BUCKET", 0.0)
  monkeypatch.setattr(cells_lib.Cell, "command", lambda *args: ["true"])
  cells = sweeps.get("smoke").cells[:2]
  runs = [runs_lib.Run.of(files.path(url), cell, 0) for cell in cells]
  create, failures = paths.BucketPath.create, [5, 5]

  def fail(self, data):
    if failures and failures.pop():
      raise OSError(5, "does not answer", str(self))
    create(self, data)

  monkeypatch.setattr(paths.BucketPath, "create", fail)
  run_lib._run_all(runs, [{}])
  assert [run.reason for run in runs] == ["no output", "no output"]  # Of true.
  out = capsys.readouterr().out
  assert out.count("not started, tried again later: ") == 2
  with bucket.inject(403, gcs.writes(key(url))):
    runs = [runs_lib.Run.of(files.path(url), cell, 0) for cell in cells]
    run_lib._run_all(runs, [{}])
  assert all("Forbidden" in run.reason for run in runs)


# --- Faults of real processes.


def run_in(bucket, url, *flags, **options):
  environment = bucket.environment | options.pop("environment", {})
  return common.run_main(
    *FLAGS, f"--workdir={url}", *flags, environment=environment, **options
  )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """What `run_in` trains, on a disk and undisturbed."""
  workdir = tmp_path_factory.mktemp("reference")
  finish(common.run_main(*FLAGS, f"--workdir={workdir}"))
  return workdir


def assert_same_run(url, reference):
  assert records(url) == records(reference)
  assert same_state(
    checkpoint.load_state(url), checkpoint.load_state(reference)
  )


def wait_for(condition, seconds=120):
  deadline = time.time() + seconds
  while not condition():
    assert time.time() < deadline
    time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kills", range(3))
def test_a_killed_run_resumes_bit_for_bit(bucket, url, reference, kills):
  """While a checkpoint of a random step is written."""
  rng = np.random.default_rng(kills)
  for _ in range(4):
    process = run_in(bucket, url)
    step = checkpoint.latest_step(url) or 0
    step += 4 * int(rng.integers(1, 4))
    with bucket.inject(
      process.kill, gcs.writes(key(f"{url}/checkpoints/{step}")), times=1
    ):
      process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL)
  finish(run_in(bucket, url))
  assert len(workdir_lib.read_starts(url)["starts"]) > 2
  assert_same_run(url, reference)


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(bucket, url, reference):
  process = run_in(bucket, url)
  wait_for(lambda: bucket.names(key(f"{url}/checkpoints/4/")))
  process.send_signal(signal.SIGTERM)
  out, _ = finish(process, 128 + signal.SIGTERM)
  assert "stopped by SIGTERM: step " in out
  step = checkpoint.latest_step(url)
  assert f"step {step} is saved in {url}; " in out
  finish(run_in(bucket, url))
  (first, _) = workdir_lib.read_starts(url)["starts"]
  assert (first["status"], first["last_step"]) == ("interrupted", step)
  assert_same_run(url, reference)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [503, gcs.RESET, gcs.LOSE, "stop", "slow"])
def test_a_bucket_that_fails_for_a_while(bucket, url, reference, fault):
  """From the middle of a checkpoint on."""
  moment = gcs.writes(key(f"{url}/checkpoints/8"))
  began = []

  def begin():
    began.append(1)
    if fault == "stop":
      bucket.stop()
      threading.Timer(6, bucket.start).start()
    elif fault == "slow":
      bucket.delay, bucket.bandwidth = 0.05, 2e5
    else:
      matching = key(url) if fault == gcs.LOSE else ""
      times = {"times": 4} if fault == gcs.LOSE else {"seconds": 6}
      bucket.inject(fault, matching, **times)

  bucket.inject(begin, moment, times=1)
  finish(run_in(bucket, url))
  assert began
  bucket.faults.clear()
  bucket.delay, bucket.bandwidth = 0.0, float("inf")
  assert_same_run(url, reference)
  assert len(workdir_lib.read_starts(url)["starts"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", [403, "stop"])
def test_a_bucket_that_fails_for_good(bucket, url, reference, fault):
  """One line, and nothing is lost."""
  if fault == "stop":
    # Before the second checkpoint. Of one that has begun, the writes of arrays
    # are repeated for a quarter of an hour.
    moment = gcs.writes(key(f"{url}/metrics.jsonl"))
    bucket.inject(lambda: None, moment, times=2)
    bucket.inject(bucket.stop, moment, times=1)
  else:
    bucket.inject(403, gcs.writes(key(f"{url}/checkpoints/8")))
  _out, err = finish(run_in(bucket, url), 2)
  lines = [line for line in err.splitlines() if "google_auth" not in line]
  *before, line = filter(None, lines)
  if fault == "stop":  # What was logged since the first checkpoint.
    (warning,) = before
    folder = warning.partition("files that could not be copied are in ")[2]
    kept = workdir_lib.read_metrics(folder)
    assert kept[-1]["step"] >= 8
    shutil.rmtree(folder)
  else:
    assert not before
  assert re.match(rf"error: {url}/checkpoints: cannot be written: ", line)
  assert line.endswith("rerun the command to resume from it")
  bucket.faults.clear()
  bucket.start()
  assert checkpoint.latest_step(url) == 4
  finish(run_in(bucket, url))
  assert_same_run(url, reference)


@pytest.mark.slow
def test_processes_of_a_run_wait_for_a_lost_host(bucket, url):
  """The first one may take its lock after 90 seconds; the others wait too."""
  content = lease._ours() | {"host": "another", "holder": "process 7 on B"}
  (files.path(url) / "lock.1").write_text(json.dumps(content))
  processes = test_distributed.start(
    2, *FLAGS, f"--workdir={url}", environment=bucket.environment
  )
  for process in processes:
    finish(process)
  assert checkpoint.latest_step(url) == 45
  assert bucket.names(key(f"{url}/lock")) == [key(f"{url}/lock.2")]


@pytest.mark.slow
def test_a_host_continues_the_runs_of_one_that_is_lost(bucket, url, tmp_path):
  (tmp_path / "two.py").write_text("""
from experiments.cells import Cell
from experiments.sweeps import Sweep
small = {"model.dim": 8, "model.depth": 1, "epochs": 20, "save_every": 50}
TWO = Sweep("?", [Cell(x, "configs/digits.py", small) for x in "ab"], (0, 1))
""")
  command = (f"{tmp_path}/two.py:TWO", f"--root={url}", f"--data_dir={url}/d")
  start = lambda: common.run_main(
    *command, module="experiments.run", environment=bucket.environment
  )
  lost = start()
  wait_for(lambda: bucket.names(key(f"{url}/TWO/a/seed0/checkpoints/50/")))
  other = start()
  wait_for(lambda: bucket.names(key(f"{url}/TWO/b/seed0/config.json")))
  lost.kill()  # Its run goes on, and is not trained twice.
  lost.communicate(timeout=60)
  out, _ = finish(other)
  assert out.endswith("\n4 finished\n"), out
  for seed, name in itertools.product((0, 1), "ab"):
    workdir = f"{url}/TWO/{name}/seed{seed}"
    steps = [r["step"] for r in records(workdir) if r["kind"] == "train"]
    assert steps == sorted({*steps})
    log = files.path(workdir) / "log.txt"
    config = workdir_lib.read_config(workdir)
    assert (config.data.dir, config.epochs) == (f"{url}/d", 20)
    # The lost runner's is lost.
    assert not log.exists() or "finished: top-1" in log.read_text()
    starts = workdir_lib.read_starts(workdir)["starts"]
    assert len(starts) == 1
