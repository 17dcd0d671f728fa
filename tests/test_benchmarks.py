"""The benchmarks for accelerators, in tiny sizes on a CPU."""

import datetime
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import implementations
from benchmarks import pack
from convmixer_jax import ops
from tests import common
from tests import test_ops

SCRIPT = common.ROOT / "benchmarks" / "accelerator.sh"
# The parts that train use CIFAR-10, which not every machine has.
DIGITS = ["--override", "data.name=digits", "--override", "data.image_size=8"]


def accelerator(*args):
  # Its programs shall see one device, as users' do.
  environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": ""}
  return subprocess.Popen(
    [SCRIPT, *map(str, args)],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["--tinny"], "--tinny: no such flag"),
    (["--seconds", "8m"], "--seconds=8m: must be a number of seconds"),
    (["--batch", "0"], "--batch=0: must be a number of images"),
    (["--only", "ops"], "ops: no such part; there are op 1536_20_train"),
    (["--redo"], "--redo: needs a value"),
    (["a", "b"], "b: there is an output folder already, a"),
    (["README.md/x"], "README.md/x: cannot be created"),
    (["--unpack", "docs"], "--unpack=docs: manifest.json: "),
  ],
)
def test_mistakes_get_one_line(args, says):
  process = accelerator(*args)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (2, "")
  assert err.startswith(f"error: {says}")
  assert len(err.splitlines()) == 1


def test_help_lists_the_parts():
  out, _ = accelerator("--help").communicate(timeout=60)
  for word in ("cifar10_paper", "--redo PART", "runs/packed"):
    assert word in out


@pytest.mark.parametrize("work", implementations.WORKS)
def test_convolutions_of_one_program_are_not_merged(work, monkeypatch):
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4))

  def conv(x, kernel):
    return ops.depthwise_conv(x, kernel, implementation="xla")

  def function(x, kernel, grad):
    if work == "forward":
      return conv(x, kernel)
    return jax.vjp(conv, x, kernel)[1](grad)

  compiled, jit = [], jax.jit

  def recorded(function):
    def call(*args):
      compiled.append(jitted.lower(*args).compile().as_text())
      return jitted(*args)

    jitted = jit(function)
    return call

  monkeypatch.setattr(implementations, "SHORT", 1e9)
  with (
    mock.patch.object(jax, "default_backend", return_value="gpu"),
    mock.patch.object(jax, "jit", recorded),
  ):
    assert implementations.timed_convolution(function, x, kernel, x)() > 0
  each = 1 if work == "forward" else 2
  count = compiled[-1].count(" convolution(")
  assert count == each * implementations.TOGETHER


@pytest.mark.parametrize("k", [3, 4])
def test_the_reference_in_float64(k):
  rng = np.random.default_rng(0)
  x, grad = rng.normal(size=(2, 2, 6, 5, 3))
  kernel = rng.normal(size=(k, k, 3))
  ours = functools.partial(implementations.in_float64, x=x, kernel=kernel)
  expected = {
    "forward": [test_ops.exact(x, kernel)],
    "gradients": test_ops.exact_vjp(x, kernel, grad),
  }
  for work, arrays in expected.items():
    for a, b in zip(ours(work, grad=grad), arrays, strict=True):
      common.assert_close(a, b, 1e-13, work)


def test_what_is_packed_has_a_pin():
  assert all("==" in pin for pin in pack.pins())


@pytest.fixture
def packed(tmp_path, monkeypatch):
  """A packed data set, and no packages, since there is no internet."""
  data = tmp_path / "data"
  (data / "3.0.2").mkdir(parents=True)
  (data / "3.0.2" / "dataset_info.json").write_text("{}")
  images = np.random.default_rng(0).bytes(25_000)
  (data / "3.0.2" / "cifar10-train").write_bytes(images)
  monkeypatch.setattr(pack, "PART", 10_000)
  monkeypatch.setattr(pack, "fetch", lambda wheels, python: wheels.mkdir())
  version = ".".join(map(str, sys.version_info[:2]))
  pack.pack(tmp_path / "packed", version, data)
  return tmp_path / "packed", images


