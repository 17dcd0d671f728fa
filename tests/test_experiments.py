import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError
from experiments import cells as cells_lib
from experiments import estimate as estimate_lib
from experiments import paper
from experiments import plots
from experiments import run as run_lib
from experiments import runs as runs_lib
from experiments import scores
from experiments import sweeps
from experiments import tables
from tests import common


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_every_run_of_every_sweep_may_train(name):
  sweep = sweeps.get(name)
  names = [cell.name for cell in sweep.cells]
  assert len(set(names)) == len(names)
  configs = [cell.resolve(seed).to_json() for cell, seed in sweep.runs()]
  assert len(set(configs)) == len(configs) == len(names) * len(sweep.seeds)
  seeds = [seed for _, seed in sweep.runs()]
  assert seeds == sorted(seeds)  # All cells with the first one, and so on.
  for cell, seed in sweep.runs():
    command = cell.command(seed, common.ROOT)
    assert f"--config.seed={seed}" in command
    assert {f"--config.{k}={v}" for k, v in cell.overrides.items()} < {*command}


def test_cells_are_those_of_the_paper():
  """Each published model is a cell, with the published parameter count."""
  with (common.ROOT / "experiments" / "paper.csv").open() as file:
    counts = {
      (r["table"], r["model"], r["patch_size"], r["kernel_size"]): r["params"]
      for r in csv.DictReader(file)
    }
  found = set()
  count = functools.cache(cells_lib.count_parameters)
  for sweep in sweeps.SWEEPS.values():
    for cell in sweep.cells:
      row = cell.published()
      if row is None:
        continue
      sizes = (row.patch_size, row.kernel_size)
      key = (row.table, row.model, *(str(size or "") for size in sizes))
      found.add(key)
      # The table counts LayerNorm's parameters as BatchNorm's: equal.
      # Few blocks are traced sooner; whole models are test_models'.
      model = cell.model(1000 if "imagenet" in row.table else 10)
      size = cell.resolve(0).data.image_size
      if hasattr(model, "depth"):
        one, two = (count(model.clone(depth=depth), size) for depth in (1, 2))
        params = one + (model.depth - 1) * (two - one)
      else:
        params = count(model, size)
      assert params == int(counts[key]), key
  tables_here = {key[0] for key in found}
  missing = {
    key
    for key in counts
    if key[0] in tables_here
    and (key[1] in models.VARIANTS or key[0] == "cifar10_ablation")
  } - found
  assert missing == set()
  assert len(found) > 35


def test_the_page_has_the_published_values():
  page = (common.ROOT / "docs" / "experiments.md").read_text()
  lines = [line.split(" | ") for line in page.splitlines()]
  shown = {(x[0][3:-1], x[-2], x[-1][:-2]) for x in lines if len(x) == 7}
  for row in paper.read():
    if row.table.startswith("imagenet") and row.value is not None:
      assert (row.model, f"{row.value:.2f}", row.source) in shown


def test_an_ablation_changes_its_switch_alone():
  cells = {cell.row: cell for cell in sweeps.get("cifar10_ablation").cells}
  base = config_lib.flatten(cells.pop("baseline").resolve(0))
  assert len(cells) == 9
  for label, cell in cells.items():
    changed = config_lib.flatten(cell.resolve(0)).items() - base.items()
    assert changed == {*cell.overrides.items()}, label
    assert len(changed) == (2 if label == "no mixup and cutmix" else 1), label


def test_flops():
  model = models.create_model("convmixer_1536_20")
  assert models.flops(model, 224) / 1e9 == pytest.approx(102, abs=0.5)


def test_what_is_not_established_is_unknown():
  row = paper.find("cifar10_ablation", "relu for gelu", 1, 9)
  assert row is not None
  assert row.value is None
  assert paper.find("cifar10_ablation", "relu for gelu", 1, 7) is None


def test_an_unknown_sweep_lists_the_known():
  with pytest.raises(UserError, match=r"nearest is cifar10_size.*patch_kernel"):
    sweeps.get("cifar10_sizes")


