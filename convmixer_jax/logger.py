"""What a run writes down: metrics, config, environment, progress."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from convmixer_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Logger:
  """Writes into a workdir, and shows progress; silent but on one process.

  config.json, run.json (one entry per start: commit, versions, devices, times),
  metrics.jsonl (a JSON object a record: the source of every table),
  TensorBoard events; a progress bar on a terminal and lines elsewhere.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    config_json: str,
    *,
    first_step: int,
    total_steps: int,
    batch_size: int,
    active: bool,
    changes: Sequence[str] = (),
  ):
    """Opens the files.

    Args:
      workdir: made if absent.
      config_json: of the run.
      first_step: updates already done; later records in metrics.jsonl, of a run
        that went on after its last checkpoint, are dropped.
      total_steps: of the run.
      batch_size: images per step, for the rates.
      active: False writes and prints nothing.
      changes: of the config since the last start; recorded in run.json.
    """
    self._active = active
    self._total = total_steps
    self._batch_size = batch_size
    self._step = first_step
    self._clock = None
    self._waited = 0.0
    if not active:
      return
    self._workdir = Path(workdir)
    with self._writing():
      self._open(config_json, changes)
    self._bar = tqdm.tqdm(
      total=total_steps * batch_size,
      initial=first_step * batch_size,
      unit="img",
      unit_scale=True,
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
    )

  def _open(self, config_json, changes):
    self._workdir.mkdir(parents=True, exist_ok=True)
    _write_whole(self._workdir / "config.json", config_json)
    self._starts = _read_starts(self._workdir / "run.json")
    self._starts["starts"].append(
      _environment()
      | {"first_step": self._step, "status": "running"}
      | ({"changes": [*changes]} if changes else {})
    )
    self._write_run()
    path = self._workdir / "metrics.jsonl"
    records = [
      r for r in read_metrics(self._workdir) if r["step"] <= self._step
    ]
    _write_whole(path, "".join(json.dumps(r) + "\n" for r in records))
    self._records = path.open("a", buffering=1)
    try:
      self._tensorboard = _TensorBoard(self._workdir, records)
    except ImportError as e:
      print(f"no TensorBoard events: {e}; everything else is written")
      self._tensorboard = None

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._active:
      tqdm.tqdm.write(text, file=sys.stdout)
      sys.stdout.flush()

  def classes(self, names: Sequence[str]) -> None:
    """Writes the names of the classes, a line each."""
    if self._active:
      with self._writing():
        text = "".join(f"{name}\n" for name in names)
        _write_whole(self._workdir / "classes.txt", text)

  def overview(self, params: Any) -> None:
    """Prints the table of parameters."""
    if self._active:
      from clu import parameter_overview

      table = parameter_overview.get_parameter_overview(
        params, include_stats=False
      )
      self.say(table)

  def start_clock(self, step: int) -> None:
    """Rates count from here on: call after compilation and after pauses."""
    self._clock, self._step = time.perf_counter(), step
    self._waited = 0.0

  def timed(self, batches: Iterable) -> Iterator:
    """Yields from `batches`; the time they take is what data_wait counts."""
    start = time.perf_counter()
    for batch in batches:
      self._waited += time.perf_counter() - start
      yield batch
      start = time.perf_counter()

  def train(
    self, step: int, metrics: Sequence[Mapping[str, Any]], **more: float
  ) -> None:
    """Records the means of the steps since the last record.

    Beside them images_per_second, and data_wait: the percentage of the time
    that went into waiting for batches.

    Args:
      step: updates done.
      metrics: scalars of each step.
      **more: scalars of this moment.
    """
    means = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}
    images = (step - self._step) * self._batch_size
    elapsed = time.perf_counter() - self._clock if self._clock else 0.0
    if images and elapsed:
      means["images_per_second"] = images / elapsed
      means["data_wait"] = 100 * self._waited / elapsed
    self.start_clock(step)  # What follows, logging, counts in the next rate.
    self._record(step, "train", {"steps": len(metrics)} | means | more)
    if not self._active:
      return
    rate = means.get("images_per_second", 0.0)
    left = (self._total - step) * self._batch_size / rate if rate else None
    self._bar.set_description(f"step {step}/{self._total}", refresh=False)
    wait = f"data wait {means.get('data_wait', 0.0):.0f} %"
    self._bar.set_postfix_str(
      f"loss {means['loss']:.4f}, {wait}", refresh=False
    )
    self._bar.update(step * self._batch_size - self._bar.n)
    if self._bar.disable:
      self.say(
        f"step {step}/{self._total}  loss {means['loss']:.4f}  "
        + (f"{rate:.0f} img/s  {wait}  {_duration(left)} left" if rate else "")
      )

  def evaluated(self, step: int, metrics: Mapping[str, float] | None) -> None:
    """Records and prints the metrics of a whole split; None: it was stopped."""
    self.start_clock(step)
    if metrics is None:
      return
    self._record(step, "eval", metrics)
    self.say(f"step {step}/{self._total}  {eval_line(metrics)}")

  def close(self, status: str, step: int) -> None:
    """Ends the run's entry with 'finished', 'interrupted' or 'failed'."""
    if not self._active:
      return
    self._bar.close()
    self._starts["starts"][-1] |= {
      "status": status,
      "last_step": step,
      "ended": _now(),
    }
    # What has failed may have been writing; it has been said by then.
    quiet = [UserError] if status == "failed" else []
    for write in (
      self._write_run,
      self._records.close,
      *([self._tensorboard.close] if self._tensorboard else []),
    ):
      with contextlib.suppress(*quiet), self._writing():
        write()

  def _record(self, step, kind, scalars):
    if not self._active:
      return
    record = {"step": step, "kind": kind, "time": _now(), **scalars}
    with self._writing():
      self._records.write(json.dumps(record) + "\n")
      if self._tensorboard is not None:
        self._tensorboard.write(record)

  @contextlib.contextmanager
  def _writing(self):
    """Says in one line why something cannot be written."""
    try:
      yield
    except OSError as e:
      raise UserError(
        f"{self._workdir}: cannot be written: {e.strerror or e}; what is saved"
        " there is whole, and the same command goes on from it"
      ) from e

  def _write_run(self):
    _write_whole(
      self._workdir / "run.json", json.dumps(self._starts, indent=2) + "\n"
    )


