"""The best state of a run, kept in a small workdir inside the run's own."""

from collections.abc import Mapping
import contextlib
import json
import math
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import splits
from convmixer_jax.errors import UserError
from convmixer_jax.files import writing
from convmixer_jax.step import TrainState

# Fields that say what a score means.
_SCORE = ("data.name", "data.eval_split", "data.crop_pct")


class Best:
  """Keeps the best state in WORKDIR/best, if `config.keep_best` is set.

  That folder is a workdir: config.json, classes.txt, metrics.jsonl with the
  evaluations of what it has held, and one checkpoint. The best has the highest
  top1 or the lowest loss of all evaluations; of equal ones it is the first, and
  NaN never is. What it holds is the only memory of the best so far. It is on
  the disk before the run saves its own checkpoint of that step, so it has seen
  every evaluation up to the step from which a run resumes. It may have seen
  later ones; when these are repeated they do not count again.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, workdir: str | os.PathLike
  ):
    """Raises UserError if `workdir` is such a folder itself.

    Or if it has one that was chosen by other scores, or by another run.
    """
    self._config, self._workdir = config, files.path(workdir)
    self._metric, self._folder = config.keep_best, self._workdir / "best"
    here = files.absolute(workdir)
    own = (here / "config.json", here.parent / "config.json")
    if here.name == "best" and all(map(files.exists, own)):
      raise UserError(
        f"--workdir={workdir}: holds the best checkpoint of the run in"
        f" {here.parent}, and is not trained. Resume that run, or pass another"
        f" --workdir and --config.init_from={workdir} to start from its weights"
      )
    if not self._metric or self._step is None:
      return
    changes = workdir_lib.config_changes(
      config, self._folder, config_lib.FREE_FIELDS
    )
    if checkpoint.latest_step(workdir) is not None:  # It is the same run's.
      changes = {k: v for k, v in changes.items() if k in _SCORE}
    if changes:
      raise UserError(
        f"{self._folder}: was chosen under another config"
        f" ({'; '.join(changes.values())}); move this folder away to choose the"
        " best anew, or turn config.keep_best off"
      )

  @property
  def _step(self):
    return checkpoint.latest_step(self._folder)

  def warning(
    self, train_source: sources.Source, eval_source: sources.Source
  ) -> str:
    """Says if `data.eval_split` is no fair choice of images; else ''."""
    if not self._metric or not train_source.ranges:
      return ""
    data, trained = self._config.data, {x for x, _ in train_source.ranges}
    others = {x for x, _ in eval_source.ranges} - trained
    if data.name == "folder":  # Its `val` was made to choose by.
      others = {x for x in others if "test" in x.lower()}
    if splits.overlap(train_source.ranges, eval_source.ranges):
      why = f"some of its images are in data.train_split={data.train_split}"
    elif others:
      why = "the best of many test scores is not a fair score"
    else:
      return ""
    name = min(trained)
    return (
      f"warning: keep_best chooses by data.eval_split={data.eval_split}: {why};"
      f" hold out images with --config.data.train_split='{name}[:98%]'"
      f" --config.data.eval_split='{name}[98%:]'"
    )

  def offer(
    self, step: int, metrics: Mapping[str, Any] | None, state: TrainState
  ) -> None:
    """Keeps `state` if it is the best so far, and waits for the disk.

    All processes must call this with the same arguments. `metrics` are those of
    its evaluation, or None if there was none. Raises UserError if the folder
    cannot be written.
    """
    if not self._metric or metrics is None:
      return
    # Process 0 says so: another may not see its files yet.
    best = np.int32(jax.process_index() == 0 and self._is_best(step, metrics))
    if not multihost_utils.broadcast_one_to_all(best):
      return
    if jax.process_index() == 0:
      with writing(self._folder):
        self._write_files(step, metrics)
    with contextlib.closing(
      checkpoint.Checkpointer(self._folder)
    ) as checkpointer:
      checkpointer.save_only(step, state)

  def _is_best(self, step, metrics):
    if any(math.isnan(metrics[name]) for name in ("top1", "loss")):
      return False
    if (last := self._step) is None:
      return True
    if step <= last:  # Repeated after a restart.
      return False
    old = workdir_lib.read_eval(self._folder, last)
    sign = {"top1": 1, "loss": -1}[self._metric]
    return not old or sign * metrics[self._metric] > sign * old[self._metric]

  def _write_files(self, step, metrics):
    self._folder.mkdir(exist_ok=True)
    for name in ("config.json", "classes.txt"):
      if files.exists(path := self._workdir / name):
        text = path.read_text("utf-8", "surrogateescape")
        files.write_whole(self._folder / name, text)
    records = workdir_lib.read_metrics(self._folder)
    scores = {k: metrics[k] for k in workdir_lib.SCORES if k in metrics}
    records.append({"step": step, "kind": "eval", **scores})
    text = "".join(json.dumps(r) + "\n" for r in records)
    files.write_whole(self._folder / "metrics.jsonl", text)

  def describe(self) -> str:
    """Where the best is, as the end of a sentence; '' if nothing is kept."""
    if not self._metric or (step := self._step) is None:
      return ""
    name = {"top1": "top-1", "loss": "loss"}[self._metric]
    return f"; best {name} at step {step}, in {self._folder}"
