"""Trains on Slurm: a sweep as a job array, or one run on many GPUs or hosts.

  python -m experiments.slurm patch_kernel --root runs --partition gpu --gpus 1
  python -m experiments.slurm --partition gpu --nodes 4 --gpus 8 --hours 24 \\
      --sbatch account=vision,qos=low -- \\
      --config configs/imagenet.py --workdir runs/imagenet

Flags after -- are passed to convmixer_jax.main. A job has one task per GPU, or
one per host without GPUs; several tasks train one run together (--distributed).
When Slurm pre-empts a job, or its hours are over, the job saves its state, is
queued again, and resumes. The root and the workdir must be on a file system
that all hosts share. Needs submitit.
"""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
import signal
import sys
import time

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax.errors import UserError
from experiments import scores
from experiments import sweeps

_FLAGS = cli.Flags()
_ROOT = _FLAGS.string(
  "root",
  "Folder for the sweep's folder, and for slurm/, the output of the jobs:"
  " --root runs.",
  "runs",
)
_PARTITION = _FLAGS.string(
  "partition", "Slurm partition: --partition gpu. Default: Slurm's."
)
_NODES = _FLAGS.positive("nodes", "Hosts per run: --nodes 4. Default: 1.", 1)
_GPUS = _FLAGS.integer(
  "gpus",
  "GPUs per host, with a task each: --gpus 8. Default: none, and one task per"
  " host.",
  0,
  lower_bound=0,
)
_CPUS = _FLAGS.positive(
  "cpus", "CPU cores per task: --cpus 12. Default: Slurm's."
)
_HOURS = _FLAGS.number(
  "hours",
  "Hours after which a job saves its state and is queued again: --hours 24.",
  24,
  lower_bound=0.01,
)
_PARALLEL = _FLAGS.positive(
  "parallel",
  "Runs of a sweep at a time, at most: --parallel 16. Default: 256.",
  256,
)
_SBATCH = _FLAGS.words(
  "sbatch",
  "More sbatch options, without dashes: --sbatch account=vision,exclusive.",
  [],
)

# The flags of convmixer_jax.main, to find mistakes before a job is queued.
_RUN_FLAGS = cli.Flags()
_CONFIG = _RUN_FLAGS.define_config()
for _name in ("workdir", "mode", "coordinator", "num_processes", "process_id",
              "timeout"):  # fmt: skip
  _RUN_FLAGS.string(_name, "")
for _name in ("accept_changes", "distributed"):
  _RUN_FLAGS.boolean(_name, "")


@dataclasses.dataclass
class Task:
  """One task of a job. submitit calls `checkpoint` before time is up."""

  command: list[str]
  folder: str  # Where it runs.

  def __call__(self) -> None:
    """Trains. A run that has saved its state waits until Slurm ends the job."""
    os.chdir(self.folder)
    print(*self.command, flush=True)
    # Not subprocess: a signal handler must not wait with it.
    self.pid = os.posix_spawn(self.command[0], self.command, os.environ)
    signal.signal(signal.SIGTERM, self._stop)
    code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    if code in [128 + signum for signum in stops]:
      time.sleep(3600)  # A job that ends by itself is not queued again.
    sys.exit(code)

  def checkpoint(self) -> "submitit.helpers.DelayedSubmission":  # noqa: F821
    """Called in the first task when time is up. Returns what resumes it."""
    import submitit

    self._stop()
    with contextlib.suppress(ChildProcessError):  # __call__ has waited.
      os.waitpid(self.pid, 0)
    again = Task(self.command, self.folder)
    return submitit.helpers.DelayedSubmission(again)

  def _stop(self, *signal_and_frame):
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, signal.SIGTERM)


def main(*words: str) -> None:
  """Submits what the flags say; see --help."""
  if files.is_url(_ROOT.value):
    text = "must be a folder that all hosts share: Slurm writes there too"
    raise UserError(f"--root={_ROOT.value}: {text}")
  root = Path(_ROOT.value).expanduser().absolute()
  if words and words[0].startswith("-"):
    name, tasks = "convmixer", [_single(words)]
  elif len(words) == 1:
    name, tasks = _sweep(words[0], root)
  else:
    raise UserError(
      "Give the name of a sweep, or -- and the flags of convmixer_jax.main."
      f" Sweeps: {', '.join(sweeps.SWEEPS)}"
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
    f"submitted {name} as job {number}, {len(jobs)} runs. Show it: squeue -j"
    f" {number}. Stop it: scancel {number}. Output: {root}/slurm/{number}_*"
  )


def _num_tasks():
  return _NODES.value * max(1, _GPUS.value)


def _single(args):
  """The task of one run. Finds mistakes in its flags before it is queued."""
  cli.parse_flags(["main", *args], _RUN_FLAGS)
  config_lib.check(cli.required(_CONFIG), _num_tasks())
  command = [sys.executable, "-m", "convmixer_jax.main", *args]
  return Task(command, os.getcwd())


def _sweep(name, root):
  """The sweep's name, and a task for each run that is not finished."""
  sweep, tasks = sweeps.get(name), []
  for cell, seed in sweep.runs():
    workdir = root / sweep.name / cell.name / f"seed{seed}"
    if not scores.finished(workdir):
      tasks.append(Task(cell.command(seed, workdir), os.getcwd()))
  return sweep.name, tasks


def _submit(name, tasks, folder):
  try:
    import submitit
  except ImportError as e:
    raise UserError(f"{e}. Install it: pip install submitit") from e
  options = [option.partition("=") for option in _SBATCH.value]
  given = {
    "partition": _PARTITION.value,
    "gpus_per_node": _GPUS.value or None,
    "cpus_per_task": _CPUS.value,
  }
  try:
    # No limit on how often a job is queued again: a run may need many jobs.
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
    # submitit prints sbatch's message, and raises it too.
    with contextlib.redirect_stderr(io.StringIO()), executor.batch():
      return [executor.submit(task) for task in tasks]
  except (RuntimeError, OSError) as e:
    raise UserError(str(e).strip().splitlines()[-1].strip()) from e


if __name__ == "__main__":
  cli.run(main, _FLAGS)
