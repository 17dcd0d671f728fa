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

from convmixer_jax import files
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.buckets.mirror import Mirror
from convmixer_jax.errors import InUse
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
  workdir: files.AnyPath
  status: str = "waiting"
  reason: str = ""  # Why it failed, or who trains it.
  process: subprocess.Popen | None = None
  claim: contextlib.ExitStack = dataclasses.field(
    default_factory=contextlib.ExitStack
  )
  mirror: Mirror | None = None  # Of a workdir in a bucket.
  # Of an earlier start, which is tried again.
  old_failure: str | None = dataclasses.field(init=False)

  def __post_init__(self):
    self.old_failure = self.failure()
    if scores.finished(self.workdir):
      self.status = "finished"

  @classmethod
  def of(cls, root: files.AnyPath, cell: cells.Cell, seed: int) -> "Run":
    """The run of a cell and a seed; `root` is the sweep's folder."""
    return cls(cell, seed, root / cell.name / f"seed{seed}")

  @property
  def name(self) -> str:
    return f"{self.cell.name}/seed{self.seed}"

  @functools.cached_property
  def epochs(self) -> int:
    return self.cell.resolve(self.seed).epochs

  def failure(self) -> str | None:
    """The text of failed.txt, with its time; None if there is no such file."""
    try:
      return (self.workdir / "failed.txt").read_text("utf-8", "replace")
    except OSError:
      return None

  def holder(self, *locks: str) -> str:
    """The process that trains the run, or by default is about to; or ''."""
    locks = locks or ("lock", _CLAIM)
    holders = (workdir_lib.holder(self.workdir, name) for name in locks)
    return next(filter(None, holders), "")

  def look(self) -> None:
    """Sets `status` and `reason` of a run that other processes train."""
    self.reason = self.holder()
    if scores.finished(self.workdir):
      self.status = "finished"
    elif self.reason:
      self.status = "running"
    elif failure := self.failure():
      self.status, self.reason = "failed", _reason(failure)
    else:
      begun = files.exists(self.workdir / "metrics.jsonl")
      self.status = "interrupted" if begun else "waiting"

  def take(self, holder: str | None = None) -> bool:
    """Whether this process may train the run, which no other does then.

    Otherwise `status` and `reason` say why: another process trains it, or has
    ended it. `release` ends the claim. `holder` may have been found a moment
    ago. Raises OSError if there can be no folder of its name, UserError if it
    cannot be written.
    """
    self.workdir.mkdir(parents=True, exist_ok=True)
    holder = self.holder() if holder is None else holder
    try:
      if not holder:
        self.claim.enter_context(workdir_lib.lock(self.workdir / _CLAIM))
    except InUse as e:
      holder = e.holder
    if holder:
      self.status, self.reason = "running elsewhere", holder
    elif scores.finished(self.workdir):
      self.status, self.reason = "finished", ""
    elif (failure := self.failure()) not in (None, self.old_failure):
      self.status, self.reason = "failed", _reason(failure)
    else:
      self.status, self.reason = "waiting", ""
      if not isinstance(self.workdir, Path):
        self._mirror_log()
      return True
    self.release()
    return False

  def _mirror_log(self):
    self.mirror = Mirror(self.workdir)
    with contextlib.suppress(FileNotFoundError):
      self.log.write_bytes((self.workdir / self.log.name).read_bytes())

  def release(self) -> None:
    """Leaves the run to other processes."""
    if self.mirror:
      # If another process has taken over, its log is the right one.
      with contextlib.suppress(OSError, UserError):
        self.mirror.close()
      self.mirror = None
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

  @property
  def log(self) -> Path:
    """The file of its output, which this process writes; see `take`."""
    return (self.mirror.local if self.mirror else self.workdir) / "log.txt"

  def last_line(self) -> str:
    """The last line of its output that is not empty."""
    try:
      text = self.log.read_text("utf-8", "replace")
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


def part(runs: Sequence[Any], only: str) -> Sequence[Any]:
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
