"""The GPUs or TPU chips of this host, and the share of each run."""

import dataclasses
import importlib.util
import os
from pathlib import Path
import re
import subprocess
import sys

from convmixer_jax.errors import UserError

DEV = Path("/dev")

# Number of chips of a host -> their columns, rows and layers; as in
# jax._src.test_multiprocess.
BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_FIRST_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Devices:
  """The accelerators of a host; only a CPU has no `ids`."""

  platform: str
  ids: tuple[str, ...] = ()


def find() -> Devices:
  """The accelerators that jax would use, without taking them from the runs.

  CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS restrict them.
  """
  if chips := _tpu_chips():
    return Devices("tpu", chips)
  code = (
    "import jax\n"
    "if jax.default_backend() == 'gpu': print(jax.local_device_count())"
  )
  # A child process looks, so that this one holds no memory of a GPU.
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  if count := int(done.stdout.strip() or 0):
    return Devices("gpu", _visible("CUDA_VISIBLE_DEVICES", count))
  return Devices("cpu")


def _tpu_chips():
  """Looks for device files: libtpu would keep the chips that it finds."""
  allowed = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
  if not allowed or not importlib.util.find_spec("libtpu"):
    return ()
  # v2 to v4, and later TPUs. Linux has /dev/accel/ for other accelerators.
  for pattern, name in (("accel*", r"accel\d+"), ("vfio/*", r"\d+")):
    files = [x for x in DEV.glob(pattern) if re.fullmatch(name, x.name)]
    if files:
      return _visible("TPU_VISIBLE_CHIPS", len(files))
  return ()


def _visible(variable, count):
  given = os.environ.get(variable)
  return tuple(given.split(",") if given else map(str, range(count)))


def share(
  devices: Devices, jobs: int | None, devices_per_run: int | None
) -> list[dict[str, str]]:
  """The environment that gives a run its devices, for each run at a time.

  Args:
    devices: as `find` returns them.
    jobs: number of runs at a time. Default: as many as the devices suffice for,
      or one on a CPU. More share GPUs.
    devices_per_run: default: 1.

  Raises:
    UserError: there are not enough devices.
  """
  if devices.platform == "cpu":
    if devices_per_run:
      text = "no GPU or TPU was found on this host"
      raise UserError(f"--devices_per_run={devices_per_run}: {text}")
    return [{}] * (jobs or 1)
  each, ids = devices_per_run or 1, devices.ids
  tpu = devices.platform == "tpu"
  kind = "TPU chips" if tpu else "GPUs"
  groups = [ids[i : i + each] for i in range(0, len(ids) - each + 1, each)]
  if not groups:
    text = f"this host has {len(ids)} {kind}"
    raise UserError(f"--devices_per_run={each}: {text}")
  if tpu and each not in BOUNDS:
    raise UserError(f"--devices_per_run={each}: must be 1, 2, 4 or 8 TPU chips")
  if tpu and not all(map(str.isdecimal, ids)):
    text = f"TPU_VISIBLE_CHIPS={','.join(ids)}: must be numbers, as in 0,1"
    raise UserError(text)
  jobs = jobs or len(groups)
  if tpu and jobs > len(groups):
    text = f"the chips suffice for {len(groups)}, and runs cannot share a chip"
    raise UserError(f"--jobs={jobs}: {text}")
  make = _tpu_environment if tpu else _gpu_environment
  more = {}
  if jobs > len(groups) and "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ:
    more["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # They share its memory.
  return [make(groups[i % len(groups)]) | more for i in range(jobs)]


def _gpu_environment(ids):
  return {"CUDA_VISIBLE_DEVICES": ",".join(ids)}


def _tpu_environment(ids):
  """As if the host had these chips only, and belonged to no pod.

  See pytorch/xla's issue 7714.
  """
  port = _FIRST_PORT + int(ids[0])
  return {
    "TPU_VISIBLE_CHIPS": ",".join(ids),
    "TPU_CHIPS_PER_PROCESS_BOUNDS": BOUNDS[len(ids)],
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
    "TPU_PROCESS_PORT": str(port),
    "CLOUD_TPU_TASK_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What the cloud and its metadata server say of the pod does not hold.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }
