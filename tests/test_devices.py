import importlib.util
import json
import os
import subprocess
import sys

import pytest

from convmixer_jax.errors import UserError
from experiments import devices
from experiments import run as run_lib
from experiments import runs as runs_lib
from experiments import sweeps
from tests import common

LIBTPU = common.ROOT / ".venv/libtpu/libtpu/libtpu.so"


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
  for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE",
               "TPU_VISIBLE_CHIPS", "JAX_PLATFORMS"):  # fmt: skip
    monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dev(tmp_path, monkeypatch):
  """An empty /dev, with libtpu and no GPU."""
  monkeypatch.setattr(devices, "DEV", tmp_path / "dev")
  found = lambda name: name == "libtpu"
  monkeypatch.setattr(importlib.util, "find_spec", found)
  none = subprocess.CompletedProcess([], 0, "")
  monkeypatch.setattr(subprocess, "run", lambda *args, **options: none)
  return tmp_path / "dev"


def touch(dev, *names):
  for name in names:
    (dev / name).parent.mkdir(parents=True, exist_ok=True)
    (dev / name).touch()


def test_chips_of_older_and_newer_tpus(dev, monkeypatch):
  assert devices.find() == devices.Devices("cpu")
  # Accelerators of others, and what belongs to no chip.
  touch(dev, "accel/accel0", "vfio/vfio", "accelerometer")
  assert devices.find() == devices.Devices("cpu")
  touch(dev, "vfio/10", "vfio/7")
  assert devices.find() == devices.Devices("tpu", ("0", "1"))
  touch(dev, *(f"accel{i}" for i in range(4)))
  assert devices.find() == devices.Devices("tpu", ("0", "1", "2", "3"))
  monkeypatch.setenv("TPU_VISIBLE_CHIPS", "2,3")
  assert devices.find() == devices.Devices("tpu", ("2", "3"))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert devices.find() == devices.Devices("cpu")
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert devices.find() == devices.Devices("cpu")


def test_gpus(dev, monkeypatch):
  two = subprocess.CompletedProcess([], 0, "2\n")
  monkeypatch.setattr(subprocess, "run", lambda *args, **options: two)
  assert devices.find() == devices.Devices("gpu", ("0", "1"))
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6f")
  found = devices.find()
  shown = lambda *args: [
    share["CUDA_VISIBLE_DEVICES"] for share in devices.share(found, *args)
  ]
  assert shown(None, None) == ["4", "GPU-6f"]
  assert shown(3, None) == ["4", "GPU-6f", "4"]
  assert shown(None, 2) == ["4,GPU-6f"]
  shared = [
    devices.share(found, n, None)[0].get("XLA_PYTHON_CLIENT_PREALLOCATE")
    for n in (1, 2, 3)
  ]
  assert shared == [None, None, "false"]
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  assert devices.share(found, 3, None)[0].keys() == {"CUDA_VISIBLE_DEVICES"}


@pytest.mark.parametrize(
  ("found", "args", "says"),
  [
    (("cpu", 0), (None, 2), "per_run=2: no GPU or TPU was found"),
    (("gpu", 2), (None, 3), "per_run=3: this host has 2 GPUs"),
    (("tpu", 4), (None, 8), "per_run=8: this host has 4 TPU chips"),
    (("tpu", 4), (None, 3), "per_run=3: must be 1, 2, 4 or 8 TPU chips"),
    (("tpu", 4), (5, None), "--jobs=5: the chips suffice for 4, and runs"),
    (("tpu", 4), (2, 4), "--jobs=2: the chips suffice for 1, and runs"),
  ],
)
def test_too_few_devices(found, args, says):
  platform, count = found
  host = devices.Devices(platform, tuple(map(str, range(count))))
  with pytest.raises(UserError, match=says):
    devices.share(host, *args)
  with pytest.raises(UserError, match="CHIPS=a: must be numbers"):
    devices.share(devices.Devices("tpu", ("a",)), None, None)


def test_each_run_has_a_chip_of_its_own(dev, tmp_path, monkeypatch):
  """What the processes are given, as they print it."""
  touch(dev, *(f"accel{i}" for i in range(4)))
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
  code = (
    "import os, json; print(json.dumps({k: v for k, v in os.environ.items()"
    " if 'TPU' in k}))"
  )
  command = lambda *args: [sys.executable, "-c", code]
  monkeypatch.setattr(sweeps.Cell, "command", command)
  cells = sweeps.get("smoke").cells
  runs = [runs_lib.Run(cell, 0, tmp_path / cell.name) for cell in cells]
  run_lib._run_all(runs, devices.share(devices.find(), None, None))
  for i, run in enumerate(runs):
    given = {
      k: v for k, v in json.loads(run.reason).items() if "LIBRARY" not in k
    }
    assert given == {
      "TPU_VISIBLE_CHIPS": str(i),
      "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
      "TPU_PROCESS_BOUNDS": "1,1,1",
      "TPU_PROCESS_ADDRESSES": f"localhost:{8476 + i}",
      "TPU_PROCESS_PORT": str(8476 + i),
      "CLOUD_TPU_TASK_ID": "0",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_WORKER_ID": "0",
    }
  shares = devices.share(devices.find(), None, 2)
  names = ("TPU_VISIBLE_CHIPS", "TPU_CHIPS_PER_PROCESS_BOUNDS")
  found = [tuple(share[name] for name in names) for share in shares]
  assert found == [("0,1", "1,2,1"), ("2,3", "1,2,1")]


@pytest.mark.skipif(not LIBTPU.exists(), reason="needs libtpu")
@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_libtpu_understands(each):
  """It looks for a chip, and finds none here; or else what is said is wrong."""
  host = devices.Devices("tpu", tuple(map(str, range(8))))
  start = lambda env: subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices()"],
    env=os.environ
    | {"JAX_PLATFORMS": "tpu", "TPU_LIBRARY_PATH": str(LIBTPU)}
    | env,
    capture_output=True,
    text=True,
    check=False,
  )
  *_, env = devices.share(host, None, each)
  assert "NOT_FOUND: TPU initialization failed" in start(env).stderr
  wrong = start(env | {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1"}).stderr
  assert "Illegal value '1,1'" in wrong


@pytest.mark.skipif(not LIBTPU.exists(), reason="needs libtpu")
def test_topologies_of_a_run():
  code = """
from convmixer_jax.plan import topology
for name in "v5e:1x1 v5e:1x2 v6e:2x2 v5e:2x4 v5p:1x2x1 v4:1x1x1".split():
  print(name, len(topology.open_topology(name)))
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  found = [line.split()[-1] for line in done.stdout.splitlines()]
  assert found == ["1", "2", "4", "8", "2", "1"]
