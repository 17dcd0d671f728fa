"""Kills a training run at random moments and checks that nothing is lost.

  python -m benchmarks.soak --root runs/soak --minutes 20 --kill_every 60 \\
      --config configs/digits.py --config.epochs=2600

Trains the config twice at the same time, each on one core. One run is
undisturbed. The other gets SIGKILL at random moments for --minutes, every
--kill_every seconds on average, and is started again each time. Prints one JSON
object: the number of kills; for each start the peak memory, the most open files
and the files in the workdir at its end; both runs' last evaluation; and whether
their final states are equal bit for bit.
"""

import json
import os
from pathlib import Path
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import tqdm

import benchmarks
from convmixer_jax import checkpoint
from convmixer_jax import cli
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_ROOT = _FLAGS.string(
  "root", "New folder for the two workdirs: --root runs/soak."
)
_MINUTES = _FLAGS.number(
  "minutes",
  "For how long the second run is killed: --minutes 20.",
  20.0,
  lower_bound=0,
)
_KILL_EVERY = _FLAGS.number(
  "kill_every",
  "Average seconds between kills: --kill_every 60.",
  60.0,
  lower_bound=1,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  cli.required(_CONFIG)
  root = Path(cli.required(_ROOT)).expanduser()
  if root.exists():
    raise UserError(f"--root={root}: exists; remove it or choose another")
  flags_of_config = [
    a for a in sys.argv[1:] if a.lstrip("-").startswith("config")
  ]
  cores = sorted(os.sched_getaffinity(0))
  unbroken = _start(root / "unbroken", flags_of_config, cores[0])
  starts = []
  try:
    starts = _run_with_kills(root / "killed", flags_of_config, cores[-1])
    if unbroken.wait():
      raise UserError(f"The run failed; see {root / 'unbroken.log'}")
  finally:
    if unbroken.poll() is None:
      unbroken.kill()
  last = {
    name: workdir_lib.read_metrics(root / name)[-1]
    for name in ("unbroken", "killed")
  }
  result = {
    "kills": sum(start["killed"] for start in starts),
    "starts": starts,
    "files_of_unbroken": _num_files(root / "unbroken"),
    "last": last,
    "states_are_equal": _equal(root / "unbroken", root / "killed"),
  }
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _start(workdir, config, core):
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{workdir}.log", "a", encoding="utf-8") as log:
    process = psutil.Popen(
      [sys.executable, "-m", "convmixer_jax.main", *config,
       f"--workdir={workdir}"],
      stdout=log,
      stderr=subprocess.STDOUT,
    )  # fmt: skip
  process.cpu_affinity([core])
  return process


def _run_with_kills(workdir, config, core) -> list[dict[str, Any]]:
  """Kills and restarts the run until it ends. Returns what each start used."""
  starts, rng = [], random.Random(0)
  begun = time.monotonic()
  with tqdm.tqdm(total=60 * _MINUTES.value, unit="s", disable=None) as bar:
    while True:
      process = _start(workdir, config, core)
      kill_at = time.monotonic() + rng.expovariate(1 / _KILL_EVERY.value)
      used = {"mebibytes": 0, "open_files": 0, "killed": False}
      while process.poll() is None:
        elapsed = time.monotonic() - begun
        bar.update(round(elapsed) - bar.n)
        if time.monotonic() > kill_at and elapsed < 60 * _MINUTES.value:
          process.kill()
          used["killed"] = True
          break
        try:
          memory = process.memory_info().rss >> 20
          used["mebibytes"] = max(used["mebibytes"], memory)
          used["open_files"] = max(used["open_files"], process.num_fds())
        except psutil.NoSuchProcess:
          break
        time.sleep(0.2)
      code = process.wait()
      records = workdir_lib.read_metrics(workdir)
      used["step"] = records[-1]["step"] if records else 0
      used["files_of_workdir"] = _num_files(workdir)
      starts.append(used)
      if not used["killed"]:
        if code:
          raise UserError(f"The run failed; see {workdir}.log")
        return starts


def _num_files(folder):
  return sum(path.is_file() for path in folder.rglob("*"))


def _equal(*workdirs):
  ours, theirs = map(checkpoint.load_state, workdirs)
  return ours.keys() == theirs.keys() and all(
    np.array_equal(ours[name], theirs[name]) for name in ours
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
