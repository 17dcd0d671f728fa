"""Trains and evaluates.

  python -m convmixer_jax.main --config configs/digits.py
  python -m convmixer_jax.main --config configs/cifar10.py \\
      --workdir runs/p4 --config.model.patch_size=4 --config.seed=1
  python -m convmixer_jax.main --config configs/imagenet.py:768_32 \\
      --config.data.name=folder --config.data.dir=/data/imagenet \\
      --config.data.eval_split=val
  python -m convmixer_jax.main --workdir runs/cifar10 --mode eval \\
      --confusion matrix.csv
  python -m convmixer_jax.main --config configs/imagenet.py --mode eval \\
      --workdir runs/published --config.init_from=convmixer_1536_20.safetensors

Every field of a config is a flag: --config.epochs=9 --config.model.depth=4.
Rerun the same command to resume, or with the run's --workdir alone.

Exit codes: 0 finished; 1 failed, with a traceback; 2 a mistake in the flags,
config or files; 75 (--distributed) another process ended or did not start;
128 plus the signal's number (143 for SIGTERM) stopped, and the state is saved.
"""

import contextlib
import csv
import io
import json
import os
from pathlib import Path
import re

import jax

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import distributed
from convmixer_jax import evaluate
from convmixer_jax import files
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import step as step_lib
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib
from convmixer_jax import writers
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_WORKDIR = _FLAGS.string(
  "workdir",
  "Folder for checkpoints, metrics and logs. If it holds a run, that run is"
  " resumed, without --config by its own config: --workdir runs/mine. Default:"
  " runs/ and the config's name; of a config.json, its folder.",
)
_MODE = _FLAGS.enum(
  "mode",
  "--mode train trains and evaluates. --mode eval evaluates the newest"
  " checkpoint of the workdir, or --config.init_from if it has none, and prints"
  " a line, a table of classes (the worst 10 of more than 20), and, as the last"
  " line, a JSON object.",
  "train",
  enum_values=["train", "eval"],
)
_CONFUSION = _FLAGS.string(
  "confusion",
  "With --mode eval: CSV file for the confusion matrix, a row for each true"
  " class and a column for each predicted one: --confusion matrix.csv.",
)
_DISTRIBUTED = _FLAGS.boolean(
  "distributed",
  "Run as one of several processes, one on each host, all started with the"
  " same command: --distributed. TPU pods, Slurm and Kubernetes are detected;"
  " elsewhere pass the next three flags too.",
)
_COORDINATOR = _FLAGS.string(
  "coordinator",
  "With --distributed: address of process 0: --coordinator 10.0.0.1:1234.",
)
_NUM_PROCESSES = _FLAGS.positive(
  "num_processes", "With --distributed: number of processes: --num_processes 4."
)
_PROCESS_ID = _FLAGS.integer(
  "process_id",
  "With --distributed: index of this process, from 0: --process_id 0.",
  lower_bound=0,
)
_ACCEPT_CHANGES = _FLAGS.boolean(
  "accept_changes",
  "Resume although the workdir holds a run of another config. The changes are"
  " recorded in its run.json: --accept_changes.",
)
_PROFILE = _FLAGS.string(
  "profile",
  "Write a trace of updates START+1 to STOP to WORKDIR/profile, for TensorBoard"
  " and Perfetto: --profile 100:110.",
)
_WANDB = _FLAGS.string(
  "wandb",
  "Write the records to this project of Weights & Biases too: --wandb mixers."
  " Needs the package wandb.",
)
_TIMEOUT = _FLAGS.positive(
  "timeout",
  "With --distributed: seconds after which all processes end because one has"
  " not started or does not respond: --timeout 300. Default: 60.",
  60,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  config, workdir = _CONFIG.value, _WORKDIR.value
  if config is None:
    if workdir and not files.is_folder(workdir):
      raise UserError(
        f"--workdir={workdir}: holds no run to go on with; pass --config to"
        " start one"
      )
    if not workdir:
      raise UserError(
        "--config is missing, and no --workdir holds a run; try python -m"
        " convmixer_jax.main --config configs/digits.py, which takes seconds,"
        " or --help"
      )
    config = workdir_lib.load_config(workdir)
  if workdir is None:
    given = _FLAGS["config"].config_filename
    path, _, variant = given.partition(":")
    # configs/imagenet.py:768_32 -> runs/imagenet_768_32.
    name = Path(path).stem + (f"_{variant}" if variant else "")
    own = given.endswith(".json")
    workdir = files.path(given).parent if own else f"runs/{name}"
  if not str(workdir):
    raise UserError("--workdir: is empty")
  workdir = os.fspath(files.path(workdir))
  where = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and where != (None, None, None):
    raise UserError(
      "--coordinator, --num_processes, --process_id: need --distributed"
    )
  evaluates = _MODE.value == "eval"
  for flag in (_PROFILE, _WANDB):
    if flag.value is not None and evaluates:
      raise UserError(f"--{flag.name}={flag.value}: needs --mode train")
  csv_file, profile = _csv_file(), _profiled_updates()
  accept = _ACCEPT_CHANGES.value
  session = contextlib.nullcontext()
  if _DISTRIBUTED.value:
    fields = config_lib.flatten(config).items()
    settings = {
      "--workdir": os.fspath(files.absolute(workdir)),
      "--mode": _MODE.value,
      "--accept_changes": accept,
      "--profile": _PROFILE.value,
    } | {f"config.{name}": value for name, value in fields}
    session = distributed.session(
      *where,
      timeout=_TIMEOUT.value,
      settings=settings,
      operations=lambda: models.operations(models.create_model(**config.model)),
    )
  with session:
    if not evaluates:
      wandb = None
      if _WANDB.value is not None and jax.process_index() == 0:
        wandb = writers.Wandb(_WANDB.value)
      train.train_and_evaluate(
        config, workdir, accept_changes=accept, profile=profile, wandb=wandb
      )
      return
    metrics = evaluate.evaluate_checkpoint(config, workdir)
    if jax.process_index() == 0:
      confusion = metrics.pop("confusion", None)
      per_class = metrics.pop("per_class", [])
      step = metrics["step"]
      source = config.init_from if step is None else f"step {step}"
      print(f"{source}  {logger.eval_line(metrics)}")
      if per_class:
        metrics["per_class"] = shown = _shown(per_class)
        print(_table(shown, len(per_class)))
      print(json.dumps(metrics), flush=True)
      if csv_file:
        _write_csv(csv_file, [c["name"] for c in per_class], confusion)


def _csv_file():
  """The file of --confusion, or None."""
  if _CONFUSION.value is None:
    return None
  path = files.path(_CONFUSION.value)
  if _MODE.value != "eval":
    raise UserError(f"--confusion={path}: needs --mode eval")
  if isinstance(path, Path) and not path.parent.is_dir():
    raise UserError(f"--confusion={path}: its folder does not exist")
  if files.exists(path) and not path.is_file():
    raise UserError(f"--confusion={path}: exists and is not a file")
  return path


def _profiled_updates():
  """The range of --profile, or None."""
  if _PROFILE.value is None:
    return None
  match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", _PROFILE.value)
  profile = range(*map(int, match.groups())) if match else None
  if not profile:
    raise UserError(
      f"--profile={_PROFILE.value}: must be START:STOP, two numbers of updates,"
      " the first below the second, as in --profile 100:110"
    )
  return profile


def _shown(per_class):
  """All classes if at most 20, or else the 10 worst."""
  if len(per_class) <= 20:
    return per_class
  known = (c for c in per_class if c["images"])
  return sorted(known, key=lambda c: c["top1"])[:10]


def _table(shown, count):
  """Some of `count` classes as lines of text."""
  worst = f"the {len(shown)} worst of " if len(shown) < count else ""
  first = f"{worst}{count} classes"
  rows = [(first, "images", "top-1 %", "most often taken for")]
  for c in shown:
    top1 = f"{c['top1']:.2f}" if c["images"] else ""
    taken = f"{c['mistaken_for']} ({c['mistakes']})" if c["mistakes"] else ""
    rows.append((c["name"], str(c["images"]), top1, taken))
  width = max(len(row[0]) for row in rows)
  lines = (f"{a:<{width}}  {b:>6}  {c:>7}  {d}".rstrip() for a, b, c, d in rows)
  return "\n".join(lines)


def _write_csv(path, names, confusion):
  if confusion is None:
    raise UserError(
      f"--confusion={path}: not written; the matrix is counted for at most"
      f" {step_lib.MOST_COUNTED} classes and one label an image"
    )
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["true \\ predicted", *names])
  writer.writerows([name, *row] for name, row in zip(names, confusion.tolist()))
  try:
    files.write_whole(path, text.getvalue())
  except OSError as e:
    raise UserError(f"--confusion={path}: {e.strerror}") from e


if __name__ == "__main__":
  cli.run(main, _FLAGS)