UNFINISHED = "is not finished, or its files are damaged"
NO_RECORD = "metrics.jsonl: has a line that is not a valid record"
# Row, file, pattern, its replacement, and why the run is then left out.
EDITS = (
  ("no randaugment", "config.json", '"epochs": 200', '"epochs": 300',
   "epochs is 300; in the sweep 200"),
  ("no random scaling", "metrics.jsonl", r".{9}\Z", "", UNFINISHED),
  ("no random erasing", "run.json", "{", "", UNFINISHED),
  ("no gradient clipping", "run.json", "finished", "failed", UNFINISHED),
  ("no mixup and cutmix", "metrics.jsonl", r"\Z",
   '{"step": 31, "kind": "train", "loss": 1}', UNFINISHED),
  ("no depthwise residual", "metrics.jsonl", '"top1": 93.0', '"top1": 100.1',
   NO_RECORD),
  ("layernorm for batchnorm", "metrics.jsonl", "kind", "kin", NO_RECORD),
)  # fmt: skip


def test_tables(tmp_path, monkeypatch):
  """Means by hand; what is missing, unknown, edited or foreign is said so."""
  sweep = sweeps.get("cifar10_ablation")
  cells = {cell.row: cell for cell in sweep.cells}
  folder = tmp_path / "cifar10_ablation"

  def run(row, top1, seed=0, name="config.json", pattern="$", new=""):
    workdir = common.finished_run(folder, cells[row], seed, top1)
    path = workdir / name
    text = re.sub(pattern, new, path.read_text(), count=1, flags=re.S)
    path.write_text(text)
    return workdir

  run("baseline", 95.0)
  run("baseline", 96.0, 1, "config.json", '"dir": null', '"dir": "/there"')
  three = run("relu for gelu", 94.0)
  (three / "classes.txt").write_text("a\nb\nc\n")
  wanted = [f"{run(row, 93.0, 0, *edit)}: {why}" for row, *edit, why in EDITS]
  (folder / "notes").mkdir()
  wanted.append(f"{folder / 'notes'}: not part of this sweep")

  results, problems = scores.collect(sweep, folder)
  assert sorted(problems) == sorted(wanted)
  rows = [scores.row(result) for result in results]
  by_name = {row[0]: dict(zip(scores.COLUMNS, row)) for row in rows}
  columns = ("parameters", "img/s", "ours", "paper", "difference")
  found = [by_name["baseline"][column] for column in columns]
  assert found == ["706,570", "100", "95.50 +- 0.71 (2)", "95.88", "-0.38"]
  found = [by_name["relu_for_gelu"][column] for column in columns]
  # 7 x 257 parameters fewer.
  assert found == ["704,771", "100", "94.00 (1)", "unknown", ""]
  for row, *_ in EDITS:
    assert by_name[cells[row].name]["ours"] == "missing"

  read = {
    record["cell"]: record
    for record in csv.DictReader(io.StringIO(tables.render(results, "csv")))
  }
  assert len(read) == len(rows)
  baseline = read["baseline"]
  assert float(baseline.pop("std")) == pytest.approx(2**-0.5)
  assert float(baseline.pop("difference")) == pytest.approx(-0.38)
  assert float(baseline.pop("flops")) == results[0].costs[1]
  assert baseline == {
    "cell": "baseline", "parameters": "706570", "images_per_second": "100.0",
    "top1": "95.5", "n": "2", "seeds": "0 1", "paper": "95.88",
  }  # fmt: skip
  assert read["no_randaugment"] | {"parameters": "", "flops": ""} == {
    **dict.fromkeys(read["no_randaugment"], ""),
    "cell": "no_randaugment",
    "n": "0",
    "paper": read["no_randaugment"]["paper"],
  }
  markdown = tables.render(results, "markdown").splitlines()
  assert len(markdown) == 2 + len(rows)
  assert {line.count("|") for line in markdown} == {len(scores.COLUMNS) + 1}
  collected = {(sweep.name, folder): (results, problems)}  # Once.
  collect = lambda sweep, folder: collected[sweep.name, folder]
  monkeypatch.setattr(scores, "collect", collect)
  args = ("cifar10_ablation", f"--root={tmp_path}", "--format=latex")
  code, latex, err = common.call("experiments.tables", *args)
  assert code == 0
  assert err == "".join(f"left out: {problem}\n" for problem in problems)
  assert "relu\\_for\\_gelu & 704{,}771" in latex
  assert r"95.50 $\pm$ 0.71 (2)" in latex
  assert latex.count(r"\\") == 1 + len(rows)


