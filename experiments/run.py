"""Runs a sweep: every cell with every seed, each in a process of its own.

  python -m experiments.run smoke --root runs
  python -m experiments.run cifar10_ablation --root runs --dry_run
  python -m experiments.run patch_kernel --root runs --only 3/16

Runs lie in ROOT/SWEEP/CELL/seedS, as training leaves them, with what they print
in log.txt. What is finished is skipped, what was interrupted goes on where it
stopped, and what fails is recorded in failed.txt and does not stop the others;
the same command tries it again. Ctrl-C or SIGTERM saves all runs under way. Of
several GPUs each takes a run of its own.
"""

import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from absl import flags
import jax.numpy as jnp
import numpy as np
import rich.live
import rich.table

import benchmarks
from convmixer_jax import cli
from convmixer_jax import models
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import sweeps

_FLAGS = flags.FlagValues()
_ROOT = flags.DEFINE_string(
  "root",
  None,
  "Where the sweep's folder is made: --root runs.",
  flag_values=_FLAGS,
)
_ONLY = flags.DEFINE_string(
  "only",
  None,
  "Part I of N of the runs, I from 1 to N, for job arrays: --only 3/16.",
  flag_values=_FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Print the runs, their parameters and FLOPs, and the hours that they take at"
  " the speed of a step measured here, and stop: --dry_run.",
  flag_values=_FLAGS,
)
_JOBS = flags.DEFINE_integer(
  "jobs",
  None,
  "Runs at a time: --jobs 4. They share the GPUs, or on a CPU its cores, among"
  " them. Default: one for each GPU, or one.",
  lower_bound=1,
  flag_values=_FLAGS,
)


