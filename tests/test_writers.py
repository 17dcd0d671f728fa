"""What runs tell beside metrics.jsonl: rates, traces, images, W&B."""

import gzip
import importlib.util
import io
import json
import os
import signal
import struct
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import peaks
from convmixer_jax import preview
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sheet
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib
from convmixer_jax import writers
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.plan import topology
from tests import common
from tests import test_train

TEN_STEPS = test_train.TEN_STEPS


@pytest.fixture(scope="module", autouse=True)
def portable():
  """See conftest.py; here for the fixtures of this module too."""
  with ops.portable():
    yield


def train_digits(workdir, profile=None, wandb=None, **overrides):
  config = common.digits_config(**(TEN_STEPS | overrides))
  return train.train_and_evaluate(config, workdir, profile=profile, wandb=wandb)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
  """A run that is stopped after six steps; its third and fourth are traced."""
  workdir = tmp_path_factory.mktemp("traced")
  with pytest.MonkeyPatch.context() as context:
    test_train.raise_signal_before(context, 6, signal.SIGTERM)
    with pytest.raises(SystemExit):
      train_digits(workdir, range(2, 4), **{"augment.mixup_alpha": 0.5})
  return workdir


# --- Rates.


@pytest.mark.parametrize(("dtype", "peak"), [(None, 495), ("bfloat16", 989)])
def test_the_peak_rate_counts_three_forward_passes(monkeypatch, dtype, peak):
  config = common.digits_config(**{"model.dtype": dtype})
  data = sources.Description(64, 10, (8, 8, 3), 8)
  recipe = recipe_lib.build(config, data)
  assert recipe.peak_rate is None  # Of a CPU.
  kind = "NVIDIA H100 80GB HBM3"
  cpu = jax.devices()[0].device_kind
  monkeypatch.setitem(peaks.PEAKS, cpu, peaks.PEAKS[kind])
  cost = 3 * models.flops(recipe.model, 8)
  assert recipe.peak_rate * cost / 1e12 == pytest.approx(peak, abs=0.5)


def test_records_have_rates_and_mfu_where_the_peak_is_known(
  tmp_path, monkeypatch, capsys, traced
):
  (first, *_) = workdir_lib.read_metrics(traced)
  each = first["images_per_second_per_device"]
  assert each == pytest.approx(first["images_per_second"] / 8)
  assert "mfu" not in first
  cpu = jax.devices()[0].device_kind
  monkeypatch.setitem(peaks.PEAKS, cpu, {"float32": 1e9})
  train_digits(tmp_path)
  recipe = recipe_lib.build(
    common.digits_config(), sources.Description(64, 10, (8, 8, 3), 8)
  )
  rows = workdir_lib.read_metrics(tmp_path)
  for record in (r for r in rows if r["kind"] == "train"):
    each = record["images_per_second_per_device"]
    used = each * 3 * models.flops(recipe.model, 8)
    assert record["mfu"] == pytest.approx(100 * used / 1e9)
    says = f"img/s ({each:.0f} a device)  MFU {record['mfu']:.1f} %  data wait "
    assert says in capsys.readouterr().out
    break


def test_every_chip_of_plan_has_a_peak():
  for kind, chip in topology.CHIPS.items():
    assert chip.flops == peaks.PEAKS[kind]["bfloat16"]
  for rates in peaks.PEAKS.values():
    assert rates["float32"] in (
      rates["bfloat16"],  # TPUs.
      pytest.approx(rates["bfloat16"] / 2, rel=0.01),
    )


# --- Traces.


def steps_of(workdir):
  """The numbers of the steps that each trace of a run has, oldest first."""
  found = []
  for path in sorted((workdir / "profile").rglob("*.trace.json.gz")):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found.append(
      [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]
    )
  return found


def test_a_trace_has_the_steps_that_were_asked_for(traced, tmp_path, capsys):
  assert steps_of(traced) == [[2, 3]]
  assert [*traced.glob("profile/**/*.xplane.pb")]
  # After a restart; of the first updates nothing is left to trace.
  mixed = {"augment.mixup_alpha": 0.5}
  train_digits(traced, range(0, 6), **mixed)
  assert "nothing will be traced, because 6 updates" in capsys.readouterr().out
  assert steps_of(traced) == [[2, 3]]


def test_a_trace_ends_with_the_run(tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as context:
    test_train.raise_signal_before(context, 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
      train_digits(tmp_path, range(1, 8))
  assert f"trace: {tmp_path / 'profile'}\n" in capsys.readouterr().out
  (steps,) = steps_of(tmp_path)
  assert steps[0] == 1
  train_digits(tmp_path, range(1, 10))  # What is left of it.
  assert steps_of(tmp_path)[1] == [*range(steps[-1] + 1, 10)]


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("--profile=7", "--profile=7: must be START:STOP"),
    ("--profile=7:7", "--profile=7:7: must be START:STOP"),
    ("--profile=-1:7", "must be START:STOP"),
    ("--profile=400:451", "--profile=400:451: the run has only 450 steps"),
    ("--profile=1:2 --mode=eval", "--profile=1:2: needs --mode train"),
    ("--wandb=x --mode=eval", "--wandb=x: needs --mode train"),
  ],
)
def test_invalid_flags_get_one_line(tmp_path, monkeypatch, flags, says):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  flags = flags.split()
  code, out, err = common.call(
    "convmixer_jax.main",
    "--config=configs/digits.py",
    f"--workdir={tmp_path / 'run'}",
    *flags,
  )
  assert (code, out) == (2, "")
  assert says in err
  assert not (tmp_path / "run").exists()