def test_costs_of_unknown_classes_are_unknown(tmp_path):
  folder = {"data.name": "folder", "data.dir": str(tmp_path)}  # No split.
  cell = cells_lib.Cell("away", "configs/digits.py", folder)
  common.finished_run(tmp_path, cell, 0, 95.0)
  results, problems = scores.collect(sweeps.Sweep("", [cell], (0,)), tmp_path)
  assert problems == []
  assert scores.row(results[0]) == ("away", "", "", "100", "95.00 (1)", "", "")
  assert [p.name for p in plots.draw(results)] == ["top1", "loss"]


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["smok", "--root=x"], "nearest is smoke"),
    (["mine.py", "--root=x"], "add the name of its sweep, mine.py:NAME"),
    (["smoke"], "--root: is required"),
    (["smoke", "--root=README.md"], "Not a directory"),
    (["smoke", "--root=x", "--only=5/4"], "--only=5/4: must be I/N"),
    ([], "give one of smoke"),
    (["smoke", "--root=x", "--topology=v5e:4x4"], "needs --dry_run"),
    (["smoke", "--root=x", "--watch"], "--root=x: has no folder smoke; run"),
    (["smoke", "--root=x", "--watch", "--dry_run"], "give one of the two"),
    (["sweeps.py", "--root=x"], "FILE.py:NAME of your own"),
    (["smoke", "--root=x", "--devices_per_run=2"], "no GPU or TPU was found"),
    (
      ["smoke", "--root=x", "--dry_run", "--dollars_per_chip_hour=1"],
      "needs --topology",
    ),
    (["smoke", "--root=x", "--dry_run", "--topology=h100"], "as in h100:8"),
    *(
      (["smoke", f"--dollars_per_chip_hour={value}"], "not a non-negative num")
      for value in ("nan", "inf", "-1")
    ),
  ],
)
def test_mistakes_get_one_line(args, says):
  code, _, err = common.call("experiments.run", *args)
  assert code == 2
  assert says in err
  assert err.startswith("error: ")
  assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_dry_run_writes_nothing(tmp_path):
  args = ("smoke", f"--root={tmp_path / 'root'}", "--dry_run")
  code, out, err = common.call("experiments.run", *args, "--only=2/4")
  assert code == 0, err
  assert "p1_k5/seed0" in out
  assert "p1_k3" not in out
  assert "25,354" in out
  assert " seconds to go, one run at a time, at " in out
  # More parts than runs are no mistake.
  code, out, err = common.call("experiments.run", *args, "--only=20/20")
  assert code == 0, err
  assert out.endswith("0 runs\n")
  assert not (tmp_path / "root").exists()
  parts = [runs_lib.part("abcdefg", f"{i}/3") for i in (1, 2, 3)]
  assert parts == ["adg", "be", "cf"]


def test_hours_on_devices_of_unknown_speed(tmp_path):
  args = ("smoke", f"--root={tmp_path}", "--dry_run", "--topology=cpu:4")
  process = common.run_main(*args, module="experiments.run")
  err = process.communicate(timeout=60)[1]
  assert process.returncode == 2
  assert err == "error: --topology=cpu:4: their speed is not known\n"


