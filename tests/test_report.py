import json
import re
import shutil
import xml.etree.ElementTree

import matplotlib
import pytest
from selenium import webdriver

from experiments import plots
from experiments import report
from experiments import scores
from experiments import sweeps
from tests import common

HOSTILE = "<script>document.title = 'hostile'</script><img src=x>"
LIGHT, DARK = "#ffffff", "#14171a"  # The page's; see report.html.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A sweep with one cell missing, a run damaged, one edited, one hostile."""
  root = tmp_path_factory.mktemp("root")
  folder = root / "patch_kernel"
  sweep = sweeps.get("patch_kernel")
  for i, (cell, seed) in enumerate(sweep.runs()):
    if cell.name != "p8_k9" and seed < 2:
      common.finished_run(folder, cell, seed, 60.0 + i)
  change(folder / "p1_k3" / "seed0" / "config.json", optim=HOSTILE)
  change(folder / "p1_k5" / "seed0" / "run.json", starts=[])
  metrics = folder / "p1_k7" / "seed0" / "metrics.jsonl"
  metrics.write_text("{" + metrics.read_text())
  metrics = folder / "p1_k9" / "seed0" / "metrics.jsonl"
  metrics.write_text(metrics.read_text().replace('"top1": 63.0', '"top1": "x"'))
  metrics = folder / "p2_k3" / "seed0" / "metrics.jsonl"
  metrics.write_text("".join(metrics.read_text().splitlines(True)[:-2]))
  run = folder / "p2_k5" / "seed0" / "run.json"
  start = json.loads(run.read_text())["starts"][0]
  odd = {"device": HOSTILE, "versions": None, "started": 7}
  change(run, starts=["odd", start | odd])
  (folder / "\udc80 <b>").mkdir()
  return root


