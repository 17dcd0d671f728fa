"""Trains a sweep: every cell with every seed, each run in its own process.

  python -m experiments.run smoke --root runs
  python -m experiments.run cifar10_ablation --root runs --dry_run
  python -m experiments.run patch_kernel --root runs --only 3/16
  python -m experiments.run my_sweeps.py:WIDTHS --root runs

A run's workdir is ROOT/SWEEP/CELL/seedS; its output is log.txt in there. Rerun
the command to continue: finished runs are skipped, interrupted runs resume, and
failed runs, which have a failed.txt, are tried again. A failure does not stop
the other runs. Ctrl-C, SIGTERM or SIGHUP makes the active runs save their state
and end. A run that another process trains is left to it. With several GPUs,
each trains another run.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import tqdm

from convmixer_jax import cli
from convmixer_jax import recipe
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import cells
from experiments import scores
from experiments import sweeps

_FLAGS = cli.Flags()
_ROOT = _FLAGS.string(
  "root", "Folder in which the sweep's folder is created: --root runs."
)
_ONLY = _FLAGS.string(
  "only",
  "Only part I of N of the runs, for job arrays; I from 1 to N: --only 3/16.",
)
_DRY_RUN = _FLAGS.boolean(
  "dry_run",
  "Train nothing; print the runs with parameters, FLOPs and estimated hours,"
  " from the speed of a training step on this machine: --dry_run.",
)
_JOBS = _FLAGS.positive(
  "jobs",
  "Runs at a time: --jobs 4. They share the GPUs, or split the CPU's cores."
  " Default: one per GPU, or one.",
)


STATUSES = ("finished", "running", "running elsewhere", "failed", "waiting",
            "interrupted")  # fmt: skip


@dataclasses.dataclass
class Run:
  """A cell with a seed, and its status."""

  cell: cells.Cell
  seed: int
  workdir: Path
  status: str = "waiting"
  reason: str = ""  # Why it failed, or who trains it.
  process: subprocess.Popen | None = None

  @property
  def name(self) -> str:
    return f"{self.cell.name}/seed{self.seed}"

  @functools.cached_property
  def epochs(self) -> int:
    return self.cell.resolve(self.seed).epochs


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  sweep = sweeps.get(*names)
  root = Path(cli.required(_ROOT)).expanduser() / sweep.name
  runs = [
    Run(cell, seed, root / cell.name / f"seed{seed}")
    for cell, seed in _part(sweep.runs(), _ONLY.value)
  ]
  for run in runs:
    if scores.finished(run.workdir):
      run.status = "finished"
  print(f"{sweep.name}: {sweep.about} {len(runs)} runs")
  if not runs:  # More parts than runs.
    return
  if _DRY_RUN.value:
    _dry_run(runs)
    return
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--root={_ROOT.value}: {e.strerror}") from e
  gpus = _gpus()
  received = []
  for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Background jobs of a shell ignore SIGINT. nohup is to ignore SIGHUP.
    if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
      signal.signal(signum, lambda signum, frame: received.append(signum))
  _run_all(runs, _JOBS.value or max(1, len(gpus)), gpus, received)
  for run in runs:
    if run.reason:
      text = f"{run.status}: {run.workdir}: {run.reason}"
      print(text, file=sys.stderr, flush=True)
  print(_counts(runs))
  if received:
    sys.exit(128 + received[0])
  if any(run.status == "failed" for run in runs):
    sys.exit(1)


def _part(runs, only):
  if only is None:
    return runs
  try:
    part, parts = map(int, only.split("/"))
  except ValueError:
    part, parts = 0, 0
  if not 1 <= part <= parts:
    raise UserError(f"--only={only}: must be I/N, with I from 1 to N")
  return runs[part - 1 :: parts]


def _gpus() -> list[str]:
  """Numbers of the GPUs. A child process looks, so that this one holds none."""
  code = (
    "import jax\n"
    "if jax.default_backend() == 'gpu': print(jax.local_device_count())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  count = int(done.stdout.strip() or 0)
  return (
    visible.split(",") if visible and count else list(map(str, range(count)))
  )


def _run_all(runs, jobs, gpus, received=()):
  """Trains what is waiting until a signal is received."""
  slots: list[Run | None] = [None] * jobs
  waiting = [run for run in runs if run.status == "waiting"]
  told = 0
  with tqdm.tqdm(
    total=len(runs),
    initial=sum(map(_share_done, runs)),
    bar_format="{percentage:3.0f} %|{bar:20}| {elapsed}<{remaining}{postfix}",
    dynamic_ncols=True,
    disable=None,
  ) as bar:
    while any(slots) or (waiting and not received):
      for i, run in enumerate(slots):
        if run and run.process.poll() is not None:
          slots[i] = None
          _ended(run, stopping=told > 0)
        if slots[i] is None and waiting and not received:
          run = waiting.pop(0)
          try:
            _start(run, i, jobs, gpus)
            slots[i] = run
            if bar.disable:
              _say(f"{run.name}: started; output in {run.workdir}/log.txt")
          except OSError as e:
            run.status = "failed"
            run.reason = f"{e.strerror}: {e.filename or run.workdir}"
            _say(f"{run.name}: failed")
      if len(received) > told:
        told = len(received)
        _say("stopping: the active runs save their state")
        for run in filter(None, slots):
          run.process.terminate()
      if not bar.disable:
        bar.set_postfix_str(_summary(runs), refresh=False)
        bar.update(sum(map(_share_done, runs)) - bar.n)
        bar.refresh()
      time.sleep(0.5)


def _say(text):
  """Prints a line above the bar."""
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


def _start(run, slot, jobs, gpus):
  run.workdir.mkdir(parents=True, exist_ok=True)
  (run.workdir / "failed.txt").unlink(missing_ok=True)
  env = dict(os.environ)
  if gpus:
    env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if jobs > len(gpus):  # They share its memory.
      env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with (run.workdir / "log.txt").open("a", encoding="utf-8") as log:
    run.process = subprocess.Popen(
      run.cell.command(run.seed, run.workdir),
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      env=env,
      start_new_session=True,  # Ctrl-C reaches it through this process only.
    )
  if not gpus and hasattr(os, "sched_setaffinity"):
    # Threads of two runs on the same core would wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # It may have ended.
      os.sched_setaffinity(run.process.pid, cores[slot::jobs] or cores)
  run.status = "running"


def _ended(run, stopping):
  code = run.process.returncode
  if code == 0 and scores.finished(run.workdir):
    run.status = "finished"
  # The second one ends it before there is anything to save.
  elif stopping and code in (128 + signal.SIGTERM, -signal.SIGTERM):
    run.status = "interrupted"
  elif holder := workdir_lib.holder(run.workdir):
    run.status, run.reason = "running elsewhere", holder
  else:
    run.status, run.reason = "failed", _last_line(run)
    with contextlib.suppress(OSError):
      text = f"exit code {code}: {run.reason}\n"
      (run.workdir / "failed.txt").write_text(text, "utf-8", "backslashreplace")
  evals = _records(run, "eval", "top1")
  score = f"  top-1 {evals[-1]['top1']:.2f} %" if evals else ""
  _say(f"{run.name}: {run.status}{score}")


def _last_line(run):
  try:
    lines = (run.workdir / "log.txt").read_text("utf-8", "replace").splitlines()
  except OSError as e:
    return f"{e.strerror}: {e.filename}"
  return next((line for line in reversed(lines) if line.strip()), "no output")


def _records(run, kind, field):
  """The records of a kind whose `field` is a number."""
  try:
    records = workdir_lib.read_metrics(run.workdir)
  except UserError:
    return []
  number = lambda record: isinstance(record.get(field), (int, float))
  return [r for r in records if r["kind"] == kind and number(r)]


def _share_done(run):
  """From 0 to 1; a failed run counts as done, for the time that is left."""
  if run.status in ("finished", "failed"):
    return 1.0
  records = _records(run, "train", "epoch")
  return records[-1]["epoch"] / run.epochs if records else 0.0


def _summary(runs):
  """How many runs are in each status, and where the active ones are."""
  active = []
  for run in runs:
    if run.status == "running" and (records := _records(run, "train", "loss")):
      last = records[-1]
      active.append(f"{run.name} step {last['step']} loss {last['loss']:.3f}")
  return "; ".join([_counts(runs), *active])


def _counts(runs):
  """'3 finished, 1 failed'; omits a status that no run has."""
  found = collections.Counter(run.status for run in runs)
  return ", ".join(f"{found[s]} {s}" for s in STATUSES if found[s])


def _dry_run(runs):
  costs = {run.name: _costs(run.cell) for run in runs}
  smallest = min(runs, key=lambda run: costs[run.name][1])
  speed, measured = _measured_speed(smallest.cell, costs[smallest.name][1])
  width = max(len(run.name) for run in runs)
  print(f"{'run':{width}}  parameters  GFLOP/image  epochs   hours")
  total = 0.0
  for run in runs:
    parameters, flops = costs[run.name]
    hours = 3 * flops * run.epochs * run.cell.data.size / speed / 3600
    total += hours * (run.status != "finished")
    print(
      f"{run.name:{width}}{parameters:12,}"
      f"{flops / 1e9:13.3g}{run.epochs:8}{hours:8.2g}"
      + ("  finished" if run.status == "finished" else "")
    )
  print(
    f"about {total:.2g} hours to go, one run at a time, at {speed / 1e9:.3g}"
    f" GFLOP/s in training ({measured})"
  )


def _costs(cell):
  costs = cell.costs(cell.data.num_classes)
  if costs is None or cell.data.size is None:
    raise UserError(
      f"{cell.name}: --dry_run needs the number of its images and classes, and"
      " its data (data.name, data.dir) are not here"
    )
  return costs


def _measured_speed(cell, flops):
  """FLOP/s of training, as three forward passes, of a cell."""
  config = cell.resolve(0)
  config.batch_size = min(config.batch_size, 64)
  config.accum_steps = 1
  config.model.bn_group_size = config.augment.mix_group_size = 0
  built = recipe.build(config, cell.data, jax.local_devices()[:1])
  state = built.init_state()
  zeros = lambda like: np.zeros(like.shape, like.dtype)
  batch = jax.tree.map(zeros, built.batch_shapes())
  seconds = []
  for _ in range(6):  # The first compiles, and is left out.
    start = time.perf_counter()
    state, metrics = built.train_step(built.seed, state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - start)
  return 3 * config.batch_size * flops / np.median(seconds[1:]), (
    f"measured here: {cell.name}, {config.batch_size} images a step"
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
