"""Tables of a sweep's results: ours beside the paper's.

  python -m experiments.tables patch_kernel --root runs
  python -m experiments.tables cifar10_ablation --root runs --format latex

Ours is the top-1 of the last step in percent, mean and standard deviation over
the seeds that are finished, with their number behind. A cell without a finished
run is missing, a published value that is not established is unknown. Runs that
are unfinished, damaged, or of another config than the sweep's are left out and
named on the standard error.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import dataclasses
import io
import json
from pathlib import Path
import statistics
import sys
from typing import Any

from absl import flags

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import run as run_lib
from experiments import sweeps

_FLAGS = flags.FlagValues()
_ROOT = flags.DEFINE_string(
  "root",
  None,
  "Where experiments.run made the sweep's folder: --root runs.",
  flag_values=_FLAGS,
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "markdown",
  ["markdown", "csv", "latex"],
  "What to print: --format csv.",
  flag_values=_FLAGS,
)
COLUMNS = ("cell", "parameters", "GFLOP/image", "img/s", "ours", "paper",
           "difference")  # fmt: skip
# What may differ between a sweep and its runs: where the data are, and pace.
_FREE = {*config_lib.FREE_FIELDS, "data.dir"}


@dataclasses.dataclass(frozen=True)
class Result:
  """A cell and its finished runs: seed -> the records of metrics.jsonl."""

  cell: sweeps.Cell
  runs: Mapping[int, list[dict[str, Any]]]

  @property
  def scores(self) -> dict[int, float]:
    """Seed -> top-1 of the last step, in percent."""
    return {seed: records[-1]["top1"] for seed, records in self.runs.items()}

  @property
  def mean(self) -> float | None:
    """Over seeds; None without any."""
    return statistics.mean(self.scores.values()) if self.runs else None

  @property
  def std(self) -> float | None:
    """Over seeds; None with fewer than two."""
    scores = self.scores.values()
    return statistics.stdev(scores) if len(scores) > 1 else None


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  results, problems = collect(*locate(names, cli.required(_ROOT)))
  print(render([row(r) for r in results], _FORMAT.value), end="")
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)


def locate(names: Sequence[str], root: str) -> tuple[sweeps.Sweep, Path]:
  """The sweep that a command line names, and its folder.

  Raises:
    UserError: it names none, or `root` holds none such.
  """
  sweep, folder = sweeps.get(*names), Path(root).expanduser() / names[0]
  if not folder.is_dir():
    raise UserError(f"--root={root}: holds no {names[0]}")
  return sweep, folder


def collect(
  sweep: sweeps.Sweep, folder: Path
) -> tuple[list[Result], list[str]]:
  """Reads what is there; writes nothing.

  Returns:
    Each cell's result, and what was left out and why.
  """
  results, problems = [], []
  known = {
    folder / cell.name / f"seed{seed}" for cell, seed in sweep.runs()
  } | {folder / cell.name for cell in sweep.cells}
  for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
    if path not in known:
      problems.append(f"{path}: not of this sweep")
  for cell in sweep.cells:
    runs = {}
    for seed in sweep.seeds:
      workdir = folder / cell.name / f"seed{seed}"
      if not workdir.exists():
        continue
      if problem := _problem(cell, seed, workdir):
        problems.append(f"{workdir}: {problem}")
        continue
      runs[seed] = workdir_lib.read_metrics(workdir)
    results.append(Result(cell, runs))
  return results, problems


def _problem(cell, seed, workdir):
  """Why a run does not count, or ''."""
  try:
    theirs = json.loads((workdir / "config.json").read_text())
    wanted = json.loads(cell.resolve(seed).to_json())
  except (OSError, ValueError) as e:
    return f"config.json: {e}"
  if not isinstance(theirs, dict):
    return "config.json: not a JSON object"
  theirs, wanted = config_lib.flatten(theirs), config_lib.flatten(wanted)
  for name in sorted((theirs.keys() | wanted.keys()) - _FREE):
    if theirs.get(name) != wanted.get(name):
      return f"{name} is {theirs.get(name)}; the sweep's is {wanted.get(name)}"
  if not run_lib.finished(workdir):
    return "not finished, or its files are damaged"
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = workdir_lib.read_metrics(workdir)
  if len(records) < len(lines) or not all(map(_is_record, records)):
    return "metrics.jsonl: has a line that is no record of a run"
  return ""


def _is_record(record):
  number = lambda value: isinstance(value, (int, float))
  if record["kind"] == "eval":
    good = number(record.get("top1")) and 0 <= record["top1"] <= 100
  else:  # A run that logs every step has no rate of the first.
    rate = record.get("images_per_second", 0)
    good = number(record.get("loss")) and number(rate)
  return good and isinstance(record["step"], int)


def row(result: Result) -> tuple[str, ...]:
  """One of `COLUMNS`."""
  cell, model = result.cell, result.cell.model()
  size = cell.resolve(0).data.image_size
  published = cell.published()
  rates = [
    record["images_per_second"]
    for records in result.runs.values()
    for record in records
    if "images_per_second" in record
  ]
  paper, difference = "", ""
  if published:
    paper = "unknown"
    if published.value is not None:
      paper = f"{published.value:.2f}"
      if result.mean is not None:
        difference = f"{result.mean - published.value:+.2f}"
  ours = "missing"
  if result.mean is not None:
    spread = "" if result.std is None else f" +- {result.std:.2f}"
    ours = f"{result.mean:.2f}{spread} ({len(result.runs)})"
  return (
    cell.name,
    f"{sweeps.count_parameters(model):,}",
    f"{models.forward_flops(model, size) / 1e9:.3g}",
    f"{statistics.median(rates):.0f}" if rates else "",
    ours,
    paper,
    difference,
  )


def render(rows: list[tuple[str, ...]], kind: str) -> str:
  """Rows of `COLUMNS` as markdown, csv or latex."""
  if kind == "csv":
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()
  if kind == "markdown":
    line = lambda row: f"| {' | '.join(row)} |\n"
    rule = f"|---|{'---:|' * (len(COLUMNS) - 1)}\n"
    return line(COLUMNS) + rule + "".join(map(line, rows))
  escape = lambda cell: (
    cell.replace("_", r"\_").replace("+-", r"$\pm$").replace(",", r"{,}")
  )
  line = lambda row: "  " + " & ".join(map(escape, row)) + r" \\" + "\n"
  return (
    rf"\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}"
    + "\n  \\toprule\n"
    + line(COLUMNS)
    + "  \\midrule\n"
    + "".join(map(line, rows))
    + "  \\bottomrule\n\\end{tabular}\n"
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
