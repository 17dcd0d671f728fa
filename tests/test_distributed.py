"""Real processes that train together over Gloo and end together."""

import contextlib
import json
import re
import signal
import socket
import time

import pytest

from convmixer_jax import checkpoint
from convmixer_jax import distributed
from convmixer_jax.errors import UserError
from tests import common
from tests import test_data
from tests.test_train import finish
from tests.test_train import FLAGS
from tests.test_train import records

# Of float32 after tens of steps: processes sum in another order.
TOLERANCE = 1e-4
# 360 images are scored in batches of 28, the last one ragged.
DIGITS = (*FLAGS, "--config.batch_size=28",
          "--config.data.train_split=train[:140]")  # fmt: skip
CIFAR10 = common.flags(
  "configs/cifar10.py",
  "model.name=convmixer_128_4 model.dim=16 model.depth=1 model.patch_size=4"
  " data.train_split=train[:512] data.eval_split=test[:100] batch_size=64"
  " epochs=1 log_every=1 eval_every=1000 save_every=1000",
)


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(count, *flags, ids=None, port=None, timeout=5, **popen):
  port = port or free_port()
  return [
    common.run_main(
      "--distributed",
      f"--coordinator=localhost:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
      f"--timeout={timeout}",
      *flags,
      **popen,
    )
    for i in ids or range(count)
  ]


@contextlib.contextmanager
def ended(processes):
  """Kills the processes at the end of a test."""
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def assert_one_line(process, code, says):
  """The process exits with `code` and one line on stderr."""
  _, err = process.communicate(timeout=180)
  assert process.returncode == code, err
  err = re.sub("W.* ops/native.cc could not be compiled .*\n", "", err)
  assert re.fullmatch(f"error: {says}\n", err), err


def assert_same_run(workdir, one, tolerance=TOLERANCE):
  """The same parameters, and the same images at every step."""
  ours, theirs = (
    {(r["step"], r["kind"]): r for r in records(folder)}
    for folder in (workdir, one)
  )
  assert ours.keys() == theirs.keys()
  for key, record in ours.items():
    expected = theirs[key]
    assert record.keys() == expected.keys()
    assert record.pop("kind") == expected.pop("kind")
    assert record == pytest.approx(expected, rel=10 * tolerance)
  error = common.tree_error(
    checkpoint.load_variables(workdir), checkpoint.load_variables(one)
  )
  print(f"parameters differ by {error:.1e}")
  assert error <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_processes_equal_one(tmp_path, data):
  if data == "cifar10" and (why := common.cifar10_absent()):
    pytest.skip(why)
  flags = {"digits": DIGITS, "cifar10": CIFAR10}[data]
  flags = (*flags, "--config.keep_best=loss")
  scored = {"digits": 360, "cifar10": 100}[data]
  one = tmp_path / "one"
  finish(common.run_main(*flags, f"--workdir={one}"))
  for count in (2, 4):
    workdir = tmp_path / str(count)
    with ended(start(count, *flags, f"--workdir={workdir}")) as processes:
      outs = [finish(process)[0] for process in processes]
    assert f"on {scored} images" in outs[0]
    assert not any("step" in out for out in outs[1:])
    assert not any("Gloo" in out for out in outs)  # Who is connected to whom.
    assert records(workdir)[-1]["count"] == scored
    (begun,) = json.loads((workdir / "run.json").read_text())["starts"]
    assert begun["num_processes"] == begun["num_devices"] == count
    assert_same_run(workdir, one)
    best, theirs = (
      checkpoint.load_state(x / "best")["step"] for x in (workdir, one)
    )
    assert best == theirs
  if data == "cifar10":
    return
  # Two processes evaluate the checkpoint of four.
  flags = (*flags, f"--workdir={workdir}", "--mode=eval")
  with ended(start(2, *flags)) as processes:
    (out, _), (silent, _) = map(finish, processes)
  metrics = json.loads(out.strip().splitlines()[-1])
  last = records(workdir)[-1]
  assert metrics["count"] == scored
  assert metrics["loss"] == pytest.approx(last["loss"], rel=1e-5)
  counts = [c["images"] for c in metrics["per_class"]]
  hits = [c["images"] * c["top1"] for c in metrics["per_class"]]
  assert sum(counts) == scored
  assert sum(hits) / scored == pytest.approx(metrics["top1"])
  assert "top1" not in silent