@pytest.mark.parametrize(
  ("each", "part", "best", "estimate"),
  [(1, "v5e:1x1", 3.0, 6.0), (2, "v5e:1x2", 5.0, 10.0),
   (8, "v5e:2x4", 15.0, 30.0)],
)  # fmt: skip
def test_hours_on_a_pod(
  tmp_path, monkeypatch, capsys, each, part, best, estimate
):
  """Runs of 1, 2, 2 and 3 hours at best side by side; one is finished."""
  opened = []
  chip = types.SimpleNamespace(device_kind="TPU v5 lite")
  note = lambda name: opened.append(name) or [chip]
  monkeypatch.setattr(estimate_lib.topology, "open_topology", note)
  lengths = {"p1_k3": 1.0, "p1_k5": 2.0, "p2_k3": 2.0, "p2_k5": 3.0}
  sweep = sweeps.get("smoke")
  names = [cell.name for cell in sweep.cells]

  def plan(config, devices, data):
    assert data.size == 1437
    patch, kernel = config.model.patch_size, config.model.kernel_size
    best = lengths[f"p{patch}_k{kernel}"]
    hours = {"at_best": best, "compiler_estimate": 2 * best}
    return {"fits": True, "hours": hours}

  monkeypatch.setattr(estimate_lib.plan, "plan", plan)
  make = lambda cell, seed: runs_lib.Run(
    cell, seed, tmp_path / cell.name / f"seed{seed}"
  )
  common.finished_run(tmp_path, sweep.cells[0], 1, 95.0)
  runs = [make(*run) for run in sweep.runs()]
  assert len(runs) == 8
  assert names == [*lengths]
  estimate_lib.print_hours_on(runs, "v5e:2x4", each, 1.5)
  out = capsys.readouterr().out
  assert opened == ["v5e:2x4", part]
  assert f": {best} hours at best, {estimate} hours by the" in out
  assert out.endswith(f"${12 * best:,.2f} to ${12 * estimate:,.2f}"
                      " for all devices\n")  # fmt: skip
  assert out.count("  finished\n") == 1


def test_the_bar_shows_the_last_record(tmp_path):
  cell = sweeps.get("smoke").cells[0]  # Of four epochs.
  run = runs_lib.Run(cell, 0, tmp_path, "running")
  assert run.share_done() == 0
  records = [
    {"step": s, "kind": "train", "epoch": s / 20, "loss": 3 - s / 20}
    for s in (20, 40)
  ]
  lines = map(json.dumps, [*records, {"step": 60, "kind": "train"}])
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  assert run.share_done() == 0.5
  assert runs_lib.summary([run]).endswith("p1_k3/seed0 step 40 loss 1.000")


@pytest.mark.slow
def test_a_sweep_skips_records_and_resumes(tmp_path):
  """One cell trains, one fails; again: the first is skipped."""
  small = {"model.dim": 8, "model.depth": 1, "epochs": 1}
  cells = [
    cells_lib.Cell("good", "configs/digits.py", small),
    cells_lib.Cell(
      "bad", "configs/digits.py", {**small, "data.train_split": "train[:0]"}
    ),
  ]
  runs = [
    runs_lib.Run(cell, 0, tmp_path / cell.name / "seed0") for cell in cells
  ]
  run_lib._run_all(runs, [{}, {}])
  assert [run.status for run in runs] == ["finished", "failed"]
  assert "has no images" in (runs[1].workdir / "failed.txt").read_text()
  assert scores.finished(runs[0].workdir)
  results, problems = scores.collect(sweeps.Sweep("", cells, (0,)), tmp_path)
  assert len(results[0].scores) == 1
  assert scores.row(results[1])[4] == "missing"
  assert len(problems) == 1
  assert "bad" in problems[0]


@pytest.mark.parametrize(
  ("name", "cells"),
  [("patch_kernel_small", 9), ("architectures_small", 6),
   ("cifar10_ablation_small", 10)],
)  # fmt: skip
def test_committed_results_are_whole(name, cells):
  results, problems = scores.collect(
    sweeps.get(name), common.ROOT / "experiments" / "results" / name
  )
  assert problems == []
  assert [len(result.scores) for result in results] == [2] * cells