# --- Images.


def test_tensorboard_has_the_first_images(traced):
  """Also after a restart, which writes its events anew."""
  config = common.digits_config(**TEN_STEPS, **{"augment.mixup_alpha": 0.5})
  draw, names = preview.open_run(config)
  images, targets = draw(0)
  wanted = np.asarray(sheet.draw(images[:16], targets[:16], names, "step 0"))
  (events,) = traced.glob("events.*")
  accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
  (event,) = accumulator.Images("train/images")
  assert event.step == 0
  assert (event.height, event.width) == wanted.shape[:2]
  found = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
  # Compiled with other optimisations: other rounding.
  assert np.abs(found.astype(int) - wanted).max() <= 1
  assert len([*traced.glob("events.*")]) == 1


# --- Weights & Biases.


def test_wandb_that_is_absent_is_one_line(tmp_path, monkeypatch):
  if importlib.util.find_spec("wandb"):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"--wandb=x: .*-m pip install wandb$"):
    writers.Wandb("x")
  # A folder of its logs is no package.
  (tmp_path / "wandb").mkdir()
  monkeypatch.undo()
  monkeypatch.syspath_prepend(str(tmp_path))
  spec = importlib.util.find_spec("wandb")
  if spec.origin is None:
    with pytest.raises(UserError, match="pip install wandb"):
      writers.Wandb("x")


def test_wandb_that_cannot_be_imported_stops_nothing(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / "wandb").mkdir()
  (tmp_path / "wandb" / "__init__.py").write_text("raise TypeError('too old')")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  wandb = writers.Wandb("mixers")
  wandb.start("a name", tmp_path, "an id", "{}")
  wandb.write({"step": 1, "kind": "train", "loss": 2.0})
  wandb.finish("finished")
  err = capsys.readouterr().err
  assert err.count("warning: --wandb=mixers: too old; training goes on") == 1


needs_wandb = pytest.mark.skipif(
  getattr(importlib.util.find_spec("wandb"), "origin", None) is None,
  reason="wandb is not installed",
)


def offline_records(path):
  """The records of a .wandb file: LevelDB's log format, without checks."""
  from wandb.proto import wandb_internal_pb2

  data, at, whole = path.read_bytes(), 7, b""
  while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    whole += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # Full, or the last part.
      yield wandb_internal_pb2.Record.FromString(whole)
      whole = b""


@needs_wandb
def test_wandb_has_the_records(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  with monkeypatch.context() as context:
    test_train.raise_signal_before(context, 6, signal.SIGTERM)
    with pytest.raises(SystemExit):
      train_digits(tmp_path, wandb=writers.Wandb("mixers"))
  train_digits(tmp_path, wandb=writers.Wandb("mixers"))
  files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  assert len({*files}) == 2
  rows, exits = [], []
  for path in files:
    records = [*offline_records(path)]
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (
      run.run_id == json.loads((tmp_path / "run.json").read_text())["wandb"]
    )
    assert run.project == "mixers"
    assert run.display_name == tmp_path.name
    assert {*run.tags} == {"convmixer_128_4", "digits"}
    values = {x.key: json.loads(x.value_json) for x in run.config.update}
    assert values["model"]["dim"] == 8
    for r in records:
      if r.WhichOneof("record_type") == "history":
        rows.append(
          {
            "/".join(x.nested_key) or x.key: json.loads(x.value_json)
            for x in r.history.item
          }
        )
      elif r.WhichOneof("record_type") == "exit":
        exits.append(r.exit.exit_code)
  assert exits == [1, 0]
  wanted = workdir_lib.read_metrics(tmp_path)
  assert [r["step"] for r in rows] == [r["step"] for r in wanted]
  for row, record in zip(rows, wanted):
    for name in ("loss", "top1"):
      assert row[f"{record['kind']}/{name}"] == record[name]


@needs_wandb
def test_wandb_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("WANDB_MODE", "offline")
  wandb = writers.Wandb("mixers")

  def fail(*args, **kwargs):
    raise OSError("no network")

  monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", fail)
  train_digits(tmp_path, wandb=wandb)
  err = capsys.readouterr().err
  assert err.count("warning: --wandb=mixers: no network; training goes on") == 1
  assert workdir_lib.read_metrics(tmp_path)[-1]["step"] == 10


@needs_wandb
@pytest.mark.slow
def test_wandb_without_a_login_is_one_line(tmp_path):
  """In a process of its own: wandb reads its settings once."""
  process = common.run_main(
    *test_train.FLAGS,
    f"--workdir={tmp_path / 'run'}",
    "--wandb=mixers",
    environment={
      "HOME": str(tmp_path),
      "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
      "WANDB_MODE": "online",
      "WANDB_API_KEY": "",
    },
  )
  _, err = test_train.finish(process, 2)
  assert err.startswith("error: --wandb=mixers: "), err
  assert err.endswith("WANDB_MODE=offline needs none of it\n"), err
  assert not (tmp_path / "run" / "config.json").exists()