def until_step(process, step):
  """Reads the output up to that step."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith(f"step {step}/"):
      return "".join(lines)
  raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_after_a_kill_fewer_processes_resume(tmp_path):
  """4 processes, one killed; 2, one preempted; 1 to the end: the same run."""
  flags = (*DIGITS, "--config.epochs=12")  # 60 steps, saved every 4.
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  unbroken = [*flags, f"--workdir={whole}"]
  flags = (*flags, f"--workdir={broken}")

  with ended(start(4, *flags, timeout=60)) as processes:  # The default.
    until_step(processes[0], 10)
    processes[2].kill()
    killed = time.time()
    finish(common.run_main(*unbroken))  # While the others wait.
    for i in (0, 1, 3):
      assert_one_line(
        processes[i],
        distributed.LOST,
        r"lost process 2 of 4: its heartbeats stopped \(--timeout=60\); restart"
        " all processes to resume from the last checkpoint",
      )
    assert time.time() - killed < 120  # The promise, in README.
  saved = checkpoint.latest_step(broken)
  assert saved in range(4, 60, 4)

  with ended(start(2, *flags)) as processes:
    out = until_step(processes[0], saved + 5)
    assert f"resuming {broken} from step {saved}" in out
    processes[1].send_signal(signal.SIGTERM)
    (out, _), _ = (finish(process, 143) for process in processes)
  saved = checkpoint.latest_step(broken)
  assert f"step {saved} is saved" in out
  assert saved < 60

  out, _ = finish(common.run_main(*flags))
  assert f"resuming {broken} from step {saved}" in out
  begun = json.loads((broken / "run.json").read_text())["starts"]
  assert [b["num_processes"] for b in begun] == [4, 2, 1]
  assert_same_run(broken, whole)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_losing_the_coordinator_ends_all(tmp_path, signum):
  flags = (*FLAGS, "--config.epochs=100000", f"--workdir={tmp_path}")
  with ended(start(2, *flags)) as processes:
    until_step(processes[0], 6)
    processes[0].send_signal(signum)
    assert_one_line(
      processes[1],
      distributed.LOST,
      r"lost process 0 of 2, the coordinator at localhost:\d+; restart all"
      " processes to resume from the last checkpoint",
    )


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_all(tmp_path):
  """Only process 1 reads the broken image; it reports it and exits."""
  for split, count in (("train", 16), ("val", 2)):
    for i in range(count):
      path = tmp_path / "photos" / split / f"class_{i % 2}" / f"{i:02}.jpeg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(test_data.encoded(test_data.photo(i, 40, 30)))
  broken = tmp_path / "photos" / "val" / "class_1" / "01.jpeg"
  broken.write_bytes(broken.read_bytes()[:300])
  flags = (
    *FLAGS, "--config.data.name=folder", "--config.batch_size=2",
    f"--config.data.dir={tmp_path / 'photos'}", "--config.data.eval_split=val",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  with ended(start(2, *flags)) as processes:
    assert_one_line(processes[1], 2, f"{broken}: cannot be decoded.*")
    assert_one_line(processes[0], distributed.LOST, "lost process 1 of 2: .*")


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_stops_both(tmp_path):
  flags = (*FLAGS, "--config.epochs=100000", f"--workdir={tmp_path}")
  with ended(start(2, *flags)) as processes:
    until_step(processes[0], 3)
    processes[1].send_signal(signal.SIGINT)
    (out, _), _ = (finish(process, 143) for process in processes)
  assert f"step {checkpoint.latest_step(tmp_path)} is saved" in out


@pytest.mark.slow
def test_processes_that_never_connect(tmp_path):
  """One run without a coordinator, one that lacks a process of three."""
  flags = (*FLAGS, f"--workdir={tmp_path / 'run'}")
  lone = start(2, *flags, ids=[1], timeout=5)
  two = start(3, *flags, ids=[0, 1], timeout=5)
  address = r"localhost:\d+ after 5 s"
  with ended(lone + two):
    assert_one_line(
      lone[0],
      distributed.LOST,
      "--distributed: process 1 of 2: cannot reach the coordinator, process 0,"
      f" at {address}: Connection refused",
    )
    for i, process in enumerate(two):
      assert_one_line(
        process,
        distributed.LOST,
        f"--distributed: process {i} of 3: not all 3 processes connected to"
        f" {address}; start each one, with its own --process_id",
      )
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--config.seed=4", "config.seed is . in process . and . in process ."),
    ("--num_processes=3", "--num_processes is . in process . and . in .*"),
    (
      None,
      "the processes would compute with different operations: .*",
    ),
  ],
)
def test_processes_that_differ_are_refused(tmp_path, flag, says):
  flags = (*FLAGS, f"--workdir={tmp_path / 'run'}")
  port = free_port()
  processes = start(2, *flags, ids=[0], port=port)
  environment = {}
  if flag is None:  # Process 1 has no compiler.
    environment = {"CXX": "/bin/false", "XDG_CACHE_HOME": str(tmp_path)}
  else:
    flags = *flags, flag
  processes += start(2, *flags, ids=[1], port=port, environment=environment)
  with ended(processes):
    for process in processes:
      assert_one_line(process, 2, f"--distributed: {says}")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("where", "says"),
  [
    (("host", 2, 0), "--coordinator=host: must be HOST:PORT"),
    (("host:1", 2, 2), "--process_id=2: must be below --num_processes=2"),
    (("host:99999", 2, 0), "--coordinator=host:99999: must be HOST:PORT"),
  ],
)
def test_invalid_flags_are_refused_at_once(where, says):
  with (
    pytest.raises(UserError, match=says),
    distributed.session(*where, timeout=1, settings={}, operations=str),
  ):
    pass


def test_a_port_in_use_is_refused():
  with socket.create_server(("", 0)) as server:
    where = (f"localhost:{server.getsockname()[1]}", 2, 0)
    with (
      pytest.raises(UserError, match="in use"),
      distributed.session(*where, timeout=1, settings={}, operations=str),
    ):
      pass
