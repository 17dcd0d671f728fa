"""Reads, checks and summarises the results of a sweep's runs."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import json
from pathlib import Path
import statistics
from typing import Any
from typing import TypeVar

import tqdm

from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import cells
from experiments import sweeps

T, R = TypeVar("T"), TypeVar("R")

COLUMNS = ("cell", "parameters", "GFLOP/image", "img/s", "ours", "paper",
           "difference")  # fmt: skip
# A run's config may differ from the sweep's in these fields.
_FREE = {*config_lib.FREE_FIELDS, "data.dir"}


@dataclasses.dataclass(frozen=True)
class Result:
  """A cell and its finished runs.

  Attributes:
    cell: the cell.
    runs: seed -> records of metrics.jsonl.
    num_classes: of their data; None if unknown.
  """

  cell: cells.Cell
  runs: Mapping[int, list[dict[str, Any]]]
  num_classes: int | None = None

  @functools.cached_property
  def costs(self) -> tuple[int, int] | None:
    """Parameters, and FLOPs of an image; None if the classes are unknown."""
    return self.cell.costs(self.num_classes)

  @property
  def scores(self) -> dict[int, float]:
    """Seed -> top-1 after the last step, in percent."""
    return {seed: records[-1]["top1"] for seed, records in self.runs.items()}

  @property
  def mean(self) -> float | None:
    """Mean over seeds; None if no run is finished."""
    return statistics.mean(self.scores.values()) if self.runs else None

  @property
  def std(self) -> float | None:
    """Standard deviation over seeds; None for fewer than two."""
    scores = self.scores.values()
    return statistics.stdev(scores) if len(scores) > 1 else None


def finished(workdir: files.AnyPath) -> bool:
  """Whether a run was trained to its end and evaluated.

  Raises UserError if a bucket does not tell.
  """
  try:
    start = json.loads((workdir / "run.json").read_text("utf-8"))["starts"][-1]
    last, done = ("eval", start["last_step"]), start["status"] == "finished"
  except OSError as e:
    absent = isinstance(e, (FileNotFoundError, NotADirectoryError))
    if absent or isinstance(workdir, Path):
      return False
    raise UserError(f"{workdir}: {e.strerror}") from e
  except (ValueError, LookupError, TypeError):
    return False
  records = workdir_lib.read_metrics(workdir)
  return done and [(r["kind"], r["step"]) for r in records][-1:] == [last]


def locate(
  names: Sequence[str], root: str
) -> tuple[sweeps.Sweep, files.AnyPath]:
  """The sweep that a command line names, and its folder.

  Raises:
    UserError: there is no such sweep, or `root` has no folder of that name.
  """
  sweep = sweeps.get(*names)
  folder = files.path(root) / sweep.name
  if not files.is_folder(folder):
    raise UserError(
      f"--root={root}: has no folder {sweep.name}; run experiments.run first"
    )
  return sweep, folder


def collect(
  sweep: sweeps.Sweep, folder: files.AnyPath
) -> tuple[list[Result], list[str]]:
  """Reads the runs of a sweep.

  Returns:
    A result for each cell, and a line for everything that was left out.
  """
  with files.reading(folder):
    return _collect(sweep, folder)


def _collect(sweep, folder):
  results, problems = [], []
  known = {
    folder / cell.name / f"seed{seed}": (cell, seed)
    for cell, seed in sweep.runs()
  }
  cells_of = {folder / cell.name for cell in sweep.cells}
  there = [*folder.iterdir()]
  there += [path for above in there if above in cells_of for path in _in(above)]
  for path in sorted(there):
    if path not in known and path not in cells_of:
      problems.append(f"{path}: not part of this sweep")
  begun = {
    path: json.loads(cell.resolve(seed).to_json())
    for path, (cell, seed) in known.items()
    if path in there
  }

  def read(workdir):
    problem = _problem(workdir, begun[workdir])
    return problem, [] if problem else workdir_lib.read_metrics(workdir)

  found = dict(zip(begun, each(read, begun)))
  for cell in sweep.cells:
    runs, workdirs = {}, []
    for seed in sweep.seeds:
      workdir = folder / cell.name / f"seed{seed}"
      problem, records = found.get(workdir, ("", []))
      if problem:
        problems.append(f"{workdir}: {problem}")
      elif workdir in found:
        runs[seed] = records
        workdirs.append(workdir)
    results.append(Result(cell, runs, _num_classes(cell, workdirs)))
  return results, problems


def each(function: Callable[[T], R], items: Collection[T]) -> list[R]:
  """The function's result for each item.

  Of several at once, because a bucket answers slowly, and with a progress bar
  if it takes long.
  """
  with futures.ThreadPoolExecutor(16) as pool:
    results = pool.map(function, items)
    bar = tqdm.tqdm(
      results, "reading", len(items), leave=False, delay=2, disable=None
    )
    return [*bar]


def _in(folder):
  return [*folder.iterdir()] if folder.is_dir() else []


def _num_classes(cell, workdirs):
  """Of the runs' data, or else of the cell's; None if unknown."""
  try:
    for workdir in workdirs:
      path = workdir / "classes.txt"
      if path.exists() and (lines := path.read_bytes().count(b"\n")):
        return lines
    return cell.data.num_classes
  except (OSError, UserError):  # The log of the run says why.
    return None


def _problem(workdir, wanted):
  """Why a run is left out, or ''."""
  failed = workdir / "failed.txt"
  try:
    if failed.exists() and not finished(workdir):
      return failed.read_text("utf-8", "replace").strip()
    if not (workdir / "config.json").exists():
      return "has not begun"
    theirs = json.loads((workdir / "config.json").read_text("utf-8"))
  except (OSError, ValueError) as e:
    return f"config.json: {e}"
  if not isinstance(theirs, dict):
    return "config.json: is not a JSON object"
  theirs, wanted = config_lib.flatten(theirs), config_lib.flatten(wanted)
  for name in sorted((theirs.keys() | wanted.keys()) - _FREE):
    if theirs.get(name) != wanted.get(name):
      return f"{name} is {theirs.get(name)}; in the sweep {wanted.get(name)}"
  if not finished(workdir):
    return "is not finished, or its files are damaged"
  lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
  records = workdir_lib.read_metrics(workdir)
  if len(records) < len(lines) or not all(map(_is_record, records)):
    return "metrics.jsonl: has a line that is not a valid record"
  return ""


def _is_record(record):
  number = lambda value: isinstance(value, (int, float))
  if record["kind"] == "eval":
    good = number(record.get("top1")) and 0 <= record["top1"] <= 100
  else:  # The first of a run that logs every step has no rate.
    rate = record.get("images_per_second", 0)
    good = number(record.get("loss")) and number(rate)
  return good and isinstance(record["step"], int)


def record(result: Result) -> dict[str, Any]:
  """A cell as numbers; None where there is none.

  top1 is the mean over seeds and std their standard deviation, in percent;
  flops are those of an image's forward pass.
  """
  published = result.cell.published()
  value = published.value if published else None
  rates = [
    record["images_per_second"]
    for records in result.runs.values()
    for record in records
    if "images_per_second" in record
  ]
  parameters, flops = result.costs or (None, None)
  known = result.mean is not None and value is not None
  return {
    "cell": result.cell.name,
    "parameters": parameters,
    "flops": flops,
    "images_per_second": statistics.median(rates) if rates else None,
    "top1": result.mean,
    "std": result.std,
    "n": len(result.runs),
    "seeds": " ".join(map(str, result.runs)),
    "paper": value,
    "difference": result.mean - value if known else None,
  }


def row(result: Result) -> tuple[str, ...]:
  """A cell as values of `COLUMNS`."""
  r = record(result)
  show = lambda value, form: "" if value is None else format(value, form)
  spread = "" if r["std"] is None else f" +- {r['std']:.2f}"
  paper = show(r["paper"], ".2f")
  return (
    r["cell"],
    show(r["parameters"], ","),
    show(r["flops"] and r["flops"] / 1e9, ".3g"),
    show(r["images_per_second"], ".0f"),
    f"{r['top1']:.2f}{spread} ({r['n']})" if r["n"] else "missing",
    paper or ("unknown" if result.cell.published() else ""),
    show(r["difference"], "+.2f"),
  )
