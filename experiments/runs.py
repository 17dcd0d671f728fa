"""The runs of a sweep: where each is, and who trains it."""

import collections
from collections.abc import Iterable
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
from pathlib import Path
import subprocess
from typing import Any

from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import cells
from experiments import scores

STATUSES = ("finished", "running", "running elsewhere", "failed", "waiting",
            "interrupted")  # fmt: skip
# The lock of the process that starts a run; "lock" is that of the run itself.
_CLAIM = "claim"


@dataclasses.dataclass
class Run:
  """A cell with a seed, and its status."""

  cell: cells.Cell
  seed: int
  workdir: Path
  status: str = "waiting"
  reason: str = ""  # Why it failed, or who trains it.
  process: subprocess.Popen | None = None
  claim: contextlib.ExitStack = dataclasses.field(
    default_factory=contextlib.ExitStack
  )
  # Of an earlier start, which is tried again.
  old_failure: str | None = dataclasses.field(init=False)

  def __post_init__(self):
    self.old_failure = self.failure()
    if scores.finished(self.workdir):
      self.status = "finished"

  @property
  def name(self) -> str:
    return f"{self.cell.name}/seed{self.seed}"

  @functools.cached_property
  def epochs(self) -> int:
    return self.cell.resolve(self.seed).epochs

  def failure(self) -> str | None:
    """The text of failed.txt, with its time; None if there is no such file."""
    path = self.workdir / "failed.txt"
    try:
      return f"{path.stat().st_mtime_ns} {path.read_text('utf-8', 'replace')}"
    except OSError:
      return None

  def _holder(self):
    """The process that trains the run, or is about to; or ''."""
    holders = (workdir_lib.holder(self.workdir, x) for x in ("lock", _CLAIM))
    return next(filter(None, holders), "")

  def look(self) -> None:
    """Sets `status` and `reason` of a run that other processes train."""
    self.reason = self._holder()
    if scores.finished(self.workdir):
      self.status = "finished"
    elif self.reason:
      self.status = "running"
    elif failure := self.failure():
      self.status, self.reason = "failed", _reason(failure)
    else:
      begun = (self.workdir / "metrics.jsonl").exists()
      self.status = "interrupted" if begun else "waiting"

  def take(self) -> bool:
    """Whether this process may train the run, which no other does then.

    Otherwise `status` and `reason` say why: another process trains it, or has
    ended it. `release` ends the claim. Raises OSError if there can be no folder
    of its name, UserError if it cannot be written.
    """
    self.workdir.mkdir(parents=True, exist_ok=True)
    holder = self._holder()
    try:
      if not holder:
        self.claim.enter_context(workdir_lib.lock(self.workdir / _CLAIM))
    except workdir_lib.InUse as e:
      holder = e.holder
    if holder:
      self.status, self.reason = "running elsewhere", holder
    elif scores.finished(self.workdir):
      self.status, self.reason = "finished", ""
    elif (failure := self.failure()) not in (None, self.old_failure):
      self.status, self.reason = "failed", _reason(failure)
    else:
      self.status, self.reason = "waiting", ""
      return True
    self.release()
    return False

  def release(self) -> None:
    """Leaves the run to other processes."""
    self.claim.close()

  def records(self, kind: str, field: str) -> list[dict[str, Any]]:
    """The records of a kind whose `field` is a number."""
    try:
      records = workdir_lib.read_metrics(self.workdir)
    except UserError:
      return []
    number = lambda record: isinstance(record.get(field), (int, float))
    return [r for r in records if r["kind"] == kind and number(r)]

  def progress(self) -> tuple[str, str, str, str]:
    """The last step, loss, top-1 and time of a record, as texts."""
    train, evals = self.records("train", "loss"), self.records("eval", "top1")
    last = max(train[-1:] + evals[-1:], key=lambda r: r["step"], default={})
    return (
      str(last.get("step", "")),
      f"{train[-1]['loss']:.3f}" if train else "",
      f"{evals[-1]['top1']:.2f}" if evals else "",
      str(last.get("time", "")).replace("T", " "),
    )

  def last_line(self) -> str:
    """The last line of its output that is not empty."""
    try:
      text = (self.workdir / "log.txt").read_text("utf-8", "replace")
    except OSError as e:
      return f"{e.strerror}: {e.filename}"
    lines = reversed(text.splitlines())
    return next((line for line in lines if line.strip()), "no output")

  def share_done(self) -> float:
    """From 0 to 1; a failed run counts as done, for the time that is left."""
    if self.status in ("finished", "failed"):
      return 1.0
    records = self.records("train", "epoch")
    return records[-1]["epoch"] / self.epochs if records else 0.0


def _reason(failure):
  return failure.partition(": ")[2].strip()


def part(runs: Sequence[Run], only: str) -> Sequence[Run]:
  """Part I of N of the runs; `only` is 'I/N', or else UserError."""
  try:
    number, parts = map(int, only.split("/"))
  except ValueError:
    number, parts = 0, 0
  if not 1 <= number <= parts:
    raise UserError(f"--only={only}: must be I/N, with I from 1 to N")
  return runs[number - 1 :: parts]


def counts(runs: Iterable[Run]) -> str:
  """'3 finished, 1 failed'; omits a status that no run has."""
  found = collections.Counter(run.status for run in runs)
  return ", ".join(f"{found[s]} {s}" for s in STATUSES if found[s])


def summary(runs: Iterable[Run]) -> str:
  """How many runs are in each status, and where the active ones are."""
  active = []
  for run in runs:
    if run.status == "running" and (records := run.records("train", "loss")):
      last = records[-1]
      active.append(f"{run.name} step {last['step']} loss {last['loss']:.3f}")
  return "; ".join([counts(runs), *active])
