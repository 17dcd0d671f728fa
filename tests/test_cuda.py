"""depthwise.cu without a GPU: its results on the CPU, its code, its calls."""

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convmixer_jax import ops
from convmixer_jax.ops import build
from convmixer_jax.ops import cuda
from convmixer_jax.ops import nvrtc
from convmixer_jax.ops import partition
from tests import common
from tests import test_ops
from tests import test_plan

EMULATOR = common.ROOT / "tests" / "cuda_emulator.h"
SOURCE = common.ROOT / "convmixer_jax" / "ops" / "depthwise.cu"
MAIN_SHAPES = [
  ((64, 32, 32, 1536), 9),
  ((64, 32, 32, 768), 7),
  ((64, 16, 16, 256), 5),
  ((64, 16, 16, 1024), 9),
]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
  """Keeps the tests' many kernels out of the user's cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


def needs_nvrtc():
  if not cuda._compiles():
    pytest.skip("NVRTC is not installed: depthwise.cu is not compiled")


def emulate(folder, kernel, result, *args):
  """Runs a kernel of depthwise.cu on the CPU, compiled by a C++ compiler."""
  path = folder / f"{kernel.name}.so"
  flags = [f"-D{name}={value}" for name, value in kernel.macros]
  command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-x", "c++"]
  command += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover"]
  command += ["-include", EMULATOR, *flags, SOURCE, "-o", path]
  subprocess.run(command, check=True)
  library = ctypes.CDLL(str(path))
  arrays = [np.ascontiguousarray(a) for a in (*args, result)]
  pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
  function = ctypes.cast(library[kernel.name], ctypes.c_void_p)
  library.emulate(function, *kernel.grid, 256, kernel.num_bytes, *pointers)
  return arrays[-1]


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize(
  ("shape", "k"),
  [
    ((2, 32, 32, 16), 9),  # As in the paper: one image a tile.
    ((3, 16, 16, 24), 7),  # Two images a tile; one and a half octets.
    ((5, 7, 9, 8), 5),  # Two images of three blocks; one octet.
    ((9, 3, 2, 16), 3),  # Eight images a tile, more kernel than image.
    ((1, 37, 45, 8), 4),  # Two tiles each way; an even kernel.
    ((1, 5, 70, 8), 1),
    ((1, 20, 6, 16), 15),
    ((2, 9, 12, 16), 12),
    ((1, 66, 3, 8), 8),
  ],
)
def test_results_on_the_cpu(tmp_path, monkeypatch, shape, k):
  # So that a block of threads has several tiles for the kernel's gradient.
  monkeypatch.setattr(cuda, "_NUM_BLOCKS", 2)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  x, kernel, grad = draw(*shape), draw(k, k, shape[-1]), draw(*shape)
  assert cuda.supported(x, kernel)
  y = test_ops.exact(x, kernel)
  grad_x, grad_kernel = test_ops.exact_vjp(x, kernel, grad)

  empty = np.full_like(x, np.nan)
  call = cuda.convolve_kernel(shape, k, flip=False)
  ours = emulate(tmp_path, call, empty, x, kernel)
  common.assert_close(ours.astype(np.float64), y, 4e-3)
  (tmp_path / "flip").mkdir()
  call = cuda.convolve_kernel(shape, k, flip=True)
  ours = emulate(tmp_path / "flip", call, empty, grad, kernel)
  common.assert_close(ours.astype(np.float64), grad_x, 4e-3)

  call = cuda.grad_kernel(shape, k)
  parts = np.full((call.grid[1], *kernel.shape), np.nan, np.float32)
  ours = emulate(tmp_path, call, parts, x, grad)
  common.assert_close(ours.sum(0), grad_kernel, 1e-5)


@functools.cache
def ptxas(kernel, architecture):
  """Registers and bytes of spilled registers of a kernel."""
  program = shutil.which("ptxas") or pytest.skip("ptxas is not installed")
  command = [program, "-v", f"-arch={architecture}", "-", "-o", os.devnull]
  result = subprocess.run(
    command, input=cuda.ptx(kernel), capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  find = lambda pattern: int(re.search(pattern, result.stderr)[1])
  return find(r"Used (\d+) registers"), find(r"(\d+) bytes spill stores")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("shape", "k"), MAIN_SHAPES)
def test_compiles_without_spills(shape, k, architecture):
  needs_nvrtc()
  for kernel, blocks in [
    (cuda.convolve_kernel(shape, k, flip=False), 3),
    (cuda.convolve_kernel(shape, k, flip=True), 3),
    (cuda.grad_kernel(shape, k), 2),
  ]:
    registers, spilled = ptxas(kernel, architecture)
    assert spilled == 0
    # That many blocks of threads fit on a core of the GPU at a time.
    assert -(-registers // 8) * 8 * 256 * blocks <= 65536
    assert (kernel.num_bytes + 1024) * blocks <= 228 * 1024


@pytest.mark.parametrize("k", range(1, cuda.MAX_KERNEL_SIZE + 1))
def test_every_kernel_size_compiles(k):
  needs_nvrtc()
  for shape in [(2, 14, 14, 8), (3, 64, 40, 64)]:
    assert ptxas(cuda.convolve_kernel(shape, k, flip=True), "sm_80")[1] == 0
    assert ptxas(cuda.grad_kernel(shape, k), "sm_80")[1] == 0


def test_supported():
  def supported(shape, k, dtype=jnp.bfloat16):
    kernel = jax.ShapeDtypeStruct((k, k, shape[-1]), dtype)
    return cuda.supported(jax.ShapeDtypeStruct(shape, dtype), kernel)

  assert all(supported(shape, k) for shape, k in MAIN_SHAPES)
  assert supported((1024, 32, 32, 1536), 9)
  assert supported((1, 1000, 2, 8), 15)
  assert supported((64, 40, 3, 64), 15)
  assert not supported((64, 32, 32, 1536), 9, jnp.float32)
  assert not supported((64, 32, 32, 1540), 9)
  assert not supported((64, 32, 32, 64), 16)
  assert not supported((0, 32, 32, 64), 9)
  assert not supported((70000, 32, 32, 64), 9)


def use_gpu(monkeypatch, capability):
  """Programs are traced for a GPU."""
  gpu = mock.Mock(platform="gpu", compute_capability=capability)
  monkeypatch.setattr(partition, "device", lambda: gpu)


def test_without_nvrtc_says_so_once(monkeypatch, caplog):
  def missing():
    raise OSError("libnvrtc.so is not installed")

  monkeypatch.setattr(nvrtc, "_library", missing)
  use_gpu(monkeypatch, "9.0")
  cuda._compiles.cache_clear()
  cuda.ptx.cache_clear()
  try:
    assert not cuda.available()
    assert not cuda.available()
  finally:
    cuda._compiles.cache_clear()
  (record,) = [r for r in caplog.records if "depthwise.cu" in r.message]
  assert "libnvrtc.so is not installed" in record.message
  assert "pip install" in record.message


@pytest.mark.parametrize(
  ("capability", "new"),
  [("7.5", False), ("8.0", True), ("12.1", True), ("gfx942", False)],
)
def test_needs_compute_capability_8(monkeypatch, capability, new):
  needs_nvrtc()
  use_gpu(monkeypatch, capability)
  cuda._compiles.cache_clear()
  try:
    assert cuda.available() == new
  finally:
    cuda._compiles.cache_clear()


def test_ptx_is_cached_and_damage_is_found(monkeypatch, tmp_path):
  needs_nvrtc()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  kernel = cuda.convolve_kernel((1, 4, 4, 8), 3, flip=False)
  cuda.ptx.cache_clear()
  first = cuda.ptx(kernel)
  (path,) = build.cache_folder().glob("depthwise-*.ptx")
  assert path.read_text() == first
  assert first.count(".visible .entry convolve(") == 1
  path.write_text("damaged")
  cuda.ptx.cache_clear()
  assert cuda.ptx(kernel) == first


LOWERING = """
from convmixer_jax.plan import topology
(device,) = topology.open_topology("h100:1")
import jax, jax.numpy as jnp
from convmixer_jax.ops import cuda
sharding = jax.sharding.SingleDeviceSharding(device)
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding)

