"""Eight CPU devices for every test, and one compilation cache for all."""

import gc
import os
from pathlib import Path
import resource
import signal
import tempfile

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:  # The workers inherit all this.
  flag = "--xla_force_host_platform_device_count=8"
  cache = tempfile.TemporaryDirectory(prefix="convmixer_jax_test_cache")
  os.environ.update(
    XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=cache.name,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
    # With a limit jax locks the cache, which the workers share.
    JAX_COMPILATION_CACHE_MAX_SIZE=str(2**30),
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_ENABLE_ONEDNN_OPTS="0",
  )
  # A shell's background jobs ignore Ctrl-C, and so do their children.
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
  """Compiles without LLVM's optimisations: a third of the quick tests' time.

  Not for slow tests, nor where XLA_FLAGS says otherwise. `make test-slow` also
  repeats the quick tests of numbers as XLA compiles them for users.
  """
  level = "--xla_backend_optimization_level"
  if (
    config.option.markexpr == "not slow"
    and level not in os.environ["XLA_FLAGS"]
  ):
    os.environ["XLA_FLAGS"] += f" {level}=0"


# Tracing makes many small objects, and each collection walks all of jax and
# torch: a fifteenth of the time.
gc.set_threshold(100_000, 20, 100)

MEMORY = 1 << 30  # Bytes that a test may add to the process.


@pytest.fixture
def portable():
  """Runs in plain XLA, for tests of all but the operations.

  jax's cache keeps no program of native operations on several devices: it holds
  the address of a Python object. So each run would be compiled again.
  """
  from convmixer_jax import ops

  with ops.portable():
    yield


@pytest.fixture
def little_memory(request):
  """Limits the memory that a test can take, whatever a file claims to need."""

  def resident(field):
    (line,) = (
      line
      for line in Path("/proc/self/status").read_text().splitlines()
      if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024

  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  limit = resident("VmSize") + 6 * MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  Path("/proc/self/clear_refs").write_text("5")  # The peak is from here on.
  before = resident("VmRSS")
  yield
  resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  # Pillow reads up to 179 million pixels, of eight bytes on the way.
  large = request.node.name == "test_image_files"
  assert resident("VmHWM") - before < MEMORY * (4 if large else 1)


@pytest.fixture
def folder(tmp_path):
  """A folder for the files of tests of invalid input."""
  (tmp_path / "given").mkdir()
  return tmp_path / "given"
