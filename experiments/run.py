"""Trains a sweep: every cell with every seed, each run in its own process.

  python -m experiments.run smoke --root runs
  python -m experiments.run cifar10_ablation --root runs --dry_run
  python -m experiments.run patch_kernel --root runs --dry_run \\
      --topology v5e:16x16 --dollars_per_chip_hour 1.2
  python -m experiments.run patch_kernel --root runs --only 3/16
  python -m experiments.run my_sweeps.py:WIDTHS --root runs
  python -m experiments.run smoke --root runs --watch

A run's workdir is ROOT/SWEEP/CELL/seedS; its output is log.txt in there. Rerun
the command to continue: finished runs are skipped, interrupted runs resume, and
failed runs, which have a failed.txt, are tried again. A failure does not stop
the other runs. Ctrl-C, SIGTERM or SIGHUP makes the active runs save their state
and end.

With several GPUs or TPU chips, each trains another run. Hosts that share ROOT
share the sweep, if each runs this command: a run is trained by one of them, and
if that host is lost, another continues it.
"""

import contextlib
import datetime
import math
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import tqdm

from convmixer_jax import cli
from convmixer_jax import files
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import devices
from experiments import estimate
from experiments import runs as runs_lib
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
  "Train nothing; print the runs with parameters, FLOPs and estimated times,"
  " from the speed of a training step on this machine: --dry_run.",
)
_TOPOLOGY = _FLAGS.string(
  "topology",
  "With --dry_run: times on other devices, as in convmixer_jax.plan, which need"
  " not be here: --topology v5e:16x16.",
)
_DOLLARS = _FLAGS.number(
  "dollars_per_chip_hour",
  "With --topology: price of a device, for the cost: --dollars_per_chip_hour"
  " 1.2.",
  lower_bound=0.0,
)
_WATCH = _FLAGS.boolean(
  "watch",
  "Train nothing; show where each run is and which process trains it: --watch."
  " On a terminal again and again, until each run is finished or has failed.",
)
_JOBS = _FLAGS.positive(
  "jobs",
  "Runs at a time: --jobs 4. More runs than GPUs share them; on a CPU the runs"
  " divide the cores. Default: one per GPU or TPU chip, or one on a CPU.",
)
_DATA_DIR = _FLAGS.string(
  "data_dir",
  "Where TFDS prepared the data, if not in its default folder. From a bucket"
  " each host copies them once: --data_dir gs://bucket/tfds.",
)
_DEVICES_PER_RUN = _FLAGS.positive(
  "devices_per_run",
  "GPUs or TPU chips that train a run together, which must divide its"
  " batch_size: --devices_per_run 4. Default: 1.",
)
# Seconds between two looks at the runs of other processes, and in a bucket.
LOOK_AGAIN, LOOK_AGAIN_IN_BUCKET = 5.0, 30.0


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  sweep = sweeps.get(*names)
  root = files.path(cli.required(_ROOT)) / sweep.name
  workdir_lib.check_place(root.parent, "root")
  chosen = sweep.runs()
  if _ONLY.value is not None:
    chosen = runs_lib.part(chosen, _ONLY.value)
  if _DATA_DIR.value is not None:
    chosen = [(c.of_data(_DATA_DIR.value), seed) for c, seed in chosen]
  runs = scores.each(lambda each: runs_lib.Run.of(root, *each), chosen)
  print(f"{sweep.name}: {sweep.about} {len(runs)} runs")
  if not runs:  # More parts than runs.
    return
  for flag, other in ((_TOPOLOGY, _DRY_RUN), (_DOLLARS, _TOPOLOGY)):
    if flag.value is not None and not other.value:
      raise UserError(f"--{flag.name}={flag.value}: needs --{other.name}")
  if _WATCH.value and _DRY_RUN.value:
    raise UserError("--watch, --dry_run: give one of the two")
  if _WATCH.value:
    scores.locate(names, _ROOT.value)
    _watch(runs)
    return
  if _DRY_RUN.value and _TOPOLOGY.value is not None:
    each = _DEVICES_PER_RUN.value or 1
    estimate.print_hours_on(runs, _TOPOLOGY.value, each, _DOLLARS.value)
    return
  if _DRY_RUN.value:
    estimate.print_hours(runs)
    return
  shares = devices.share(devices.find(), _JOBS.value, _DEVICES_PER_RUN.value)
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--root={_ROOT.value}: {e.strerror}") from e
  received = []
  for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Background jobs of a shell ignore SIGINT. nohup is to ignore SIGHUP.
    if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
      signal.signal(signum, lambda signum, frame: received.append(signum))
  _run_all(runs, shares, received)
  for run in runs:
    if run.reason:
      text = f"{run.status}: {run.workdir}: {run.reason}"
      print(text, file=sys.stderr, flush=True)
  print(runs_lib.counts(runs))
  if received:
    sys.exit(128 + received[0])
  if any(run.status == "failed" for run in runs):
    sys.exit(1)