@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
  reason="needs two cores",
)
def test_runs_at_a_time_share_the_cores(tmp_path, monkeypatch):
  """A run that cannot start, and one that is held, leave the others alone."""
  code = "import os, time; time.sleep(1); print(os.sched_getaffinity(0))"
  command = lambda *args: [sys.executable, "-c", code]
  monkeypatch.setattr(cells_lib.Cell, "command", command)
  cells = sweeps.get("smoke").cells
  runs = [runs_lib.Run(cell, 0, tmp_path / cell.name / "0") for cell in cells]
  blocked, first, held, second = runs
  blocked.workdir.parent.touch()
  first.workdir.mkdir(parents=True)
  (first.workdir / "log.txt").write_text("of an earlier start\n")

  class Stop(list):
    """A signal when only the held run is left, for which it would wait."""

    def __len__(self):
      left = {run.status for run in (blocked, first, second)}
      return int(left == {"failed"})

  with workdir_lib.locked(held.workdir):
    run_lib._run_all([blocked, first, second, held], [{}, {}], Stop())
  said = "; ".join(f"{run.status}: {run.reason}" for run in runs)
  assert re.fullmatch(
    rf"failed: Not a directory: {blocked.workdir}; failed: {{.*}};"
    rf" running elsewhere: process {os.getpid()} on .*; failed: {{.*}}", said
  )  # fmt: skip
  log = (first.workdir / "log.txt").read_text()
  assert log == f"of an earlier start\n{first.reason}\n"
  failures = sorted(path.parent for path in tmp_path.glob("*/0/failed.txt"))
  assert failures == [first.workdir, second.workdir]
  a, b = (set(re.findall(r"\d+", run.reason)) for run in (first, second))
  assert a
  assert b
  assert not a & b


def test_processes_share_a_sweep(tmp_path, monkeypatch, capsys):
  """Runs of another process are not started; those that it leaves are."""
  monkeypatch.setattr(run_lib, "LOOK_AGAIN", 0.0)
  started = []
  note = lambda cell, *args: started.append(cell.name) or ["true"]
  monkeypatch.setattr(cells_lib.Cell, "command", note)
  cells = sweeps.get("smoke").cells
  make = lambda: [
    runs_lib.Run(c, 0, tmp_path / c.name / "seed0") for c in cells
  ]
  a, b, c, d = other = make()
  for run in (b, c, d):
    assert run.take()
  a, b, c, d = mine = make()
  looks = itertools.count()

  def sleep(seconds):
    """Between two looks the other process ends one of its runs."""
    match next(looks):
      case 1:
        common.finished_run(tmp_path / "ready", cells[1], 0, 95.0)
        done = tmp_path / "ready" / cells[1].name / "seed0"
        for file in done.iterdir():
          file.rename(b.workdir / file.name)
        other[1].release()
      case 2:
        (c.workdir / "failed.txt").write_text("exit code 1: no: disk\n")
        other[2].release()
      case 3:
        other[3].release()  # It was lost.

    time.sleep(0.05)

  clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
  monkeypatch.setattr(run_lib, "time", clock)
  run_lib._run_all(mine, [{}, {}])
  assert started == [a.cell.name, d.cell.name]
  assert [r.status for r in mine] == ["failed", "finished", "failed", "failed"]
  assert c.reason == "no: disk"
  out = capsys.readouterr().out
  assert out.count("running elsewhere: process ") == 3
  # The next start tries them again, and nothing else.
  started.clear()
  run_lib._run_all(make(), [{}])
  assert started == [a.cell.name, c.cell.name, d.cell.name]


@pytest.mark.parametrize("code", ["143", "2"])
def test_a_run_that_is_finished_is_no_failure(tmp_path, monkeypatch, code):
  """Whatever its process says: a signal came late, or another trained it."""
  monkeypatch.setattr(
    cells_lib.Cell, "command", lambda *args: ["sh", "-c", f"exit {code}"]
  )
  cell = sweeps.get("smoke").cells[0]
  run = runs_lib.Run(cell, 0, tmp_path / cell.name / "seed0")
  assert run.take()
  run_lib._start(run, 0, [{}])
  run.process.wait()
  (run.workdir / "log.txt").unlink()
  files = common.finished_run(tmp_path / "ready", cell, 0, 95.0)
  for file in files.iterdir():
    file.rename(run.workdir / file.name)
  run_lib._ended(run, stopping=code == "143")
  assert run.status == "finished"
  assert not (run.workdir / "failed.txt").exists()


