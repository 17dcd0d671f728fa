"""Trains on Slurm: a sweep as one job array, or one run on many GPUs or hosts.

  python -m experiments.slurm patch_kernel --root runs --partition gpu --gpus 1
  python -m experiments.slurm --partition gpu --nodes 4 --gpus 8 --hours 24 \\
      --sbatch account=vision,qos=low -- \\
      --config configs/imagenet.py --workdir runs/imagenet

What follows -- goes to convmixer_jax.main. A job has a task for each GPU, or on
hosts without any, one for each host; several tasks train one run together
(--distributed). When Slurm pre-empts a job, or its hours are over, it saves its
state, goes back into the queue, and goes on from there. The root and the
workdir must be on a file system that all hosts share. Needs submitit.
"""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
import signal
import sys
import time

from absl import flags

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import main as main_lib
from convmixer_jax.errors import UserError
from experiments import run as run_lib
from experiments import sweeps

_FLAGS = flags.FlagValues()
_ROOT = flags.DEFINE_string(
  "root",
  "runs",
  "Where the sweep's folder is made, and slurm/ for what jobs print:"
  " --root runs.",
  flag_values=_FLAGS,
)
_PARTITION = flags.DEFINE_string(
  "partition",
  None,
  "Slurm's partition: --partition gpu. Default: Slurm's.",
  flag_values=_FLAGS,
)
_NODES = flags.DEFINE_integer(
  "nodes",
  1,
  "Hosts that each run takes: --nodes 4. Default: 1.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_GPUS = flags.DEFINE_integer(
  "gpus",
  0,
  "GPUs on each of these hosts, each with a task: --gpus 8. Default: none, and"
  " one task on each host.",
  lower_bound=0,
  flag_values=_FLAGS,
)
_CPUS = flags.DEFINE_integer(
  "cpus",
  None,
  "CPU cores for each task: --cpus 12. Default: Slurm's.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_HOURS = flags.DEFINE_float(
  "hours",
  24,
  "After which a job saves its state and goes back into the queue: --hours 24.",
  lower_bound=0.01,
  flag_values=_FLAGS,
)
_PARALLEL = flags.DEFINE_integer(
  "parallel",
  256,
  "How many runs of a sweep may run at a time: --parallel 16. Default: 256.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_SBATCH = flags.DEFINE_list(
  "sbatch",
  [],
  "More options of sbatch, without dashes: --sbatch account=vision,exclusive.",
  flag_values=_FLAGS,
)


@dataclasses.dataclass
class Task:
  """What each task of a job does; submitit asks `checkpoint` before the end."""

  command: list[str]
  folder: str  # Where it runs.

  def __call__(self) -> None:
    """Trains; a run that has saved its state waits for Slurm to end the job."""
    os.chdir(self.folder)
    print(*self.command, flush=True)
    # Not subprocess, which a signal handler may not wait with.
    self.pid = os.posix_spawn(self.command[0], self.command, os.environ)
    signal.signal(signal.SIGTERM, self._stop)
    code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    if code in [128 + signum for signum in stops]:
      time.sleep(3600)  # To end by itself would be to fail, not to be requeued.
    sys.exit(code)

  def checkpoint(self) -> "submitit.helpers.DelayedSubmission":  # noqa: F821
    """Called in the first task when time is up: what to go on with."""
    import submitit

    self._stop()
    with contextlib.suppress(ChildProcessError):  # It was waited for already.
      os.waitpid(self.pid, 0)
    again = Task(self.command, self.folder)
    return submitit.helpers.DelayedSubmission(again)

  def _stop(self, *signal_and_frame):
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, signal.SIGTERM)


def main(*words: str) -> None:
  """Submits what the flags say; see --help."""
  root = Path(_ROOT.value).expanduser().absolute()
  if words and words[0].startswith("-"):
    name, tasks = "convmixer", [_single(words)]
  elif len(words) == 1:
    name, tasks = words[0], _sweep(words[0], root)
  else:
    raise UserError(
      "give a sweep, or -- and what convmixer_jax.main is to get; the sweeps"
      f" are {', '.join(sweeps.SWEEPS)}"
    )
  if not tasks:
    print(f"{name}: all runs are finished; nothing to do")
    return
  for task in tasks:
    if _num_tasks() > 1:
      task.command.append("--distributed")
  jobs = _submit(name, tasks, root / "slurm")
  number = jobs[0].job_id.partition("_")[0]
  print(
    f"submitted {name} as job {number}, {len(jobs)} runs; squeue -j {number}"
    f" shows it, scancel {number} stops it, and {root}/slurm/{number}_* is what"
    " it prints"
  )


def _num_tasks():
  return _NODES.value * max(1, _GPUS.value)


def _single(args):
  """What one run does; its flags are checked here and not after hours."""
  cli.parse_flags(["main", *args], main_lib._FLAGS)
  config_lib.check(cli.required(main_lib._CONFIG), _num_tasks())
  command = [sys.executable, "-m", "convmixer_jax.main", *args]
  return Task(command, os.getcwd())


def _sweep(name, root):
  runs = [
    run_lib.Run(cell, seed, root / name / cell.name / f"seed{seed}")
    for cell, seed in sweeps.get(name).runs()
  ]
  return [
    Task(run.command(), str(sweeps.ROOT))
    for run in runs
    if not run_lib.finished(run.workdir)
  ]


def _submit(name, tasks, folder):
  try:
    import submitit
  except ImportError as e:
    raise UserError(f"{e}; pip install submitit") from e
  options = [option.partition("=") for option in _SBATCH.value]
  given = {
    "partition": _PARTITION.value,
    "gpus_per_node": _GPUS.value or None,
    "cpus_per_task": _CPUS.value,
  }
  try:
    # Of the executor's own limits none is meant: a run may need many jobs.
    executor = submitit.SlurmExecutor(folder, max_num_timeout=10**6)
    executor.update_parameters(
      job_name=name,
      time=max(1, round(60 * _HOURS.value)),
      nodes=_NODES.value,
      ntasks_per_node=max(1, _GPUS.value),
      array_parallelism=_PARALLEL.value,
      stderr_to_stdout=True,
      additional_parameters={
        "requeue": True,
        **{
          key.replace("-", "_"): value if equals else True
          for key, equals, value in options
        },
      },
      **{k: v for k, v in given.items() if v is not None},
    )
    # What sbatch says, submitit prints and raises.
    with contextlib.redirect_stderr(io.StringIO()), executor.batch():
      return [executor.submit(task) for task in tasks]
  except (RuntimeError, OSError) as e:
    raise UserError(str(e).strip().splitlines()[-1].strip()) from e


if __name__ == "__main__":
  cli.run(main, _FLAGS)
