"""A real Slurm of one host: apt-get install slurm-wlm munge."""

import contextlib
import getpass
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from convmixer_jax import checkpoint
from convmixer_jax.errors import UserError
from experiments import cells as cells_lib
from experiments import scores
from experiments import slurm as slurm_lib
from experiments import sweeps
from tests import common
from tests.test_distributed import DIGITS
from tests.test_distributed import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in DAEMONS if not shutil.which(name, path=SBIN)]
if not importlib.util.find_spec("submitit"):
  MISSING.append("submitit")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Starts munged, slurmctld and slurmd; yields the path of slurm.conf."""
  if MISSING:
    pytest.skip(
      f"NO {', '.join(MISSING).upper()}: apt-get install slurm-wlm munge;"
      " pip install submitit"
    )
  root = tmp_path_factory.mktemp("slurm")
  for folder in ("munge", "state", "spool"):
    (root / folder).mkdir(mode=0o700)
  key = root / "munge" / "key"
  key.write_bytes(os.urandom(128))
  key.chmod(0o600)
  host = socket.gethostname().partition(".")[0]
  conf = root / "slurm.conf"
  conf.write_text(
    f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
KillWait=8
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
  )
  # Slurm believes in two GPUs; the tasks compute on the CPU.
  (root / "gres.conf").write_text(
    "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
  )
  files = {
    "key-file": "key", "socket": "socket", "pid-file": "pid",
    "log-file": "log", "seed-file": "seed",
  }  # fmt: skip
  commands = [
    ["munged", "--foreground", "--force", "--num-threads=2"]
    + [f"--{flag}={root}/munge/{name}" for flag, name in files.items()],
    ["slurmctld", "-D", "-c", "-f", str(conf)],
    ["slurmd", "-D", "-c", "-f", str(conf)],
  ]
  env = os.environ | {"SLURM_CONF": str(conf), "PATH": SBIN}
  daemons = []
  try:
    for command in commands:
      with (root / f"{command[0]}.out").open("w") as out:
        daemons.append(
          subprocess.Popen(command, env=env, stdout=out, stderr=out)
        )
      time.sleep(0.5)
    deadline = time.time() + 30
    while "idle" not in slurm_says(conf, "sinfo", "-h", "-o", "%T"):
      logs = "".join(path.read_text() for path in root.glob("*.out"))
      assert time.time() < deadline, logs[-2000:]
      time.sleep(0.5)
    yield conf
  finally:
    slurm_says(conf, "scancel", "--signal=KILL", f"--user={getpass.getuser()}")
    for daemon in reversed(daemons):
      daemon.terminate()
      daemon.wait(30)


def slurm_says(conf, *command):
  env = os.environ | {"SLURM_CONF": str(conf)}
  done = subprocess.run(
    command, env=env, capture_output=True, text=True, timeout=60, check=False
  )
  return done.stdout


def submit(conf, *args):
  """Submits as a user would; returns the job's number."""
  process = common.run_main(
    *args, module="experiments.slurm", environment=job_environment(conf)
  )
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, out + err
  return re.search(r"as job (\d+)", out)[1]


