"""NVIDIA GPUs that need not be present, for XLA's GPU compiler."""

from collections.abc import Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
import sys
from typing import Any

import jax
from jax.experimental import topologies

from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A card, as its driver describes it to XLA, and its bandwidths."""

  kind: str  # JAX's device_kind.
  capability: str  # Fields of XLA's CudaComputeCapability.
  cores: int  # Streaming multiprocessors.
  lanes: int  # float32 units of a core.
  threads: int  # That a core holds.
  shared: int  # Bytes of shared memory of a core; a block gets 1 KiB less.
  l2: int  # Bytes of the L2 cache.
  clock: float  # GHz.
  memory: int  # Bytes that programs can use, less than the card's name says.
  bandwidth: float  # Of its memory, bytes/s.
  link: float  # Bytes/s that it can send to other GPUs.


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30

# Sources: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and L4
# for bandwidth and NVLink (half of the total of both directions; the L4 has
# none, but PCIe 4.0 x16); peaks.py has the FLOP/s; the whitepapers
# on the Ampere, Hopper and Ada architectures for cores and L2; the table of
# compute capabilities in the CUDA C++ programming guide for threads and shared
# memory. The clock is the highest of the cores, the memory what CUDA reports.
_HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"  # sm_90a
GPUS = {
  "a100": Gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 2048, 164 * _KIB,
              40 * _MIB, 1.41, int(79.2 * _GIB), 2039e9, 300e9),
  "h100": Gpu("NVIDIA H100 80GB HBM3", _HOPPER, 132, 128, 2048, 228 * _KIB,
              50 * _MIB, 1.98, int(79.1 * _GIB), 3350e9, 450e9),
  "h200": Gpu("NVIDIA H200", _HOPPER, 132, 128, 2048, 228 * _KIB,
              50 * _MIB, 1.98, int(139.8 * _GIB), 4800e9, 450e9),
  "l4": Gpu("NVIDIA L4", "major: 8 minor: 9", 58, 128, 1536, 100 * _KIB,
            48 * _MIB, 2.04, int(22 * _GIB), 300e9, 32e9),
}  # fmt: skip

# XLA's GpuTargetConfigProto. The version of cuDNN is the oldest that jax 0.10
# accepts.
_TARGET = """
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ {capability} }}
  core_count: {cores}
  fpus_per_core: {lanes}
  threads_per_core_limit: {threads}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  shared_memory_per_block: 49152
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
"""


def open_gpus(name: str, count: int) -> Sequence[Any]:
  """`count` devices of GPUS[name], as if one host had them.

  Call this after JAX was restricted to the CPU, and before anything uses it.
  Raises UserError if JAX's plug-in for CUDA is missing or cannot start.
  """
  memory_share()  # The plug-in does not start if it is invalid.
  apart = Path(sys.prefix) / "cuda"  # The Makefile's.
  if apart.exists():
    sys.path.append(str(apart))
  gpu = dataclasses.asdict(GPUS[name])
  gpu |= {"optin": gpu["shared"] - _KIB, "bandwidth": int(gpu["bandwidth"])}
  try:
    with _no_stderr():
      return topologies.get_topology_desc(
        name,
        platform="cuda",
        target_config=_TARGET.format(**gpu),
        topology=f"1x1x{count}",  # Slices, the hosts of one, the GPUs of one.
      ).devices
  except NotImplementedError:  # JAX has no plug-in, or failed to start it.
    raise UserError(
      f"--topology={name}:{count}: needs JAX's plug-in for CUDA, of the version"
      " of jax; in an environment of its own, run pip install --no-deps"
      f" jax-cuda12-pjrt=={jax.__version__}"
    ) from None
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    raise UserError(f"--topology={name}:{count}: {first_line(e)}") from e


def memory_share() -> float:
  """The share of a GPU's memory that JAX takes for its arrays.

  JAX takes it when it starts: three quarters, if the environment does not say
  otherwise. Raises UserError if the environment's value is invalid.
  """
  names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
  name = next(filter(os.environ.get, names), None)
  if name is None:
    return 0.75
  try:
    share = float(os.environ[name])
  except ValueError:
    share = 0.0
  if not 0 < share <= 1:
    raise UserError(
      f"{name}={os.environ[name]}: must be a share of a GPU's memory, such as"
      " 0.9; change this environment variable"
    )
  return share


@contextlib.contextmanager
def _no_stderr():
  """Hides that the plug-in finds no GPU, which it prints when it is loaded."""
  sys.stderr.flush()
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(null, 2)
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)
