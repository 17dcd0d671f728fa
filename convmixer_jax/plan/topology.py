"""Devices to plan for, and what their chips can do."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
from pathlib import Path
import re
import sys
from typing import Any

import jax
from jax.experimental import topologies

from convmixer_jax import peaks
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError
from convmixer_jax.plan import gpus


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip or a GPU, which JAX shows as one device."""

  flops: float  # Peak bfloat16 FLOP/s, on TPUs also for float32 by default.
  bandwidth: float  # Of its memory, bytes/s.
  interconnect: float  # Bytes/s that it can send over all its links together.
  # Bytes: of a TPU, what libtpu 0.0.42.1 gives to a program; of a GPU, all.
  memory: int
  # Hz: `flops` / the FLOPs of a TPU's matrix units in a cycle.
  clock: float | None = None


_GIB = 2**30


def _chip(kind, bandwidth, interconnect, memory, cycle=None):
  """A chip, and the FLOPs that a TPU's matrix units do in a cycle."""
  flops = peaks.PEAKS[kind]["bfloat16"]
  clock = flops / cycle if cycle else None
  return Chip(flops, bandwidth, interconnect, int(memory), clock)


# By JAX's device_kind. Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p and
# /v6e in November 2026. Interconnect is half of their "bidirectional ICI
# bandwidth per chip" (v4: 6 links of 50 GB/s each way, Jouppi et al.,
# arXiv:2304.01433). Matrix units: eight of 128 x 128 on v4 and v5p, four on
# v5e. v6e does 2^19 FLOPs a cycle; its compiler expects to reach 70 % of that
# for a product of two [8192, 8192].
CHIPS = {
  kind: _chip(kind, *rest)
  for kind, *rest in (
    ("TPU v4", 1200e9, 300e9, 30.75 * _GIB, 2**18),
    ("TPU v5 lite", 819e9, 200e9, 15.75 * _GIB, 2**17),
    ("TPU v5", 2765e9, 600e9, 95.74 * _GIB, 2**18),
    ("TPU v6 lite", 1638e9, 400e9, 31.25 * _GIB, 2**19),
    *((x.kind, x.bandwidth, x.link, x.memory) for x in gpus.GPUS.values()),
  )
}
_KINDS = "v4", "v5e", "v5p", "v6e"  # libtpu's names for these chips.


def open_topology(name: str | None) -> Sequence[Any]:
  """The devices of a topology such as 'v5e:4x4', 'h100:8' or 'cpu:8'.

  None stands for this machine's devices. For any other name, JAX's own
  computation is restricted to the CPU; call this before anything else uses JAX.
  Raises UserError if there is no such topology, or its compiler is missing.
  """
  if name is None:
    return jax.devices()
  kind, _, shape = name.partition(":")
  pattern = (
    rf"({'|'.join(('cpu', *gpus.GPUS))}):[1-9]\d*"
    rf"|({'|'.join(_KINDS)}):[1-9]\d*(x[1-9]\d*)*"
  )
  count = math.prod(map(int, re.findall(r"\d+", shape)))
  if not re.fullmatch(pattern, name) or count > 10_000:
    raise UserError(
      f"--topology={name}: must be cpu:N, or a GPU ({', '.join(gpus.GPUS)})"
      f" and one number, as in h100:8, or a TPU ({', '.join(_KINDS)}) and the"
      " number of chips along each axis, as in v5e:4x4; at most 10,000 devices"
    )
  jax.config.update("jax_platforms", "cpu")
  if kind == "cpu":
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()
  if kind in gpus.GPUS:
    return gpus.open_gpus(kind, count)
  installed = importlib.util.find_spec("libtpu") is not None
  apart = Path(sys.prefix) / "libtpu/libtpu/libtpu.so"  # The Makefile's.
  if not installed and apart.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(apart))
  if not installed and "TPU_LIBRARY_PATH" not in os.environ:
    raise UserError(
      f"--topology={name}: needs libtpu, which is not installed; run make"
      " .venv/dev, or on a machine with a TPU pip install"
      f' "jax[tpu]=={jax.__version__}"'
    )
  # libtpu must not look for a chip to lock, ask a host about it, or write logs.
  os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="",
    TPU_HOST_BOUNDS="1,1,1",
    TPU_LOG_DIR="disabled",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
  )
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  if count < 4:  # By default a host has 2x2 chips.
    bounds = [int(n) for n in shape.split("x")]
    options["chips_per_host_bounds"] = [*bounds, 1, 1][:3]
  try:
    return topologies.get_topology_desc(name, platform="tpu", **options).devices
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    raise UserError(f"--topology={name}: {first_line(e)}") from e


def available_memory(devices: Sequence[Any]) -> int | None:
  """Bytes available to each of `devices`, of one kind; None if unknown."""
  device = devices[0]
  chip = CHIPS.get(device.device_kind)
  if chip and device.platform == "tpu":
    return chip.memory
  if chip and device not in jax.devices():  # A GPU that is not here.
    return int(gpus.memory_share() * chip.memory)
  if device.platform == "cpu":  # They share the memory of the machine.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // len(devices)
  return (device.memory_stats() or {}).get("bytes_limit")
