"""One page of a sweep's results: a file of HTML that needs nothing else.

  python -m experiments.report patch_kernel --root runs --out patch_kernel.html

It holds the table of `experiments.tables` with the score of every seed, a heat
map of patch by kernel size where the sweep has both, learning curves, accuracy
against parameters and against FLOPs, and where and when each run was made. Runs
that are unfinished, damaged, or of another config than the sweep's are left out
and named, on the page and on the standard error.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import datetime
import io
import itertools
import json
from pathlib import Path
import re
import sys

from absl import flags
import jinja2
import markupsafe
import matplotlib
from matplotlib import figure
from matplotlib import lines
from matplotlib import patches
from matplotlib import ticker
import numpy as np

from convmixer_jax import cli
from convmixer_jax import models
from convmixer_jax.errors import UserError
from experiments import sweeps
from experiments import tables

_FLAGS = flags.FlagValues()
_ROOT = flags.DEFINE_string(
  "root",
  None,
  "Where experiments.run made the sweep's folder: --root runs.",
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "The page to write: --out patch_kernel.html.",
  flag_values=_FLAGS,
)

_FIGURES = flags.DEFINE_string(
  "figures",
  None,
  "A folder to write each figure into too, as SVG for any background:"
  " --figures docs/patch_kernel.",
  flag_values=_FLAGS,
)

# Figures have the width of a phone, in inches of 72 pixels.
WIDTH = 4.3
# Each has a contrast of 3 or more both to the light and to the dark page.
COLORS = ("#3b82d6", "#d0650a", "#2a9455", "#e0484d", "#9a63d8", "#15929c",
          "#d6569e", "#a5793f", "#7f868e", "#868a1a")  # fmt: skip
MARKERS = "os^DvP*X"
# Stands for the color of the page's text, which the browser fills in.
_INK = "#010203"
_GRAY = "#7f868e"  # Legible on white and on black.
_INKED = (
  "text.color",
  "axes.edgecolor",
  "axes.labelcolor",
  "xtick.color",
  "ytick.color",
  "grid.color",
)
_STYLE = dict.fromkeys(_INKED, _INK) | {
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlesize": "medium",
  "figure.constrained_layout.use": True,
  "font.size": 10,
  "grid.alpha": 0.15,
  "legend.frameon": False,
  "lines.linewidth": 1.5,
  "lines.markersize": 5.5,
  "savefig.transparent": True,
  "svg.fonttype": "none",  # Text that can be selected and read out.
  "svg.hashsalt": "convmixer",
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure of the page.

  Attributes:
    name: unique on the page.
    title: what it shows.
    caption: how it is to be read.
    svg: markup.
  """

  name: str
  title: str
  caption: str
  svg: markupsafe.Markup


def main(*names: str) -> None:
  """Runs what the flags say; see --help."""
  root, out = cli.required(_ROOT), cli.required(_OUT)
  sweep, folder = tables.locate(names, root)
  results, problems = tables.collect(sweep, folder)
  pictures = draw(results)
  page = render(names[0], sweep, folder, results, problems, pictures)
  try:
    # A file's name may be no text.
    Path(out).expanduser().write_text(page, "utf-8", "backslashreplace")
    if _FIGURES.value:
      figures = Path(_FIGURES.value).expanduser()
      figures.mkdir(parents=True, exist_ok=True)
      for picture in pictures:
        svg = picture.svg.replace("currentColor", _GRAY)
        (figures / f"{picture.name}.svg").write_text(svg, "utf-8")
  except OSError as e:
    raise UserError(f"{e.filename}: {e.strerror}") from e
  for problem in problems:
    print(f"left out: {problem}", file=sys.stderr)
  done = sum(len(result.runs) for result in results)
  print(f"{out}: {done} of {len(sweep.runs())} runs of {names[0]}")