def progress(
  batches: Iterable, total: int, doing: str = "evaluating"
) -> Iterable:
  """A bar over batches, where the terminal is ours."""
  show = sys.stderr.isatty() and jax.process_index() == 0
  return tqdm.tqdm(
    batches,
    desc=doing,
    total=total,
    leave=False,
    delay=1,
    disable=not show,
  )


def eval_line(metrics: Mapping[str, float]) -> str:
  """One line for people."""
  return (
    f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %"
    f"  loss {metrics['loss']:.4f}  on {metrics['count']} images"
  )


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The whole records of metrics.jsonl; a damaged line is left out.

  Raises:
    UserError: it cannot be read.
  """
  path = Path(workdir) / "metrics.jsonl"
  records = []
  if path.exists():
    for line in _read_text(path).splitlines():
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("kind"), str)
      ):
        records.append(record)
  return records


def read_eval(workdir: str | os.PathLike, step: int) -> dict[str, Any] | None:
  """The last record of `step`'s evaluation, if it is there and not damaged."""
  found = [
    record
    for record in read_metrics(workdir)
    if record["kind"] == "eval"
    and record["step"] == step
    and all(
      isinstance(record.get(name), (int, float))
      for name in ("top1", "top5", "loss", "count")
    )
  ]
  return found[-1] if found else None


def _read_text(path):
  try:
    return path.read_text(errors="replace")
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e


def provenance() -> dict[str, Any]:
  """What made a result: commit, Python, versions of `PACKAGES`."""
  git = lambda *args: subprocess.run(
    ["git", *args],
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  try:
    commit = git("rev-parse", "HEAD")
    # Results that are being written do not change what is measured.
    results = ":(top,exclude,glob)*/results/**"
    if git("status", "--porcelain", "--untracked-files=no", "--", results):
      commit += "+changes"
  except (OSError, subprocess.CalledProcessError):
    commit = None
  return {
    "commit": commit,
    "python": platform.python_version(),
    "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
  }


def _environment():
  devices = jax.devices()
  return {
    "started": _now(),
    "arguments": sys.argv[1:],
    **provenance(),
    "device": devices[0].device_kind,
    "num_devices": len(devices),
    "num_processes": jax.process_count(),
    "cpu_count": os.cpu_count(),
  }


class _TensorBoard:
  """Writes the records of metrics.jsonl, as they come, for TensorBoard.

  Into one file, which replaces those of earlier starts and begins with their
  records: what a start did after its last checkpoint was not to be.

  Raises:
    ImportError: tensorboard is not installed.
  """

  def __init__(self, workdir, records):
    from tensorboard.compat.proto import event_pb2  # Without tensorflow.
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.summary.writer import record_writer

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    now, host = int(time.time()), platform.node()
    prefix = "events.out.tfevents."
    path = workdir / f"{prefix}{now:010}.{host}.{os.getpid()}"
    earlier = {*workdir.glob(f"{prefix}*")} - {path}
    self._writer = record_writer.RecordWriter(path.open("wb"))
    self._add(time.time(), file_version="brain.Event:2")
    # A TensorBoard that is open forgets what it has read of the earlier files.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(time.time(), step=0, session_log=start)
    for record in records:
      # Those of a file that was edited may hold anything.
      with contextlib.suppress(
        ValueError, TypeError, LookupError, OverflowError
      ):
        self.write(record)
    for file in earlier:
      file.unlink(missing_ok=True)

  def write(self, record):
    scalars = {**record}
    step, kind = scalars.pop("step"), scalars.pop("kind")
    seconds = datetime.datetime.fromisoformat(scalars.pop("time")).timestamp()
    values = [
      self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(seconds, step=step, summary=self._summary(value=values))

  def _add(self, seconds, **fields):
    event = self._event(wall_time=seconds, **fields)
    self._writer.write(event.SerializeToString())
    self._writer.flush()

  def close(self):
    self._writer.close()


def _duration(seconds):
  return str(datetime.timedelta(seconds=round(seconds)))


def _now():
  return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


def _read_starts(path):
  """run.json, which is written whole: so one that is damaged was edited."""
  if not path.exists():
    return {"starts": []}
  try:
    run = json.loads(_read_text(path))
    run["starts"] = [*run["starts"]]
  except (ValueError, TypeError, LookupError, RecursionError) as e:
    raise UserError(f"{path}: damaged; remove it to go on: {e}") from e
  return run


def _write_whole(path: Path, text: str) -> None:
  """Writes so that a crash leaves the old file or the new one."""
  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)