def test_watch_of_many_runs_on_a_small_terminal(tmp_path, monkeypatch, capsys):
  cells = sweeps.get("smoke").cells
  workdirs = [tmp_path / cell.name / "seed0" for cell in cells]
  common.finished_run(tmp_path, cells[0], 0, 95.0)
  workdirs[1].mkdir(parents=True)
  (workdirs[1] / "failed.txt").write_text("exit code 1: no: disk\n")
  runs = [runs_lib.Run(c, 0, w) for c, w in zip(cells, workdirs)]
  size = os.terminal_size((80, 6))
  monkeypatch.setattr(run_lib.shutil, "get_terminal_size", lambda: size)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

  def end(seconds):
    for cell in cells[2:]:
      common.finished_run(tmp_path, cell, 0, 96.0)

  monkeypatch.setattr(run_lib.time, "sleep", end)
  run_lib._watch(runs)
  shown = capsys.readouterr().out.split("\033[H\033[2J")[1]
  _, first, last = shown.split("run ")
  _, failed, counts = first.splitlines()
  assert failed.split() == ["p1_k5/seed0", "failed", "no:", "disk"]
  assert counts == "1 finished, 1 failed, 2 waiting"
  assert last.endswith("\n3 finished, 1 failed\n")


def test_the_runner_takes_no_device(tmp_path, monkeypatch):
  """Its runs need them, and fail here; it does not."""
  monkeypatch.setenv("JAX_PLATFORMS", "none_of_this_name")
  command = ("smoke", f"--root={tmp_path}", "--only=1/8")
  process = common.run_main(*command, module="experiments.run")
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1
  assert out.endswith("\n1 failed\n"), err
  assert "none_of_this_name" in err


@pytest.mark.slow
def test_a_host_continues_the_runs_of_one_that_is_lost(tmp_path):
  (tmp_path / "two.py").write_text("""
from experiments.cells import Cell
from experiments.sweeps import Sweep
small = {"model.dim": 8, "model.depth": 1, "epochs": 30, "save_every": 50}
TWO = Sweep("?", [Cell(x, "configs/digits.py", small) for x in "ab"], (0, 1))
""")
  command = (f"{tmp_path}/two.py:TWO", f"--root={tmp_path}")
  lost = common.run_main(*command, module="experiments.run")
  log = tmp_path / "TWO" / "a" / "seed0" / "log.txt"
  deadline = time.time() + 120
  while not (log.exists() and "\nstep 10" in log.read_text()):
    assert time.time() < deadline
    time.sleep(0.1)
  other = common.run_main(*command, module="experiments.run")
  log_b = tmp_path / "TWO" / "b" / "seed0" / "log.txt"
  while not log_b.exists():
    assert time.time() < deadline
    time.sleep(0.1)
  shown = common.call("experiments.run", *command, "--watch")[1]
  assert len(re.findall(r"running  .* process \d+ on ", shown)) == 2
  assert shown.endswith("\n2 running, 2 waiting\n")
  children = psutil.Process(lost.pid).children(recursive=True)
  for process in (lost, *children):
    process.kill()
  lost.communicate()
  out, err = other.communicate(timeout=300)
  assert other.returncode == 0, out + err
  pid = re.search(r"^a/seed0: running elsewhere: process (\d+) on ", out, re.M)
  assert int(pid[1]) in {process.pid for process in (lost, *children)}
  assert out.endswith("\n4 finished\n")
  starts = {}
  for path in (tmp_path / "TWO").glob("*/*/run.json"):
    found = json.loads(path.read_text())["starts"]
    starts[path.parent.parent.name + path.parent.name] = len(found)
  assert starts == {"aseed0": 2, "aseed1": 1, "bseed0": 1, "bseed1": 1}
  assert "resuming" in log.read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, None])