def render(
  name: str,
  sweep: sweeps.Sweep,
  folder: Path,
  results: Sequence[tables.Result],
  problems: Sequence[str],
  pictures: Sequence[Picture],
) -> str:
  """The page.

  Args:
    name: of the sweep.
    sweep: whose it is.
    folder: of its runs.
    results: from `tables.collect`.
    problems: likewise.
    pictures: from `draw`.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # Names and values come from files that anyone may edit.
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("report.html").render(
    name=name,
    sweep=sweep,
    results=results,
    problems=problems,
    columns=tables.COLUMNS,
    row=tables.row,
    pictures=pictures,
    runs=[
      _metadata(folder, result.cell.name, seed)
      for result in results
      for seed in result.runs
    ],
  )


def _metadata(folder, cell, seed):
  """Where and when a run was made; '?' for what its run.json does not tell."""
  workdir = folder / cell / f"seed{seed}"
  starts = json.loads((workdir / "run.json").read_text())["starts"]
  starts = [start for start in starts if isinstance(start, dict)]
  last = starts[-1]
  versions = last.get("versions")
  try:
    time = datetime.datetime.fromisoformat
    spans = [time(s["ended"]) - time(s["started"]) for s in starts]
    minutes = f"{sum(span.total_seconds() for span in spans) / 60:.1f}"
  except (KeyError, TypeError, ValueError):  # It was killed, say.
    minutes = "?"
  tell = lambda name: last.get(name) or "?"
  return {
    "run": f"{cell}/seed{seed}",
    "device": f"{tell('num_devices')} x {tell('device')}",
    "CPUs": tell("cpu_count"),
    "commit": tell("commit"),
    "started": starts[0].get("started", "?"),
    "ended": tell("ended"),
    "minutes": minutes,
    "starts": len(starts),
    "Python": tell("python"),
    "versions": ", ".join(f"{k} {v}" for k, v in versions.items())
    if isinstance(versions, dict)
    else "?",
  }


# --- Figures.


@matplotlib.rc_context(_STYLE)
def draw(results: Sequence[tables.Result]) -> list[Picture]:
  """The figures that such results can have."""
  return list(_pictures(results))


def _pictures(results) -> Iterator[Picture]:
  done = [result for result in results if result.runs]
  grid = _grid(results)
  if grid:
    yield _picture(
      "heat_map",
      "Top-1 by patch and kernel size",
      "Percent, mean and standard deviation over seeds.",
      _heat_map(grid),
    )
  if not done:
    return
  band = "Mean over seeds; the band is from the least to the greatest."
  yield _picture(
    "top1",
    "Held-out top-1 while training",
    band,
    _curves(results, "eval", "top1", "top-1, %"),
  )
  yield _picture(
    "loss",
    "Loss while training",
    f"On augmented images, before weight decay. {band}",
    _curves(results, "train", "loss", "loss, nats"),
  )
  bars = "Mean and standard deviation over seeds; hollow: published."
  size = lambda cell: cell.resolve(0).data.image_size
  yield _picture(
    "parameters",
    "Top-1 against parameters",
    bars,
    _scatter(
      results,
      "parameters",
      lambda cell: sweeps.count_parameters(cell.model()),
    ),
  )
  yield _picture(
    "flops",
    "Top-1 against compute",
    f"FLOP of one image's forward pass; a multiply-add is two. {bars}",
    _scatter(
      results,
      "FLOP an image",
      lambda cell: models.forward_flops(cell.model(), size(cell)),
    ),
  )


def _picture(name, title, caption, drawn):
  """Inlines a figure: ids of its own, and the page's color for text."""
  buffer = io.StringIO()
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  drawn.savefig(buffer, format="svg", metadata=nothing)
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
  svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}"', 1)
  return Picture(name, title, caption, markupsafe.Markup(svg))


def _grid(results) -> dict[tuple[int, int], tables.Result] | None:
  """(patch, kernel) -> its result, where a sweep varies just these, both."""
  models = [result.cell.model() for result in results]
  keys = [(model.patch_size, model.kernel_size) for model in models]
  rest = {model.clone(patch_size=1, kernel_size=1) for model in models}
  both = all(len(set(axis)) > 1 for axis in zip(*keys))
  if not both or len(rest) > 1 or len(set(keys)) < len(keys):
    return None
  return dict(zip(keys, results))


def _heat_map(grid):
  patch_sizes, kernel_sizes = (sorted(set(axis)) for axis in zip(*grid))
  means = [r.mean for r in grid.values() if r.mean is not None]
  scale = matplotlib.colors.Normalize(min(means, default=0), max(means or [1]))
  height = 0.6 + 0.55 * len(patch_sizes)
  drawn = figure.Figure((WIDTH, height))
  ax = drawn.add_subplot()
  ax.grid(False)
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0)
  ax.set_xticks(range(len(kernel_sizes)), kernel_sizes)
  ax.set_yticks(range(len(patch_sizes)), patch_sizes)
  ax.set(xlabel="kernel size", ylabel="patch size")
  ax.set_xlim(-0.5, len(kernel_sizes) - 0.5)
  ax.set_ylim(len(patch_sizes) - 0.5, -0.5)
  for (patch, kernel), result in grid.items():
    x, y = kernel_sizes.index(kernel), patch_sizes.index(patch)
    box = {"xy": (x - 0.47, y - 0.46), "width": 0.94, "height": 0.92}
    text = {"ha": "center", "va": "center", "fontsize": "small"}
    if result.mean is None:
      frame = {"fill": False, "edgecolor": _INK, "alpha": 0.4, "ls": "--"}
      ax.add_patch(patches.Rectangle(**box, **frame))
      ax.text(x, y, "missing", **text)
      continue
    color = matplotlib.colormaps["viridis"](scale(result.mean))
    ax.add_patch(patches.Rectangle(**box, color=color))
    spread = "" if result.std is None else f"\n± {result.std:.2f}"
    # Dark on viridis's brighter half: of contrast 4.5 or more on every shade.
    ink = "#000" if _luminance(color) > 0.179 else "#fff"
    ax.text(x, y, f"{result.mean:.2f}{spread}", color=ink, **text)
  return drawn