def step(x, kernel):
  y = cuda.forward(x, kernel)
  return y, cuda.gradients(x, kernel, y)

args = shape(64, 32, 32, 256), shape(9, 9, 256)
print(jax.jit(step).lower(*args).compile().as_text())
"""


@test_plan.gpu
def test_compiles_for_a_gpu():
  needs_nvrtc()
  result = subprocess.run(
    [sys.executable, "-c", LOWERING],
    cwd=common.ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  calls = re.findall(r'custom_call_target="(\S+)"', result.stdout)
  assert calls == ["__gpu$xla.gpu.ptx"] * 3
  assert not re.search(
    r"bf16\[64,32,32,256\]\S* (copy|transpose)", result.stdout
  )


@pytest.mark.parametrize(
  ("capability", "dtype", "k", "ours"),
  [
    ("9.0", jnp.bfloat16, 5, True),
    ("9.0", jnp.bfloat16, 9, True),
    ("9.0", jnp.bfloat16, 3, False),
    ("9.0", jnp.float32, 9, False),
    ("8.0", jnp.bfloat16, 9, False),
  ],
)
def test_auto_takes_what_was_measured_to_be_faster(
  monkeypatch, capability, dtype, k, ours
):
  use_gpu(monkeypatch, capability)
  monkeypatch.setattr(cuda, "available", lambda: True)
  monkeypatch.setattr(cuda, "ptx", lambda kernel: kernel.name)
  jax.clear_caches()
  x, kernel = jnp.zeros((8, 6, 6, 16), dtype), jnp.zeros((k, k, 16), dtype)
  op = jax.jit(ops.depthwise_conv)
  lowered = op.trace(x, kernel).lower(lowering_platforms=("cuda",))
  assert ("xla.gpu.ptx" in lowered.as_text()) == ours
  assert ops.chosen(None, dtype, k) == ("cuda" if ours else "xla")
  assert ops.chosen(None, dtype) == "xla"  # BatchNorm, for example.


def test_auto_is_as_fast_as_the_measurement_says():
  path = common.ROOT / "benchmarks/results/implementations_h200.json"
  rows = json.loads(path.read_text("utf-8"))["rows"]
  sizes = {row["k"] for row in rows}
  assert min(sizes) == cuda.FASTER_FROM["9.0"]
  for row in rows:
    others = {"xla", "banded"} & row.keys()
    assert row["cuda"]["greatest"] < min(row[n]["least"] for n in others)


def test_the_implementation_cuda(monkeypatch):
  """On a GPU where the shape and type are supported; elsewhere as 'auto'."""
  op = functools.partial(ops.depthwise_conv, implementation="cuda")

  def calls(dtype):
    x, kernel = jnp.zeros((8, 6, 6, 16), dtype), jnp.zeros((3, 3, 16), dtype)
    step = jax.jit(lambda *args: (op(*args), jax.vjp(op, *args)[1](x)))
    lowered = step.trace(x, kernel).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("xla.gpu.ptx")

  assert calls(jnp.bfloat16) == 0
  use_gpu(monkeypatch, "8.0")
  monkeypatch.setattr(cuda, "available", lambda: True)
  monkeypatch.setattr(cuda, "ptx", lambda kernel: kernel.name)
  jax.clear_caches()
  # Forward, and for each of eight parts both gradients.
  assert calls(jnp.bfloat16) == 1 + 2 * 8
  assert calls(jnp.float32) == 0
  monkeypatch.setattr(cuda, "available", lambda: False)
  jax.clear_caches()
  assert calls(jnp.bfloat16) == 0