@dataclasses.dataclass
class Run:
  """A cell with a seed, and how far it is."""

  cell: sweeps.Cell
  seed: int
  workdir: Path
  status: str = "waiting"
  process: subprocess.Popen | None = None

  @property
  def name(self) -> str:
    return f"{self.cell.name}/seed{self.seed}"

  def command(self) -> list[str]:
    """What trains it, as a user would write it."""
    fields = {**self.cell.overrides, "seed": self.seed}
    return [
      sys.executable,
      "-m",
      "convmixer_jax.main",
      f"--config={self.cell.config}",
      f"--workdir={self.workdir.absolute()}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  sweep = sweeps.get(*names)
  root = Path(cli.required(_ROOT)).expanduser() / names[0]
  runs = [
    Run(cell, seed, root / cell.name / f"seed{seed}")
    for cell, seed in _part(sweep.runs(), _ONLY.value)
  ]
  for run in runs:
    if finished(run.workdir):
      run.status = "finished"
  print(f"{names[0]}: {sweep.about} {len(runs)} runs")
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
  for signum in (signal.SIGINT, signal.SIGTERM):  # Also where they are ignored.
    signal.signal(signum, signal.default_int_handler)
  interrupted = _run_all(runs, _JOBS.value or max(1, len(gpus)), gpus)
  counts = {s: sum(run.status == s for run in runs) for s in
            ("finished", "failed", "waiting", "interrupted")}  # fmt: skip
  print(", ".join(f"{n} {status}" for status, n in counts.items() if n))
  for run in runs:
    if run.status == "failed":
      print(f"failed: {run.workdir}: {_last_line(run)}", file=sys.stderr)
  if interrupted:
    sys.exit(128 + signal.SIGINT)
  if counts["failed"]:
    sys.exit(1)


def _part(runs, only):
  if only is None:
    return runs
  try:
    part, parts = map(int, only.split("/"))
  except ValueError:
    part, parts = 0, 0
  if not 1 <= part <= parts:
    raise UserError(f"--only={only}: must be I/N with I from 1 to N")
  return runs[part - 1 :: parts]


def finished(workdir: Path) -> bool:
  """Whether a run has trained to its end and been scored."""
  try:
    start = json.loads((workdir / "run.json").read_text())["starts"][-1]
    steps = [(r["kind"], r["step"]) for r in workdir_lib.read_metrics(workdir)]
    last = ("eval", start["last_step"])
    return start["status"] == "finished" and steps[-1] == last
  except (OSError, ValueError, LookupError, TypeError):
    return False


def _gpus() -> list[str]:
  """The GPUs' numbers; asked of another process, which gives them back."""
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


def _run_all(runs, jobs, gpus):
  """Returns whether Ctrl-C ended it. It reaches the runs too, which save."""
  slots: list[Run | None] = [None] * jobs
  waiting = [run for run in runs if run.status == "waiting"]
  stopping = False
  with rich.live.Live(_table(runs), refresh_per_second=2) as live:
    while any(slots) or (waiting and not stopping):
      try:
        for i, run in enumerate(slots):
          if run and run.process and run.process.poll() is not None:
            slots[i] = None
            _ended(run, stopping, live)
          if slots[i] is None and waiting and not stopping:
            slots[i] = waiting.pop(0)
            _start(slots[i], i, jobs, gpus)
        live.update(_table(runs))
        time.sleep(0.5)
      except KeyboardInterrupt:
        stopping = True
        live.console.print("stopping: each run under way saves its state")
        for run in slots:
          if run and run.process:
            run.process.send_signal(signal.SIGTERM)
  return stopping


def _start(run, slot, jobs, gpus):
  run.workdir.mkdir(parents=True, exist_ok=True)
  (run.workdir / "failed.txt").unlink(missing_ok=True)
  env = dict(os.environ)
  if gpus:
    env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if jobs > len(gpus):  # Memory is taken as it is needed.
      env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with (run.workdir / "log.txt").open("a") as log:
    run.process = subprocess.Popen(
      run.command(),
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      env=env,
      cwd=sweeps.ROOT,
      start_new_session=True,  # Ctrl-C comes by way of this process, once.
    )
  if not gpus and hasattr(os, "sched_setaffinity"):
    # Cores of its own: threads of two runs on one core wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(run.process.pid, cores[slot::jobs] or cores)
  run.status = "running"


def _ended(run, stopping, live):
  code = run.process.returncode
  if code == 0 and finished(run.workdir):
    run.status = "finished"
  elif stopping and code == 128 + signal.SIGTERM:
    run.status = "interrupted"
  else:
    run.status = "failed"
    text = f"exit code {code}: {_last_line(run)}\n"
    (run.workdir / "failed.txt").write_text(text)
  live.console.print(f"{run.name}: {run.status}{_score(run)}")


def _last_line(run):
  lines = (run.workdir / "log.txt").read_text(errors="replace").splitlines()
  return next((line for line in reversed(lines) if line.strip()), "no output")


def _records(run, kind):
  records = workdir_lib.read_metrics(run.workdir)
  return [record for record in records if record.get("kind") == kind]


def _score(run):
  scores = _records(run, "eval")
  return f"  top-1 {scores[-1]['top1']:.2f} %" if scores else ""


def _table(runs):
  """What is running, and how many are not."""
  table = rich.table.Table("run", "step", "loss", "img/s", "top-1", box=None)
  for run in runs:
    if run.status == "running":
      last = _records(run, "train")[-1:]
      cells = [
        f"{r['step']}|{r['loss']:.3f}|{r['images_per_second']:.0f}".split("|")
        for r in last
      ] or [["", "", ""]]
      table.add_row(run.name, *cells[0], _score(run).strip())
  counts = [sum(run.status == s for run in runs) for s in
            ("waiting", "finished", "failed")]  # fmt: skip
  table.caption = "{} waiting, {} finished, {} failed".format(*counts)
  return table


def _dry_run(runs):
  speed, where = _measured_speed(runs)
  table = rich.table.Table(
    "run", "parameters", "GFLOP/image", "epochs", "hours", "", box=None
  )
  total = 0.0
  for run in runs:
    config, model = run.cell.resolve(run.seed), run.cell.model()
    flops = models.forward_flops(model, config.data.image_size)
    images = config.epochs * _TRAINING_IMAGES[config.data.name]
    hours = 3 * flops * images / speed / 3600
    total += hours * (run.status != "finished")
    table.add_row(
      run.name,
      f"{sweeps.count_parameters(model):,}",
      f"{flops / 1e9:.3g}",
      str(config.epochs),
      f"{hours:.2g}",
      run.status if run.status == "finished" else "",
    )
  rich.print(table)
  print(
    f"about {total:.2g} hours to go, one run at a time, at the"
    f" {speed / 1e9:.3g} GFLOP/s of a training step {where}"
  )


# For estimates; a run itself counts what it reads.
_TRAINING_IMAGES = {
  "digits": 1437,
  "cifar10": 50_000,
  "imagenet2012": 1_281_167,
}


def _measured_speed(runs):
  """FLOP/s of a training step, three forward passes, of the smallest cell."""
  cost = lambda cell: models.forward_flops(
    cell.model(), cell.resolve(0).data.image_size
  )
  cell = min((run.cell for run in runs), key=cost)
  config = cell.resolve(0)
  batch, size = min(config.batch_size, 64), config.data.image_size
  with config.unlocked():
    config.accum_steps, config.model.bn_group_size = 1, 0
  images = jnp.zeros((batch, size, size, 3), jnp.uint8)
  targets = jnp.full((batch, cell.model().num_classes), 0.1)
  step = benchmarks.train_step(config, images, targets)
  seconds = np.median(benchmarks.seconds(step, repeats=5))
  where = f"of {cell.name} with {batch} images, measured here"
  return 3 * batch * cost(cell) / seconds, where


if __name__ == "__main__":
  cli.run(main, _FLAGS)
