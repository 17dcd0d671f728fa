"""What a run writes: metrics, config, environment, TensorBoard events."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import json
import os
from pathlib import Path
import secrets
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from convmixer_jax import files
from convmixer_jax import runtime
from convmixer_jax import sheet
from convmixer_jax import workdir as workdir_lib
from convmixer_jax import writers
from convmixer_jax.buckets import mirror
from convmixer_jax.errors import UserError
from convmixer_jax.files import writing

_SHEET = "first_batch.png"


class Logger:
  """Writes the files of a workdir and shows progress.

  The files are config.json, run.json (one entry per start: commit, versions,
  devices, times), metrics.jsonl (one JSON object per record, from which all
  tables are made) and TensorBoard events. Progress is a bar on a terminal, and
  lines elsewhere.
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
    num_devices: int = 1,
    peak_rate: float | None = None,
    profile: range | None = None,
    wandb: writers.Wandb | None = None,
  ):
    """Creates the workdir if it does not exist, and opens the files.

    Of `total_steps` updates, `first_step` are done. Records of later ones, made
    after the last checkpoint, are removed from metrics.jsonl. `changes` are
    those of the config since the last start. Only one process of a run is
    `active`; the others write and print nothing. Batches are shared by
    `num_devices`, each of `peak_rate` (see `recipe.Recipe`). `profile` are the
    updates to trace (see `start_profile`), and `wandb` is one more writer.
    """
    self._active = active
    self._total = total_steps
    self._batch_size = batch_size
    self._num_devices, self._peak_rate = num_devices, peak_rate
    self._clock, self._step, self._waited = None, first_step, 0.0
    self._profile, self._tracing, self._wandb = profile, False, wandb
    if not active:
      return
    self._workdir = files.path(workdir)
    # Where the files are that grow.
    self._mirror, self._folder = None, self._workdir
    if not isinstance(self._workdir, Path):
      self._mirror = mirror.Mirror(self._workdir)
      self._folder = self._mirror.local
    try:
      with writing(self._workdir):
        self._open(config_json, changes)
    except BaseException:
      if self._mirror:
        with contextlib.suppress(OSError, UserError):
          self._mirror.close()
      raise
    if profile and profile.stop <= first_step:
      self.say(
        f"--profile: nothing will be traced, because {first_step} updates are"
        " done"
      )
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
    self._starts = workdir_lib.read_starts(self._workdir)
    if self._wandb:  # First: without a login nothing of a run is written.
      run_id = self._starts.setdefault("wandb", secrets.token_hex(4))
      name = files.absolute(self._workdir).name
      self._wandb.start(name, self._folder, run_id, config_json)
    files.write_whole(self._workdir / "config.json", config_json)
    start = _environment() | {"first_step": self._step, "status": "running"}
    if changes:
      start["changes"] = [*changes]
    self._starts["starts"].append(start)
    self._write_run()
    path = self._folder / "metrics.jsonl"
    records = workdir_lib.read_metrics(self._workdir)
    records = [r for r in records if r["step"] <= self._step]
    text = "".join(json.dumps(r) + "\n" for r in records)
    files.write_whole(path, text)
    self._records = path.open("a", buffering=1, encoding="utf-8")
    try:
      self._tensorboard = writers.TensorBoard(
        self._folder, records, self._workdir
      )
      # A resumed run's is there, unless it was removed or damaged.
      with contextlib.suppress(OSError, SyntaxError, ValueError):
        if self._step:
          self._tensorboard.write_sheet(self._workdir / _SHEET)
    except ImportError as e:
      print(f"no TensorBoard events: {e}; all other files are written")
      self._tensorboard = None

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._active:
      tqdm.tqdm.write(text, file=sys.stdout)
      sys.stdout.flush()

  def write_classes(self, names: Sequence[str]) -> None:
    """Writes classes.txt: the name of each class on a line."""
    if self._active:
      with writing(self._workdir):
        text = "".join(f"{name}\n" for name in names)
        files.write_whole(self._workdir / "classes.txt", text)

  def print_parameters(self, params: Any) -> None:
    """Prints the table of parameters."""
    if self._active:
      from clu import parameter_overview

      overview = parameter_overview.get_parameter_overview
      self.say(overview(params, include_stats=False))

  def log_images(
    self, images: np.ndarray, targets: np.ndarray, names: Sequence[str]
  ) -> None:
    """Writes images of step 0 to first_batch.png and to TensorBoard.

    For the arguments see `sheet.draw`.
    """
    if not self._active:
      return
    path = self._folder / _SHEET
    with writing(self._workdir):
      sheet.draw(images, targets, names, "step 0").save(path)
      if self._tensorboard is not None:
        self._tensorboard.write_sheet(path)
    self.start_clock(0)

  def start_profile(self, step: int, state: Any) -> None:
    """Call it before each update; `step` are done, and led to `state`.

    Of the updates `profile` (0 is the first) a trace is written to
    WORKDIR/profile. The device's earlier work is not part of it.
    """
    if self._active and self._profile and step in self._profile:
      if not self._tracing:
        jax.block_until_ready(state)
        jax.profiler.start_trace(self._folder / "profile")
      self._tracing = True

  def stop_profile(self, step: int, state: Any) -> None:
    """Call it after each update, as `start_profile`."""
    if self._tracing and step not in self._profile:
      jax.block_until_ready(state)
      self._end_trace()
      self.start_clock(step)  # Writing takes seconds.

  def _end_trace(self):
    self._tracing = False
    with writing(self._workdir, RuntimeError):
      jax.profiler.stop_trace()
    self.say(f"trace: {self._workdir / 'profile'}")

  def start_clock(self, step: int) -> None:
    """Restarts the timing of rates: call it after compilation and pauses."""
    self._clock, self._step, self._waited = time.perf_counter(), step, 0.0

  def timed(self, batches: Iterable) -> Iterator:
    """Yields from `batches` and adds the time that they take to data_wait."""
    start = time.perf_counter()
    for batch in batches:
      self._waited += time.perf_counter() - start
      yield batch
      start = time.perf_counter()

  def log_train(
    self, step: int, metrics: Sequence[Mapping[str, Any]], **more: float
  ) -> None:
    """Records the means of `metrics`, the scalars of each step since the last
    record.

    Adds images_per_second, of all devices and of each, mfu, the percentage of
    the peak FLOP/s if that is known, data_wait, the percentage of the time
    spent waiting for batches, and `more`.
    """
    means = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}
    images = (step - self._step) * self._batch_size
    elapsed = time.perf_counter() - self._clock if self._clock else 0.0
    if images and elapsed:
      means["images_per_second"] = images / elapsed
      each = images / elapsed / self._num_devices
      means["images_per_second_per_device"] = each
      if self._peak_rate:
        means["mfu"] = 100 * each / self._peak_rate
      means["data_wait"] = 100 * self._waited / elapsed
    self.start_clock(step)  # The time of logging counts in the next rate.
    self._record(step, "train", {"steps": len(metrics)} | means | more)
    if not self._active:
      return
    done, loss = f"step {step}/{self._total}", f"loss {means['loss']:.4f}"
    wait = f"data wait {means.get('data_wait', 0.0):.0f} %"
    if "mfu" in means:
      wait = f"MFU {means['mfu']:.1f} %  {wait}"
    self._bar.set_description(done, refresh=False)
    self._bar.set_postfix_str(f"{loss}, {wait}", refresh=False)
    self._bar.update(step * self._batch_size - self._bar.n)
    if self._bar.disable:
      speed = ""
      if rate := means.get("images_per_second"):
        left = round((self._total - step) * self._batch_size / rate)
        left = datetime.timedelta(seconds=left)
        each = means["images_per_second_per_device"]
        each = f" ({each:.0f} a device)" if self._num_devices > 1 else ""
        speed = f"{rate:.0f} img/s{each}  {wait}  {left} left"
      self.say(f"{done}  {loss}  {speed}")

  def log_eval(self, step: int, metrics: Mapping[str, Any] | None) -> None:
    """Records and prints the metrics of a split; None if it was interrupted.

    The confusion matrix goes to TensorBoard alone, as a picture.
    """
    self.start_clock(step)
    if metrics is not None:
      self._record(step, "eval", metrics)
      self.say(f"step {step}/{self._total}  {eval_line(metrics)}")

  def close(self, status: str, step: int) -> None:
    """Closes the files; `status` is 'finished', 'interrupted' or 'failed'."""
    if not self._active:
      return
    self._bar.close()
    start = self._starts["starts"][-1]
    start.update(status=status, last_step=step, ended=_now())
    # If writing was what failed, that error is already being raised.
    quiet = [UserError] if status == "failed" else []
    with contextlib.suppress(*quiet), contextlib.ExitStack() as stack:
      stack.enter_context(writing(self._workdir))
      # The last one first, and all of them, if some fail.
      if self._mirror:
        stack.callback(self._mirror.close)
      if self._tensorboard is not None:
        stack.callback(self._tensorboard.close)
      stack.callback(self._records.close)
      stack.callback(self._write_run)
      if self._tracing:
        stack.callback(self._end_trace)
    if self._wandb:
      self._wandb.finish(status)

  def _record(self, step, kind, scalars):
    if not self._active:
      return
    record = {"step": step, "kind": kind, "time": _now(), **scalars}
    confusion = record.pop("confusion", None)
    with writing(self._workdir):
      if self._mirror:
        self._mirror.check()
      self._records.write(json.dumps(record) + "\n")
      if self._tensorboard is not None:
        self._tensorboard.write(record, confusion)
    if self._wandb:
      self._wandb.write(record)

  def _write_run(self):
    workdir_lib.write_run(self._workdir, self._starts)


def progress(
  batches: Iterable, total: int, doing: str = "evaluating"
) -> Iterable:
  """Iterates over `batches` with a progress bar, if stderr is a terminal."""
  hide = not sys.stderr.isatty() or jax.process_index() > 0
  return tqdm.tqdm(batches, doing, total, leave=False, delay=1, disable=hide)


def eval_line(metrics: Mapping[str, Any]) -> str:
  """The metrics of an evaluation as one line of text."""
  top5 = f"  top-5 {metrics['top5']:.2f} %" if "top5" in metrics else ""
  return (
    f"top-1 {metrics['top1']:.2f} %{top5}  loss {metrics['loss']:.4f}"
    f"  on {metrics['count']} images"
  )


def _environment():
  devices = jax.devices()
  return {
    "started": _now(),
    "arguments": sys.argv[1:],
    **runtime.provenance(),
    "device": devices[0].device_kind,
    "num_devices": len(devices),
    "num_processes": jax.process_count(),
    "cpu_count": os.cpu_count(),
  }


def _now():
  return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