def test_parts_that_come_one_by_one(packed, tmp_path, capsys):
  folder, images = packed
  parts = sorted(folder.glob("cifar10.tar.*"))
  assert len(parts) >= 3
  assert max(part.stat().st_size for part in parts) == 10_000
  into, few = tmp_path / "into", tmp_path / "few"
  few.mkdir()
  (few / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
  for part in reversed(parts):
    assert not (into / "tensorflow_datasets").exists()
    (few / part.name).write_bytes(part.read_bytes())
    pack.unpack(few, into)
    (few / part.name).unlink()
  file = into / "tensorflow_datasets" / "cifar10" / "3.0.2" / "cifar10-train"
  assert file.read_bytes() == images
  assert not [*(into / "incoming").iterdir()]
  capsys.readouterr()
  pack.unpack(few, into)
  assert "cifar10: is unpacked" in capsys.readouterr().out


def test_a_damaged_part_is_refused(packed, tmp_path, capsys):
  folder, _ = packed
  part = folder / "cifar10.tar.01"
  content = bytearray(part.read_bytes())
  content[5000] ^= 1
  part.write_bytes(content)
  with pytest.raises(SystemExit) as e:
    pack.unpack(folder, tmp_path / "into")
  assert e.value.code == 2
  assert f"error: {part}: damaged" in capsys.readouterr().err


def test_the_wall_time_of_a_run_that_was_killed_once(tmp_path):
  config = common.digits_config(seed=3)
  (tmp_path / "config.json").write_text(config.to_json())
  at = lambda s: datetime.datetime.fromtimestamp(
    1e9 + s, datetime.UTC
  ).isoformat("T", "seconds")
  record = {"step": 1, "kind": "eval", "loss": 1.0, "top5": 90, "count": 9}
  records = [
    record | {"time": at(s), "top1": top1}
    for s, top1 in ((40, 50.0), (70, 60.0), (1030, 70.0))
  ]
  lines = "".join(json.dumps(r) + "\n" for r in records)
  (tmp_path / "metrics.jsonl").write_text(lines)
  last = {"started": at(1000), "ended": at(1035), "status": "finished"}
  run = {"starts": [{"started": at(0)}, last]}
  (tmp_path / "run.json").write_text(json.dumps(run))
  out = tmp_path / "out.json"
  code, text, err = common.call(
    "benchmarks.trained", f"--workdir={tmp_path}", f"--out={out}"
  )
  assert (code, err) == (0, "")
  assert text == "finished at step 1 after 105 s: top-1 70.00 %\n"
  result = json.loads(out.read_text())
  assert (result["complete"], result["seed"]) == (True, 3)


@pytest.mark.slow
def test_all_parts_run_and_then_are_skipped(tmp_path, monkeypatch):
  # Its compiler alone would take minutes.
  (tmp_path / "torch.py").write_text("raise ImportError('not for this test')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  args = (tmp_path / "out", "--tiny", "--seconds", 1200, *DIGITS)
  out, err = accelerator(*args).communicate(timeout=1200)
  assert err == ""
  parts = [p.stem for p in (tmp_path / "out").glob("*.json")]
  assert len(parts) == 11
  for part in parts:
    log = (tmp_path / "out" / "logs" / f"{part}.log").read_text()
    assert f"{part}: complete; took " in out, log
    assert json.loads((tmp_path / "out" / f"{part}.json").read_text())[
      "complete"
    ]
  rows = json.loads((tmp_path / "out" / "op.json").read_text())["rows"]
  for row in rows:
    tolerance = 1e-2 if row["dtype"] == "bfloat16" else 1e-5
    errors = [e for e in row["native"]["error"].values()]
    assert errors
    assert max(errors) < tolerance
  out, _ = accelerator(*args).communicate(timeout=60)
  assert out.count(": is complete; --redo ") == 11


@pytest.mark.slow
def test_a_signal_stops_a_run_that_then_resumes(tmp_path):
  part = ["--only", "cifar10_seed1", "--tiny", *DIGITS]
  part += ["--override", "log_every=1"]
  long = [*part, "--override", "epochs=2000"]
  process = accelerator(tmp_path, *long)
  metrics = tmp_path / "cifar10_seed1" / "metrics.jsonl"
  deadline = time.time() + 120
  while not (metrics.exists() and metrics.read_text().count("\n") > 5):
    assert time.time() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 130
  assert "stopped in cifar10_seed1" in out
  result = json.loads((tmp_path / "cifar10_seed1.json").read_text())
  assert (result["complete"], result["status"]) == (False, "interrupted")
  # And once more, now out of time.
  out, _ = accelerator(tmp_path, *long, "--seconds", 60).communicate(
    timeout=120
  )
  assert "cifar10_seed1: stopped after 3" in out
  again = json.loads((tmp_path / "cifar10_seed1.json").read_text())
  assert again["step"] > result["step"]
  assert len(again["starts"]) == 2


@pytest.mark.slow
def test_pytorch_says_which_precision_it_used(tmp_path):
  pytest.importorskip("torch")
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.throughput", "--model=convmixer_128_4",
     "--patch_size=4", "--kernel_size=3", "--image_size=16", "--batch=2",
     "--num_classes=10", "--mode=infer", "--dtype=bfloat16", "--repeats=1",
     "--implementation=all", "--against=torch", f"--out={tmp_path / 'x.json'}"],
    cwd=common.ROOT, env=os.environ | {"XLA_FLAGS": ""}, text=True,
    capture_output=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "x.json").read_text())
  assert record["complete"]
  rows = record["rows"]
  assert {"ours", "ours, xla", "contiguous", "channels_last"} <= rows.keys()
  for way in ("contiguous", "channels_last"):
    assert rows[way]["precision"] in ("autocast", "bfloat16")
    assert rows[way]["difference"] < 5e-2


@pytest.mark.slow
def test_augmentation_beside_others():
  if not importlib.util.find_spec("timm"):  # Importing it needs torch_peer.
    pytest.skip("timm is not installed")

  def run(*args):
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.augment", *args, "--repeats=1"],
      cwd=common.ROOT, env=os.environ | {"XLA_FLAGS": ""}, text=True,
      capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr

  imagenet = ("--config=configs/imagenet.py", "--config.batch_size=64",
              "--config.data.image_size=72")  # fmt: skip
  cifar10 = ("--config=configs/cifar10.py", "--config.batch_size=8")
  record = run(*imagenet, "--against=timm")
  assert record["batch"] == [64, 72, 72, 3]
  for name in ("ours", "timm", "crop"):  # The host's crop is apart.
    assert record[name]["core_ms_per_image"]["median"] > 0
  assert record["ours"]["compile_seconds"] > 0
  assert 0 < record["ours"]["temporary_float32_batches"] <= 4
  record = run(*cifar10, "--against=xla", "--step", "--config.model.depth=1")
  assert {"ours", "xla", "step"} <= record.keys()
  assert "crop" not in record  # Small images are cropped on the device.
  error = run(*cifar10, "--against=timm")
  assert error.startswith("error: --against=timm: torchvision-n2-m12 is torch")