def job_environment(conf):
  """What jobs get too."""
  return {
    "SLURM_CONF": str(conf),
    "PYTHONPATH": str(common.ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  }


def wait(what, seconds=180):
  deadline = time.time() + seconds
  while not (result := what()):
    assert time.time() < deadline, "did not happen in time"
    time.sleep(0.3)
  return result


def starts(workdir):
  return json.loads((workdir / "run.json").read_text())["starts"]


def logged(workdir, step):
  path = workdir / "metrics.jsonl"
  return path.exists() and f'"step": {step},' in path.read_text()


def submitted(argv):
  """In this process; returns what it prints."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    slurm_lib.main(*slurm_lib._FLAGS(argv)[1:])
  return out.getvalue()


@pytest.mark.slow
def test_an_array_of_two_runs_finishes(slurm, tmp_path, monkeypatch):
  small = {"model.dim": 8, "model.depth": 1, "epochs": 1}
  sweep = sweeps.Sweep(
    "", [cells_lib.Cell("tiny", "configs/digits.py", small)], seeds=(0, 1)
  )
  monkeypatch.setitem(sweeps.SWEEPS, "two", sweep)
  for name, value in job_environment(slurm).items():
    monkeypatch.setenv(name, value)
  argv = ["slurm", "two", f"--root={tmp_path}", "--partition=main"]
  number = re.search(r"as job (\d+), 2 runs", submitted(argv))[1]
  workdirs = [tmp_path / "two" / "tiny" / f"seed{seed}" for seed in (0, 1)]
  try:
    wait(lambda: all(map(scores.finished, workdirs)))
  except AssertionError:
    for path in (tmp_path / "slurm").glob("*.out"):
      print(path.read_text())
    raise
  wait(lambda: not slurm_says(slurm, "squeue", "-h", "-j", number), 60)
  logs = sorted(path.name for path in (tmp_path / "slurm").glob("*.out"))
  assert logs == [f"{number}_0_0_log.out", f"{number}_1_0_log.out"]
  # Again: nothing is left to do.
  assert "nothing to do" in submitted(argv)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["requeue", "signal"])
def test_a_job_that_is_sent_away_comes_back(slurm, tmp_path, way):
  """By Slurm's own requeueing (SIGTERM), and by its warning of the end."""
  workdir = tmp_path / "run"
  flags = (*DIGITS, "--config.epochs=400", "--config.save_every=1000000")
  job = submit(slurm, f"--root={tmp_path}", "--hours=1", "--",
               *flags, f"--workdir={workdir}")  # fmt: skip
  wait(lambda: logged(workdir, 5))
  if way == "requeue":
    slurm_says(slurm, "scontrol", "requeue", job)
  else:  # What --signal=USR2@90 is for.
    slurm_says(slurm, "scancel", "--signal=USR2", job)
  wait(lambda: starts(workdir)[0]["status"] == "interrupted", 60)
  saved = starts(workdir)[0]["last_step"]
  assert saved < 2000
  assert checkpoint.latest_step(workdir) == saved
  wait(lambda: "PENDING" in slurm_says(slurm, "squeue", "-h", "-o", "%T"), 60)
  # Slurm would let it wait for two minutes; in the first seconds the host still
  # refuses what was sent away.
  time.sleep(5)
  slurm_says(slurm, "scontrol", "update", f"job={job}", "StartTime=now")
  wait(lambda: scores.finished(workdir))
  _, second = starts(workdir)
  assert second["first_step"] == saved
  assert second["last_step"] == 2000


@pytest.mark.slow
def test_two_tasks_equal_one_process(slurm, tmp_path):
  flags = (*DIGITS, "--config.epochs=2")
  job = submit(
    slurm, f"--root={tmp_path}", "--gpus=2", "--sbatch=time-min=1", "--",
    *flags, f"--workdir={tmp_path / 'two'}",
  )  # fmt: skip
  one = common.run_main(*flags, f"--workdir={tmp_path / 'one'}")
  out, err = one.communicate(timeout=120)
  assert one.returncode == 0, out + err
  wait(lambda: scores.finished(tmp_path / "two"))
  wait(lambda: not slurm_says(slurm, "squeue", "-h", "-j", job), 60)
  (start,) = starts(tmp_path / "two")
  assert start["num_processes"] == 2
  two = checkpoint.load_variables(tmp_path / "two")
  assert (
    common.tree_error(two, checkpoint.load_variables(tmp_path / "one")) <= 2e-5
  )


@pytest.mark.slow
def test_what_slurm_refuses_is_one_line(slurm, tmp_path):
  process = common.run_main(
    "smoke", f"--root={tmp_path}", "--partition=nope",
    module="experiments.slurm", environment=job_environment(slurm),
  )  # fmt: skip
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert err.startswith("error: sbatch: ")
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["smok"], "nearest is smoke"),
    (["smoke", "--root=gs://b/runs"], "must be a folder that all hosts share"),
    ([], "Give the name of a sweep, or --"),
    (["--", "--config=configs/digits.py", "--config.epoch=1"], "no such field"),
    (
      ["--nodes=7", "--", "--config=configs/digits.py"],
      "multiple of the 7 devices",
    ),
  ],
)
def test_mistakes_are_found_before_they_queue(args, says, monkeypatch):
  argv = ["slurm", *args]
  monkeypatch.setattr(sys, "argv", argv)
  slurm_lib._FLAGS.unparse_flags()
  slurm_lib._RUN_FLAGS.unparse_flags()
  with pytest.raises(UserError, match=says):
    slurm_lib.main(*slurm_lib._FLAGS(argv)[1:])