def test_a_signal_while_a_run_starts_is_not_lost(tmp_path, monkeypatch, signum):
  """Without one the run fails; a finished run is not started."""
  started = []

  class Popen(subprocess.Popen):
    def __init__(self, command, **options):
      if signum:
        signal.raise_signal(signum)
      command = ["sleep", "99"] if signum else ["sh", "-c", "echo no; exit 3"]
      super().__init__(command, **options)
      started.append(self)

  monkeypatch.setattr(subprocess, "Popen", Popen)
  none = subprocess.CompletedProcess([], 0, "")
  monkeypatch.setattr(subprocess, "run", lambda *args, **options: none)
  cells = sweeps.get("smoke").cells
  common.finished_run(tmp_path / "smoke", cells[1], 0, 95.0)
  signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  handlers = {s: signal.getsignal(s) for s in signals}
  args = ("smoke", f"--root={tmp_path}", "--jobs=3", "--only=2/3")
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it.
  try:
    code, out, err = common.call("experiments.run", *args)
  finally:
    for s, handler in handlers.items():
      signal.signal(s, handler)
  if signum:
    assert code == 128 + signum, err
    assert out.endswith("\n1 finished, 1 waiting, 1 interrupted\n")
    assert [process.poll() for process in started] == [-signal.SIGTERM]
  else:
    assert code == 1
    assert out.endswith("\n1 finished, 2 failed\n")
    assert err.count("seed1: no\n") == 2


def test_a_log_ends_with_what_failed_and_the_counts(tmp_path, monkeypatch):
  """Standard output and error in one file, without a bar."""
  good, bad = (cells_lib.Cell(x, "configs/digits.py", {}) for x in ("a", "b"))
  monkeypatch.setitem(
    sweeps.SWEEPS, "two", sweeps.Sweep("?", [good, bad], (0,))
  )
  done = common.finished_run(tmp_path / "ready", good, 0, 95.0)
  shell = {"a": f"cp {done}/* .; exit 0", "b": "echo why; exit 3"}
  command = lambda cell, seed, workdir: [
    "sh", "-c", f"cd {workdir}; {shell[cell.name]}"]  # fmt: skip
  monkeypatch.setattr(cells_lib.Cell, "command", command)
  none = subprocess.CompletedProcess([], 0, "")
  monkeypatch.setattr(subprocess, "run", lambda *args, **options: none)
  signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  handlers = {s: signal.getsignal(s) for s in signals}
  log = io.StringIO()
  run_lib._FLAGS(["run", f"--root={tmp_path}"])
  try:
    with (
      contextlib.redirect_stdout(log),
      contextlib.redirect_stderr(log),
      pytest.raises(SystemExit) as e,
    ):
      run_lib.main("two")
  finally:
    for s, handler in handlers.items():
      signal.signal(s, handler)
  assert e.value.code == 1
  a, b = (tmp_path / "two" / x / "seed0" for x in "ab")
  assert log.getvalue().splitlines() == [
    "two: ? 2 runs",
    f"a/seed0: started; output in {a}/log.txt",
    "a/seed0: finished  top-1 95.00 %",
    f"b/seed0: started; output in {b}/log.txt",
    "b/seed0: failed: why",
    f"failed: {b}: why",
    "1 finished, 1 failed",
  ]


@pytest.mark.slow
def test_ctrl_c_saves_the_run_under_way(tmp_path):
  command = ("smoke", f"--root={tmp_path}")
  process = common.run_main(*command, module="experiments.run")
  log = tmp_path / "smoke" / "p1_k3" / "seed0" / "log.txt"
  deadline = time.time() + 120
  while time.time() < deadline:
    if log.exists() and "\nstep " in log.read_text():
      break
    time.sleep(0.2)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130, out + err
  assert "p1_k3/seed0: interrupted" in out
  start = json.loads((log.parent / "run.json").read_text())["starts"][-1]
  assert start["status"] == "interrupted"
  assert any((log.parent / "checkpoints").iterdir())
