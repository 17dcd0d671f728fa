"""Plots of a sweep's results, as SVG for a light and for a dark page."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import io
import itertools
import re

import markupsafe
import matplotlib
from matplotlib import figure
from matplotlib import lines
from matplotlib import patches
from matplotlib import ticker
import numpy as np

from experiments import scores

# The width of a phone, in inches of 72 pixels.
WIDTH = 4.3
# Each has a contrast of at least 3 on the light and on the dark page.
COLORS = ("#3b82d6", "#d0650a", "#2a9455", "#e0484d", "#9a63d8", "#15929c",
          "#d6569e", "#a5793f", "#7f868e", "#868a1a")  # fmt: skip
MARKERS = "os^DvP*X"
# A placeholder for the page's text color, which the browser fills in.
_INK = "#010203"
GRAY = "#7f868e"  # Legible on white and on black.
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
  """A plot.

  Attributes:
    name: unique, an identifier on the page.
    title: what it shows.
    caption: how to read it.
    svg: the markup.
  """

  name: str
  title: str
  caption: str
  svg: markupsafe.Markup


@matplotlib.rc_context(_STYLE)
def draw(results: Sequence[scores.Result]) -> list[Picture]:
  """All plots that make sense for these results."""
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
  band = "Mean over seeds; the band is the range from minimum to maximum."
  yield _picture(
    "top1",
    "Held-out top-1 while training",
    band,
    _curves(results, "eval", "top1", "top-1, %"),
  )
  if any(
    r["kind"] == "train" for d in done for v in d.runs.values() for r in v
  ):
    yield _picture(
      "loss",
      "Loss while training",
      f"On augmented images, without weight decay. {band}",
      _curves(results, "train", "loss", "loss, nats"),
    )
  if any(result.costs is None for result in results):
    return
  bars = "Mean and standard deviation over seeds; hollow markers: published."
  yield _picture(
    "parameters",
    "Top-1 against parameters",
    bars,
    _scatter(results, "parameters", [r.costs[0] for r in results]),
  )
  yield _picture(
    "flops",
    "Top-1 against compute",
    f"FLOPs of a forward pass per image, 2 per multiply-add. {bars}",
    _scatter(results, "FLOP an image", [r.costs[1] for r in results]),
  )


def _picture(name, title, caption, drawn):
  """Makes SVG to inline: with unique ids, and the page's text color."""
  buffer = io.StringIO()
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  drawn.savefig(buffer, format="svg", metadata=nothing)
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
  svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
  svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}"', 1)
  return Picture(name, title, caption, markupsafe.Markup(svg))


def _grid(results) -> dict[tuple[int, int], scores.Result] | None:
  """(patch, kernel) -> result, if a sweep varies both of them and no more."""
  models = [result.cell.model() for result in results]
  sizes = ("patch_size", "kernel_size")
  if not all(hasattr(model, name) for model in models for name in sizes):
    return None
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
    # Dark text on the brighter half: a contrast of at least 4.5 on every shade.
    ink = "#000" if _luminance(color) > 0.179 else "#fff"
    ax.text(x, y, f"{result.mean:.2f}{spread}", color=ink, **text)
  return drawn


def _luminance(color) -> float:
  """WCAG's relative luminance."""
  rgb = np.array(matplotlib.colors.to_rgb(color))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return float(linear @ (0.2126, 0.7152, 0.0722))


def _looks(results):
  """Color and marker of each cell, and the entries of the legend.

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
  """Panels above each other, and a legend in columns below them."""
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
  """Learning curves over epochs; for a grid, a panel for each patch size."""
  looks, legend = _looks(results)
  grid = _grid(results) or {}
  panels = [patch for patch, _ in grid] or [None] * len(results)
  rows = sorted(set(panels)) if grid else [None]
  if grid:  # The titles of the panels name the patch sizes.
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
    if len(steps) == 1:  # A line would be invisible.
      style = {"marker": marker}
    ax.plot(epochs, values.mean(0), color=color, **style)
    ax.fill_between(
      epochs, values.min(0), values.max(0), color=color, alpha=0.25, lw=0
    )
  for patch, ax in zip(rows, axes):
    ax.set(ylabel=label, title=f"patch {patch}" if grid else "")
  axes[-1].set_xlabel("epoch")
  return drawn


def _series(result, kind, field):
  """Steps that every seed has a record of, and values [seeds, steps]."""
  seeds = [
    {r["step"]: r[field] for r in records if r["kind"] == kind}
    for records in result.runs.values()
  ]
  steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
  return steps, np.array([[seed[i] for i in steps] for seed in seeds])


def _scatter(results, label, costs):
  looks, legend = _looks(results)
  drawn, (ax,) = _figure(1, legend)
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
