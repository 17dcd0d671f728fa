"""Tables of a sweep's results, ours beside the paper's.

  python -m experiments.tables patch_kernel --root runs
  python -m experiments.tables cifar10_ablation --root runs --format latex

Ours is the top-1 accuracy after the last step in percent: mean and standard
deviation over the finished seeds, and their number in parentheses. A cell
without a finished run is "missing". A published value that is not established
is "unknown". Runs that are unfinished, damaged, or of a config other than the
sweep's are left out and listed on standard error. csv has a column for each
number instead, and for the seeds.
"""

from collections.abc import Sequence
import csv
import io
import sys

from convmixer_jax import cli
from experiments import scores

_FLAGS = cli.Flags()
_ROOT = _FLAGS.string(
  "root", "The folder that was given to experiments.run: --root runs."
)
_FORMAT = _FLAGS.enum(
  "format",
  "Format of the table: --format csv.",
  "markdown",
  enum_values=["markdown", "csv", "latex"],
)


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  results, problems = scores.collect(*scores.locate(names, cli.required(_ROOT)))
  print(render(results, _FORMAT.value), end="")
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)


def render(results: Sequence[scores.Result], kind: str) -> str:
  """A table as markdown or latex, or numbers as csv; see `scores.record`."""
  if kind == "csv":
    text, records = io.StringIO(), [scores.record(r) for r in results]
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
  rows = [scores.row(r) for r in results]
  if kind == "markdown":
    line = lambda row: f"| {' | '.join(row)} |\n"
    rule = f"|---|{'---:|' * (len(scores.COLUMNS) - 1)}\n"
    return line(scores.COLUMNS) + rule + "".join(map(line, rows))
  escape = lambda cell: (
    cell.replace("_", r"\_").replace("+-", r"$\pm$").replace(",", r"{,}")
  )
  line = lambda row: "  " + " & ".join(map(escape, row)) + r" \\" + "\n"
  return (
    rf"\begin{{tabular}}{{l{'r' * (len(scores.COLUMNS) - 1)}}}"
    + "\n  \\toprule\n"
    + line(scores.COLUMNS)
    + "  \\midrule\n"
    + "".join(map(line, rows))
    + "  \\bottomrule\n\\end{tabular}\n"
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
