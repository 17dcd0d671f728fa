import os
import re
import shutil
import subprocess
import time

import pytest

from tests import common

TPU_POD = common.ROOT / "scripts" / "tpu_pod.sh"

# Two workers, whose homes are folders. It logs its calls, and obeys them.
GCLOUD = r"""#!/bin/bash
printf '%s\n' "$*" >>"$FAKE/calls"
for argument; do
  case $argument in
  --worker=all) workers="0 1" ;;
  --worker=*) workers=${argument#--worker=} ;;
  --command=*) command=${argument#--command=} ;;
  esac
done
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]] || exit 9
for worker in $workers; do
  export HOME=$FAKE/worker$worker
  mkdir -p "$HOME" && cd "$HOME" || exit 9
  case $4 in
  ssh) bash -c "$command" || exit ;;
  scp) cp "$5" "${6#*:}" ;;
  esac
done
"""
# In the place of an environment, which would be downloaded.
MAKE = r"""#!/bin/bash
[[ $1 == .venv && -f requirements.txt ]] || exit 9
mkdir -p .venv/bin
printf '#!/bin/bash\necho "$*" >>pip\n' >.venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.fixture
def pod(tmp_path, monkeypatch):
  """Runs the script as a user with a pod of two workers would."""
  programs = {"gcloud": GCLOUD, "make": MAKE, "sudo": "#!/bin/sh\n"}
  for name, text in programs.items():
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
  monkeypatch.setenv("FAKE", str(tmp_path))
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  for name in ("ZONE", "PROJECT"):
    monkeypatch.delenv(name, raising=False)

  def run(*args):
    return subprocess.run(
      [TPU_POD, *args], capture_output=True, text=True, timeout=60, check=False
    )

  return run


def test_a_pod_is_set_up_runs_and_is_stopped(pod, tmp_path, monkeypatch):
  monkeypatch.setenv("ZONE", "us-west4-a")
  done = pod("mine", "setup")
  assert done.returncode == 0, done.stderr
  homes = [tmp_path / f"worker{i}" / "convmixer_jax" for i in (0, 1)]
  for home in homes:
    assert (home / "convmixer_jax" / "main.py").exists()
    pip = (home / "pip").read_text()
    assert pip == "install --quiet -c requirements.txt jax[tpu] gcsfs\n"
  script = (
    'trap "echo saved; exit" TERM; echo "$1"; while :; do sleep 0.1; done'
  )
  done = pod("mine", "run", "bash", "-c", script, "-", "a  b'c")
  assert done.returncode == 0, done.stderr
  wait_for(homes, "a  b'c\n")
  pids = [int((home / "pod.pid").read_text()) for home in homes]
  done = pod("mine", "stop")
  assert done.returncode == 0, done.stderr
  wait_for(homes, "saved\n")
  wait_until(lambda: not any(map(group_exists, pids)))
  calls = (tmp_path / "calls").read_text()
  for verb in ("scp", "ssh"):
    assert f"compute tpus tpu-vm {verb} " in calls
  assert calls.count("--worker=all") == calls.count("--zone=us-west4-a") == 4
  assert "--project" not in calls


def test_a_sweep_is_started_on_every_worker(pod, tmp_path):
  """By the runner, in the environment of the checkout."""
  homes = [tmp_path / f"worker{i}" / "convmixer_jax" for i in (0, 1)]
  for home in homes:
    python = home / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
  flags = ("smoke", "--root", "gs://bucket/runs", "--jobs=2")
  done = pod("mine", "sweep", *flags)
  assert done.returncode == 0, done.stderr
  wait_for(homes, f"python -m experiments.run {' '.join(flags)}\n")


DOCUMENTED = re.findall(
  r"^(?:gcloud|scripts/tpu_pod\.sh) .*$",
  (common.ROOT / "docs" / "distributed.md").read_text(),
  re.M,
)


def test_documented_commands_are_found():
  assert len(DOCUMENTED) >= 10


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_commands_reach_gcloud(pod, tmp_path, line):
  """With flags that the script knows; gcloud itself is not here."""
  (tmp_path / "bin" / "gcloud").write_text(
    '#!/bin/sh\necho "$1 $2 $3 $4" >>"$FAKE/calls"\n'
  )
  done = subprocess.run(
    ["bash", "-c", line], cwd=common.ROOT, capture_output=True, text=True,
    timeout=60, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, "")
  for call in (tmp_path / "calls").read_text().splitlines():
    assert call.startswith((
      "compute tpus tpu-vm create", "compute tpus tpu-vm ssh",
      "compute tpus tpu-vm scp", "compute tpus tpu-vm delete",
      "storage buckets create", "storage cp",
    )), call  # fmt: skip


def wait_for(homes, line):
  logs = [home / "pod.log" for home in homes]
  wait_until(
    lambda: all(log.exists() and line in log.read_text() for log in logs)
  )


def wait_until(what):
  deadline = time.time() + 20
  while not what():
    assert time.time() < deadline
    time.sleep(0.1)


def group_exists(pid):
  try:
    os.killpg(pid, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.mark.parametrize(
  ("args", "says"),
  [
    ([], "give NAME and one of setup, run, sweep, log, stop"),
    (["mine", "start"], "start: must be setup, run, sweep, log or stop"),
    (["mine", "run"], "run: give a command"),
    (["mine", "sweep", "smoke"], "give a sweep and --root gs://BUCKET/PATH"),
    (["mine", "sweep", "smoke", "--root=runs"], "--root gs://BUCKET/PATH"),
    (["mine", "log", "x"], "log x: must be the number of a worker"),
  ],
)
def test_mistakes_call_nothing(pod, tmp_path, args, says):
  done = pod(*args)
  assert done.returncode == 2
  assert says in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "calls").exists()


def test_a_failure_of_a_worker_is_the_script_s(pod):
  assert pod("mine", "stop").returncode != 0  # There is no run to stop.


def test_shellcheck():
  if not shutil.which("shellcheck"):
    pytest.skip("NO SHELLCHECK: apt-get install shellcheck")
  scripts = [
    TPU_POD,
    common.ROOT / ".ci" / "run",
    common.ROOT / "benchmarks" / "accelerator.sh",
  ]
  done = subprocess.run(
    ["shellcheck", *scripts], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