def _run_all(runs, shares, received=()):
  """Trains what is not finished until a signal is received.

  `shares` has the environment of each run at a time. Waits for the runs that
  other processes train, and trains those that they leave.
  """
  slots: list[runs_lib.Run | None] = [None] * len(shares)
  waiting = [run for run in runs if run.status == "waiting"]
  told, looked, drawn = 0, -math.inf, -math.inf
  again = _look_again(runs)
  with tqdm.tqdm(
    total=len(runs),
    initial=sum(scores.each(runs_lib.Run.share_done, runs)),
    bar_format="{percentage:3.0f} %|{bar:20}| {elapsed}<{remaining}{postfix}",
    dynamic_ncols=True,
    disable=None,
  ) as bar:
    while any(slots) or (waiting and not received):
      for i, run in enumerate(slots):
        if run and run.process.poll() is not None:
          slots[i], looked = None, -math.inf
          _ended(run, stopping=told > 0)
          if run.status == "running elsewhere":
            waiting.append(run)
        if slots[i] or received or time.monotonic() < looked + again:
          continue
        slots[i] = _start_next(waiting, i, shares, bar, received)
        if slots[i] is None:
          looked = time.monotonic()
      if len(received) > told:
        told = len(received)
        _say("stopping: the active runs save their state")
        for run in filter(None, slots):
          run.process.terminate()
      if not bar.disable and time.monotonic() > drawn + again / 10:
        bar.set_postfix_str(runs_lib.summary(runs), refresh=False)
        bar.update(sum(scores.each(runs_lib.Run.share_done, runs)) - bar.n)
        bar.refresh()
        drawn = time.monotonic()
      time.sleep(0.5)


def _look_again(runs):
  """Seconds between two looks at the runs of other processes."""
  in_bucket = any(not isinstance(run.workdir, Path) for run in runs)
  return LOOK_AGAIN_IN_BUCKET if in_bucket else LOOK_AGAIN


def _say(text):
  """Prints a line above the bar."""
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


def _start_next(waiting, slot, shares, bar, received):
  """Starts the first run that no other process trains, and returns it.

  Removes it from `waiting`, and those before it that have ended. Returns None
  if other processes train all of `waiting`, if a bucket does not answer, or if
  a signal was received.
  """
  holders = scores.each(_holder, waiting)
  for run, holder in zip([*waiting], holders):
    if received:
      return None
    before = run.status
    try:
      if run.take(holder):
        _start(run, slot, shares)
    except (OSError, UserError) as e:
      run.release()
      if files.is_url(run.workdir) and not files.denied(e):
        _say(f"{run.name}: not started, tried again later: {e}")
        return None
      run.status, run.reason = "failed", str(e)
      if isinstance(e, OSError):
        run.reason = f"{e.strerror}: {e.filename or run.workdir}"
    if run.status != "running elsewhere":
      waiting.remove(run)
    if run.status == "running":
      if bar.disable:
        _say(f"{run.name}: started; output in {run.workdir}/log.txt")
      return run
    if run.status != before:
      _say(f"{run.name}: {run.status}{_why(run)}")
  return None


def _holder(run, *locks):
  """As `Run.holder`; '' also if it cannot be found out."""
  try:
    return run.holder(*locks)
  except UserError:  # Taking it will fail too.
    return ""


def _start(run, slot, shares):
  (run.workdir / "failed.txt").unlink(missing_ok=True)
  with run.log.open("a", encoding="utf-8") as log:
    run.process = subprocess.Popen(
      run.cell.command(run.seed, run.workdir),
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      env=os.environ | shares[slot],
      start_new_session=True,  # Ctrl-C reaches it through this process only.
    )
  if not shares[slot] and hasattr(os, "sched_setaffinity"):
    # Threads of two runs on the same core would wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # It may have ended.
      part = cores[slot :: len(shares)] or cores
      os.sched_setaffinity(run.process.pid, part)
  run.status = "running"


def _ended(run, stopping):
  code = run.process.returncode
  # Whatever the code: a signal may come after the last record, and a process
  # of a runner that was killed may have trained it.
  try:
    finished, unknown = scores.finished(run.workdir), ""
  except UserError as e:
    finished, unknown = False, str(e)
  if finished:
    run.status = "finished"
  # The second one ends it before there is anything to save.
  elif stopping and code in (128 + signal.SIGTERM, -signal.SIGTERM):
    run.status = "interrupted"
  elif holder := unknown or _holder(run, "lock"):
    run.status, run.reason = "running elsewhere", holder
  else:
    run.status, run.reason = "failed", run.last_line()
    with contextlib.suppress(OSError):
      now = datetime.datetime.now().isoformat(" ", "seconds")
      text = f"{now} exit code {code}: {run.reason}\n"
      (run.workdir / "failed.txt").write_text(text, "utf-8", "backslashreplace")
  run.release()
  evals = run.records("eval", "top1")
  score = f"  top-1 {evals[-1]['top1']:.2f} %" if evals else ""
  _say(f"{run.name}: {run.status}{_why(run)}{score}")


def _why(run):
  return f": {run.reason}" if run.reason else ""


def _watch(runs):
  """Prints where the runs are; on a terminal until all have ended.

  If they are more than the terminal has lines, only those that have begun and
  not finished.
  """
  while True:
    rows = [("run", "status", "step", "loss", "top-1 %", "last record",
             "process, or why it failed")]  # fmt: skip
    terminal = sys.stdout.isatty()
    brief = terminal and len(runs) + 3 > shutil.get_terminal_size().lines
    scores.each(runs_lib.Run.look, runs)
    for run, progress in zip(runs, scores.each(runs_lib.Run.progress, runs)):
      if not brief or run.status not in ("finished", "waiting"):
        rows.append((run.name, run.status, *progress, run.reason))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    text = "\n".join([*lines, runs_lib.counts(runs)])
    ended = ("finished", "failed")
    again = terminal and any(run.status not in ended for run in runs)
    # From the first line of an empty screen.
    print("\033[H\033[2J" * again + text, flush=True)
    if not again:
      return
    time.sleep(_look_again(runs))


if __name__ == "__main__":
  cli.run(main, _FLAGS)
