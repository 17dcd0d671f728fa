"""Accuracy and wall time of a training run, from the files of its workdir.

  python -m benchmarks.trained --workdir runs/cifar10 --out cifar10.json

The wall time is the sum of all starts of the run, with reading data and
compiling. Prints one line. The file is complete if the run is finished.
"""

import datetime
from pathlib import Path

import benchmarks
from convmixer_jax import cli
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_WORKDIR = _FLAGS.string("workdir", "Folder of the run: --workdir runs/mine.")
_OUT = benchmarks.define_out(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  workdir = Path(cli.required(_WORKDIR))
  starts = workdir_lib.read_starts(workdir)["starts"]
  if not starts:
    raise UserError(f"--workdir={workdir}: no run has started there")
  records = workdir_lib.read_metrics(workdir)
  evals = [r for r in records if r["kind"] == "eval"]
  rates = [r["images_per_second"] for r in records if "images_per_second" in r]
  last = records[-1] if records else {"step": 0}
  config = workdir_lib.load_config(workdir)
  complete = starts[-1].get("status") == "finished"
  record = {
    "workdir": workdir.name,
    "model": config.model.name,
    "dtype": config.model.dtype or "float32",
    "seed": config.seed,
    "epochs": config.epochs,
    "batch_size": config.batch_size,
    "status": starts[-1].get("status", "killed"),
    "step": last["step"],
    "seconds": benchmarks.digits(_wall_time(starts, records)),
    "top1": evals[-1]["top1"] if evals else None,
    "top1_of_each_evaluation": [[r["step"], r["top1"]] for r in evals],
    "images_per_second": benchmarks.summary(rates) if rates else None,
    "starts": starts,
  }
  benchmarks.save(record, _OUT.value, complete=complete)
  top1 = "no evaluation yet" if not evals else f"top-1 {record['top1']:.2f} %"
  print(
    f"{record['status']} at step {record['step']} after"
    f" {record['seconds']:.0f} s: {top1}"
  )


def _wall_time(starts, records):
  """Seconds; a start that was killed ends with its last record."""
  time = lambda text: datetime.datetime.fromisoformat(text)
  total = 0.0
  for i, start in enumerate(starts):
    begin, end = start["started"], start.get("ended")
    if not end:
      before = starts[i + 1]["started"] if i + 1 < len(starts) else "9"
      own = [r["time"] for r in records if begin <= r["time"] < before]
      end = max(own, default=begin)
    total += (time(end) - time(begin)).total_seconds()
  return total


if __name__ == "__main__":
  cli.run(main, _FLAGS)