def _luminance(color) -> float:
  """WCAG's relative luminance."""
  rgb = np.array(matplotlib.colors.to_rgb(color))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return float(linear @ (0.2126, 0.7152, 0.0722))


def _looks(results):
  """Color and marker of each cell, and what the legend says of them.

  In a grid, colors are kernel sizes and markers patch sizes.
  """
  key = lambda label, **look: lines.Line2D([], [], label=label, **look)
  grid = _grid(results)
  if grid is None:
    cycle = zip(itertools.cycle(COLORS), itertools.cycle(MARKERS))
    looks = list(itertools.islice(cycle, len(results)))
    return looks, [
      key(result.cell.name, color=color, marker=marker, ls="")
      for result, (color, marker) in zip(results, looks)
    ]
  patch_sizes, kernel_sizes = (sorted(set(axis)) for axis in zip(*grid))
  color = dict(zip(kernel_sizes, COLORS))
  marker = dict(zip(patch_sizes, MARKERS))
  return [(color[kernel], marker[patch]) for patch, kernel in grid], [
    *(key(f"kernel {k}", color=color[k], lw=3) for k in kernel_sizes),
    *(key(f"patch {p}", color=_INK, marker=marker[p], ls="")
      for p in patch_sizes),
  ]  # fmt: skip


def _figure(panels, legend):
  """Panels one above the other, and a legend below them in columns."""
  longest = max(len(entry.get_label()) for entry in legend)
  columns = max(1, min(4, 50 // (longest + 4)))
  rows = -(-len(legend) // columns)
  drawn = figure.Figure((WIDTH, 2.1 * panels + 0.3 + 0.19 * rows))
  axes = drawn.subplots(panels, sharex=True, sharey=True, squeeze=False)[:, 0]
  drawn.legend(
    handles=[key for i in range(columns) for key in legend[i::columns]],
    loc="outside lower center",
    ncols=columns,
    fontsize="small",
    handlelength=1,
  )
  return drawn, axes


def _curves(results, kind, field, label):
  """Against epochs; in a grid a panel for each patch size."""
  looks, legend = _looks(results)
  grid = _grid(results) or {}
  panels = [patch for patch, _ in grid] or [None] * len(results)
  rows = sorted(set(panels)) if grid else [None]
  if grid:  # The panels tell the patch sizes.
    legend = legend[: -len(rows)]
  drawn, axes = _figure(len(rows), legend)
  for patch, result, (color, marker) in zip(panels, results, looks):
    ax = axes[rows.index(patch)]
    steps, values = _series(result, kind, field)
    if not len(steps):
      continue
    last = max(records[-1]["step"] for records in result.runs.values())
    epochs = np.array(steps) / last * result.cell.resolve(0).epochs
    style = {} if grid else {"marker": marker, "markevery": 0.2}
    ax.plot(epochs, values.mean(0), color=color, **style)
    ax.fill_between(
      epochs, values.min(0), values.max(0), color=color, alpha=0.25, lw=0
    )
  for patch, ax in zip(rows, axes):
    ax.set(ylabel=label, title=f"patch {patch}" if grid else "")
  axes[-1].set_xlabel("epoch")
  return drawn


def _series(result, kind, field):
  """Steps of which every seed has a record, and values [seeds, steps]."""
  seeds = [
    {r["step"]: r[field] for r in records if r["kind"] == kind}
    for records in result.runs.values()
  ]
  steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
  return steps, np.array([[seed[i] for i in steps] for seed in seeds])


def _scatter(results, label, cost):
  looks, legend = _looks(results)
  drawn, (ax,) = _figure(1, legend)
  costs = [cost(result.cell) for result in results]
  for x, result, (color, marker) in zip(costs, results, looks):
    if result.mean is not None:
      ax.errorbar(
        x, result.mean, result.std, color=color, marker=marker, capsize=2
      )
    published = result.cell.published()
    if published and published.value is not None:
      ax.plot(x, published.value, color=color, marker=marker, mfc="none")
  if max(costs) > 4 * min(costs):
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  ax.set(xlabel=label, ylabel="top-1, %")
  return drawn


if __name__ == "__main__":
  cli.run(main, _FLAGS)
