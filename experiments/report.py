"""One page of a sweep's results, a self-contained HTML file.

  python -m experiments.report patch_kernel --root runs --out patch_kernel.html

The page has the table of `experiments.tables` with the score of every seed, a
heat map of patch and kernel size if the sweep varies both, learning curves,
accuracy against parameters and against FLOPs, and the origin of each run. Runs
that are unfinished, damaged, or of a config other than the sweep's are left out
and listed, on the page and on standard error.
"""

from collections.abc import Sequence
import datetime
import json
from pathlib import Path
import re
import sys

import jinja2

from convmixer_jax import cli
from convmixer_jax import files
from convmixer_jax.errors import UserError
from experiments import plots
from experiments import scores
from experiments import sweeps

_FLAGS = cli.Flags()
_ROOT = _FLAGS.string(
  "root", "The folder that was given to experiments.run: --root runs."
)
_OUT = _FLAGS.string("out", "HTML file to write: --out patch_kernel.html.")

_FIGURES = _FLAGS.string(
  "figures",
  "Folder to write each figure to as well, as SVG for any background:"
  " --figures docs/patch_kernel.",
)


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  root, out = cli.required(_ROOT), cli.required(_OUT)
  sweep, folder = scores.locate(names, root)
  results, problems = scores.collect(sweep, folder)
  pictures = plots.draw(results)
  page = render(sweep.name, sweep, folder, results, problems, pictures)
  try:
    # File names may not be valid Unicode.
    files.path(out).write_text(page, "utf-8", "backslashreplace")
    if _FIGURES.value:
      with files.output(files.path(_FIGURES.value)) as figures:
        for picture in pictures:
          svg = picture.svg.replace("currentColor", plots.GRAY)
          (figures / f"{picture.name}.svg").write_text(svg, "utf-8")
  except OSError as e:
    raise UserError(f"{e.filename}: {e.strerror}") from e
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)
  done = sum(len(result.runs) for result in results)
  print(f"{out}: {done} of {len(sweep.runs())} runs of {sweep.name}")


def render(
  name: str,
  sweep: sweeps.Sweep,
  folder: files.AnyPath,
  results: Sequence[scores.Result],
  problems: Sequence[str],
  pictures: Sequence[plots.Picture],
) -> str:
  """Renders the page as HTML.

  Args:
    name: name of the sweep.
    sweep: the sweep.
    folder: where its runs are.
    results: from `scores.collect`.
    problems: from `scores.collect`.
    pictures: from `plots.draw`.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # Names and values come from files that can be edited.
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("report.html").render(
    name=name,
    sweep=sweep,
    results=results,
    problems=problems,
    columns=scores.COLUMNS,
    row=scores.row,
    pictures=pictures,
    runs=[
      _metadata(folder, result.cell.name, seed)
      for result in results
      for seed in result.runs
    ],
  )


def _metadata(folder, cell, seed):
  """Origin of a run; '?' for what its run.json does not contain."""
  workdir = folder / cell / f"seed{seed}"
  starts = json.loads((workdir / "run.json").read_text("utf-8"))["starts"]
  starts = [start for start in starts if isinstance(start, dict)]
  last = starts[-1]
  versions = last.get("versions")
  try:
    time = datetime.datetime.fromisoformat
    spans = [time(s["ended"]) - time(s["started"]) for s in starts]
    minutes = f"{sum(span.total_seconds() for span in spans) / 60:.1f}"
  except (KeyError, TypeError, ValueError):  # It may have been killed.
    minutes = "?"
  tell = lambda name: last.get(name) or "?"
  return {
    "run": f"{cell}/seed{seed}",
    "device": f"{tell('num_devices')} x {tell('device')}",
    "CPUs": tell("cpu_count"),
    "commit": re.sub(
      r"^([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", str(tell("commit"))
    ),
    "started": starts[0].get("started", "?"),
    "ended": tell("ended"),
    "minutes": minutes,
    "starts": len(starts),
    "Python": tell("python"),
    "versions": ", ".join(f"{k} {v}" for k, v in versions.items())
    if isinstance(versions, dict)
    else "?",
  }


if __name__ == "__main__":
  cli.run(main, _FLAGS)
