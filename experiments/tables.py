"""Tables of a sweep's results: ours beside the paper's.

  python -m experiments.tables patch_kernel --root runs
  python -m experiments.tables cifar10_ablation --root runs --format latex

Ours is the top-1 of the last step in percent, mean and standard deviation over
the seeds that are finished, with their number behind. A cell without a finished
run is missing, a published value that is not established is unknown. Runs that
are unfinished, damaged, or of another config than the sweep's are left out and
named on the standard error.
"""

import csv
import io
import json
from pathlib import Path
import statistics
import sys

from absl import flags

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import logger
from convmixer_jax import UserError
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


def main(argv: list[str]) -> None:
  """Runs what the flags say; see --help."""
  if len(argv) != 2:
    raise UserError(f"SWEEP: give one of {', '.join(sweeps.SWEEPS)}")
  folder = Path(cli.given(_ROOT)).expanduser() / argv[1]
  sweep = sweeps.get(argv[1])
  if not folder.is_dir():
    raise UserError(f"--root={_ROOT.value}: holds no {argv[1]}")
  rows, problems = collect(sweep, folder)
  print(render(rows, _FORMAT.value), end="")
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)


def collect(
  sweep: sweeps.Sweep, folder: Path
) -> tuple[list[tuple[str, ...]], list[str]]:
  """Reads what is there; writes nothing.

  Returns:
    A row of `COLUMNS` for each cell, and what was left out and why.
  """
  rows, problems = [], []
  known = {
    folder / cell.name / f"seed{seed}" for cell, seed in sweep.runs()
  } | {folder / cell.name for cell in sweep.cells}
  for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
    if path not in known:
      problems.append(f"{path}: not of this sweep")
  for cell in sweep.cells:
    scores, rates = [], []
    for seed in sweep.seeds:
      workdir = folder / cell.name / f"seed{seed}"
      if not workdir.exists():
        continue
      if problem := _problem(cell, seed, workdir):
        problems.append(f"{workdir}: {problem}")
        continue
      records = logger.read_metrics(workdir)
      scores.append(records[-1]["top1"])
      rates += [r["images_per_second"] for r in records if r["kind"] == "train"]
    rows.append(_row(cell, scores, rates))
  return rows, problems


def _problem(cell, seed, workdir):
  """Why a run does not count, or ''."""
  try:
    theirs = json.loads((workdir / "config.json").read_text())
    wanted = json.loads(cell.resolve(seed).to_json())
  except (OSError, ValueError) as e:
    return f"config.json: {e}"
  theirs, wanted = config_lib.flatten(theirs), config_lib.flatten(wanted)
  for name in sorted((theirs.keys() | wanted.keys()) - _FREE):
    if theirs.get(name) != wanted.get(name):
      return f"{name} is {theirs.get(name)}; the sweep's is {wanted.get(name)}"
  if not run_lib.finished(workdir):
    return "not finished, or its files are damaged"
  return ""


def _row(cell, scores, rates):
  model = cell.model()
  size = cell.resolve(0).data.image_size
  published = cell.published()
  paper, difference = "", ""
  if published:
    paper = "unknown"
    if published.value is not None:
      paper = f"{published.value:.2f}"
      if scores:
        difference = f"{statistics.mean(scores) - published.value:+.2f}"
  ours = "missing"
  if scores:
    ours = f"{statistics.mean(scores):.2f}"
    if len(scores) > 1:
      ours += f" +- {statistics.stdev(scores):.2f}"
    ours += f" ({len(scores)})"
  return (
    cell.name,
    f"{sweeps.count_parameters(model):,}",
    f"{sweeps.forward_flops(model, size) / 1e9:.3g}",
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