def change(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def page(root):
  """Written by the command, as a user would."""
  out = root / "page.html"
  args = (f"--root={root}", f"--out={out}", f"--figures={root}/figures")
  code, printed, err = common.call("experiments.report", "patch_kernel", *args)
  assert code == 0, err
  assert printed == f"{out}: 25 of 48 runs of patch_kernel\n"
  folder = root / "patch_kernel"
  left_out = dict(
    line.removeprefix(f"left out: {folder}/").split(": ", 1)
    for line in err.splitlines()
  )
  damaged = "is not finished, or its files are damaged"
  no_record = "metrics.jsonl: has a line that is not a valid record"
  assert left_out == {
    "\udc80 <b>": "not part of this sweep",
    "p1_k3/seed0": f"optim is {HOSTILE}; in the sweep None",
    "p1_k5/seed0": damaged,
    "p1_k7/seed0": no_record,
    "p1_k9/seed0": no_record,
    "p2_k3/seed0": damaged,
  }
  figures = [*(root / "figures").iterdir()]
  assert {path.name for path in figures} >= {"heat_map.svg", "top1.svg"}
  for path in figures:
    assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "currentColor" not in path.read_text()
  return out


def test_the_page_needs_nothing_else_and_trusts_no_file(page):
  text = page.read_text()
  assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script', text)
  assert text.count("&lt;script&gt;") == 2  # In the list and among the runs.
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(set(ids)) == len(ids)
  used = re.findall(r'(?:href="#|url\(#|labelledby=")([^")]*)', text)
  assert set(used) <= set(ids)
  assert plots._INK not in text


def test_the_page_shows_what_is_missing(root, page):
  text = page.read_text()
  (row,) = re.findall(r'<th scope="row">p8_k9</th>.*?</tr>', text, re.S)
  cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
  assert cells[3:] == ["missing", "", "", *3 * ["missing"], "none published"]
  assert len(re.findall(r">missing</text>", text)) == 1  # In the heat map.
  results, _ = scores.collect(sweeps.get("patch_kernel"), root / "patch_kernel")
  for result in results:
    assert result.mean is None or f">{result.mean:.2f}</text>" in text


def test_a_sweep_without_runs_has_a_page(tmp_path):
  sweep = sweeps.get("smoke")
  results, problems = scores.collect(sweep, tmp_path)
  pictures = plots.draw(results)
  text = report.render("smoke", sweep, tmp_path, results, problems, pictures)
  assert "No run is finished." in text
  assert text.count("<figure>") == 1
  assert len(re.findall(r">missing</text>", text)) == 4


def test_curves_are_means_of_common_steps():
  cell = sweeps.get("smoke").cells[0]
  runs = {
    0: [{"kind": "eval", "step": s, "top1": t} for s, t in ((5, 1), (10, 2))],
    1: [{"kind": "eval", "step": s, "top1": t} for s, t in ((7, 5), (10, 6))],
  }
  result = scores.Result(cell, runs)
  steps, values = plots._series(result, "eval", "top1")
  assert (steps, values.tolist()) == ([10], [[2], [6]])
  drawn = plots._curves([result], "eval", "top1", "top-1, %")
  (line,) = drawn.axes[0].lines
  assert line.get_xydata().tolist() == [[4.0, 4.0]]  # The sweep's 4 epochs.
  assert line.get_marker() != "None"  # Also in a grid: one point is no line.
  grid = [scores.Result(cell, runs) for cell in sweeps.get("smoke").cells]
  for ax in plots._curves(grid, "eval", "top1", "top-1, %").axes:
    assert all(line.get_marker() != "None" for line in ax.lines)
  assert "loss" not in [picture.name for picture in plots.draw([result])]


def test_only_a_grid_has_a_heat_map():
  as_results = lambda name: [
    scores.Result(cell, {}) for cell in sweeps.get(name).cells
  ]
  grid = {
    name: plots._grid(as_results(name)) is not None for name in sweeps.SWEEPS
  }
  assert {name for name in grid if grid[name]} == {
    "smoke", "patch_kernel", "patch_kernel_small", "cifar10_script",
    "imagenet_small",
  }  # fmt: skip


def test_colors_are_legible_on_both_pages():
  style = (common.ROOT / "experiments" / "report.html").read_text()
  assert "--paper: #fff;" in style
  assert f"--paper: {DARK};" in style
  contrast = lambda a, b: (max(a, b) + 0.05) / (min(a, b) + 0.05)
  light, dark = plots._luminance(LIGHT), plots._luminance(DARK)
  assert contrast(light, plots._luminance("#000")) == pytest.approx(21)
  for color in plots.COLORS:
    assert contrast(plots._luminance(color), light) >= 3, color
    assert contrast(plots._luminance(color), dark) >= 3, color
  for shade in matplotlib.colormaps["viridis"].colors:
    value = plots._luminance(shade)
    assert contrast(value, 0.0 if value > 0.179 else 1.0) >= 4.5


@pytest.fixture(scope="module")
def browser():
  programs = ("chromium", "google-chrome", "chrome")
  found = [path for name in programs if (path := shutil.which(name))]
  driver = shutil.which("chromedriver")
  if not found or not driver:
    pytest.skip(
      "NOT TESTED in a browser: needs Chromium and its chromedriver"
      " (apt-get install chromium chromium-driver)"
    )
  options = webdriver.ChromeOptions()
  options.binary_location = found[0]
  for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.ChromeService(driver)
  with webdriver.Chrome(options, service) as browser:
    yield browser


# What a figure consists of. Text with a color of its own lies in the heat map.
_FIGURES = """
const page = getComputedStyle(document.body).backgroundColor;
return [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const text = [...svg.querySelectorAll('text')];
  return {
    title: document.getElementById(svg.getAttribute('aria-labelledby'))
      .textContent,
    width: box.width, height: box.height,
    marks: svg.querySelectorAll('path, use').length,
    hidden: text.filter(t => t.getBoundingClientRect().width == 0 ||
      (t.style.fill == 'currentcolor' && getComputedStyle(t).fill == page)
    ).length,
    inked: text.filter(t => t.style.fill == 'currentcolor').length,
    outside: text.filter(t => {
      const b = t.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1;
    }).length,
  };
});
"""
TITLES = [
  "Top-1 by patch and kernel size",
  "Held-out top-1 while training",
  "Loss while training",
  "Top-1 against parameters",
  "Top-1 against compute",
]


def test_in_a_browser(browser, page, tmp_path):
  """Every figure in both schemes, on a desk and a phone; nothing complains."""
  browser.get(page.as_uri())
  assert browser.title == "patch_kernel: results"
  pages = {}
  for scheme, color in (("light", LIGHT), ("dark", DARK)):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd(
      "Emulation.setEmulatedMedia", {"features": [feature]}
    )
    for width in (1280, 360):
      size = {"width": width, "height": 800, "deviceScaleFactor": 1}
      browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", size | {"mobile": width < 400}
      )
      figures = browser.execute_script(_FIGURES)
      assert [figure["title"] for figure in figures] == TITLES
      for figure in figures:
        assert min(figure["width"], figure["height"]) > 100, figure
        assert figure["width"] <= width
        assert min(figure["marks"], figure["inked"]) > 5, figure
        assert figure["hidden"] == figure["outside"] == 0, figure
      widths = "return [document.documentElement.scrollWidth, innerWidth]"
      scroll_width, inner_width = browser.execute_script(widths)
      assert scroll_width <= inner_width == width
      scrolls = (
        "return [...document.querySelectorAll('.scroll')]"
        ".map(box => box.scrollWidth > box.clientWidth)"
      )
      if width == 360:
        assert browser.execute_script(scrolls) == [True, True]
      browser.save_screenshot(tmp_path / "shot.png")
      pages[scheme, width] = matplotlib.image.imread(tmp_path / "shot.png")
      corner = pages[scheme, width][2, 2, :3]
      wanted = matplotlib.colors.to_rgb(color)
      assert corner == pytest.approx(wanted, abs=0.01)
      assert pages[scheme, width][..., :3].std() > 0.02  # Something is on it.
  assert browser.get_log("browser") == []


@pytest.mark.parametrize(
  ("args", "says"),
  [
    ([], "--root: is required"),
    (["smoek", "--root=x", "--out=y"], "nearest is smoke"),
    (["smoke", "--root=x", "--out=y"], "--root=x: has no folder smoke"),
  ],
)
def test_mistakes_get_one_line(args, says):
  code, _, err = common.call("experiments.report", *args)
  assert code == 2
  assert says in err
  assert len(err.splitlines()) == 1
