"""Compiles native.cc and augment.cc, caches the library and loads it.

The library is compiled at first use and kept in the user's cache folder. Its
name holds a hash of the sources, the flags and the CPU, and one of the
compiler, so that a change in any of them builds a new one. Without a compiler,
a library of any compiler is used.
"""

from collections.abc import Callable
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
from pathlib import Path
import platform
import shlex
import shutil
import subprocess
import tempfile

from absl import logging
import jax
from jaxlib import version

_SOURCES = tuple(
  Path(__file__).with_name(name) for name in ("native.cc", "augment.cc")
)
_HEADER = Path(__file__).with_name("native.h")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# Tried in this order, since not every compiler accepts each of them: x86 and
# some Arm compilers, other Arm compilers, and no tuning at all.
_TUNING = (["-march=native"], ["-mcpu=native"], [])


def load() -> ctypes.CDLL | None:
  """Loads the library; compiles it if the cache does not have it.

  Returns None if it cannot be built. A warning then says why.
  """
  try:
    # The cache may be full, or on a file system mounted with noexec.
    if (cache := cache_folder()) is not None:
      with contextlib.suppress(OSError):
        return ctypes.CDLL(str(_cached(cache)))
    with tempfile.TemporaryDirectory(prefix="convmixer_jax_") as folder:
      return ctypes.CDLL(str(_build(folder)))
  except (OSError, ValueError, subprocess.SubprocessError) as e:
    output = getattr(e, "stderr", None) or str(e)
    lines = output.strip().splitlines() or [type(e).__name__]
    logging.warning(
      "ops/native.cc could not be compiled (%s). Convolutions, BatchNorm and"
      " augmentation run in plain XLA, which is several times slower. Install a"
      " C++ compiler, for example with `apt-get install g++`, or name one in"
      " $CXX.",
      next((line for line in lines if "error" in line), lines[-1]),
    )
    return None


@functools.cache
def key() -> str:
  """A hash of all but the compiler that the compiled library depends on."""
  parts = [path.read_text("utf-8") for path in (*_SOURCES, _HEADER)]
  parts += [*_FLAGS, *itertools.chain(*_TUNING)]
  parts += [platform.machine(), cpu(), version.__version__]
  return digest("\0".join(parts).encode())


def digest(data: bytes) -> str:
  """A hash of 16 letters and digits, for file names."""
  return hashlib.sha256(data).hexdigest()[:16]


def cpu() -> str:
  """The CPU's model and features; programs compiled for it depend on them."""
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
  except OSError:
    return platform.processor()
  kinds = ("model name", "flags", "features")
  return "\n".join(sorted({x for x in lines if x.lower().startswith(kinds)}))


def cache_folder() -> Path | None:
  """The user's cache folder, created if missing: ~/.cache/convmixer_jax.

  None if it cannot be written, or if other users could write to it: they could
  leave a library there, which we would load.
  """
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = Path(cache) / "convmixer_jax"
  if not folder.is_absolute():  # The user has no home directory.
    return None
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
  except OSError:
    return None
  own = stat.st_uid == os.getuid() and not stat.st_mode & 0o022
  return folder if own and os.access(folder, os.W_OK) else None


def _cached(cache: Path) -> Path:
  """The library's file in `cache`, built if it is missing or damaged."""
  try:
    result = _run([*_compiler(), "--version"])
    result.check_returncode()
    compiler = digest("\0".join([*_compiler(), result.stdout]).encode())
  except (OSError, ValueError, subprocess.SubprocessError):
    compiler = "*"  # It may have been removed after it built a library.
  return cached(cache, f"native-{key()}-{compiler}", _build)


def cached(cache: Path, name: str, make: Callable[[str], Path]) -> Path:
  """The file that `make(folder)` builds, kept in `cache` as NAME-hash.suffix.

  It is built if it is missing or damaged.
  """
  for path in cache.glob(f"{name}-*"):
    if path.stem.endswith(f"-{digest(path.read_bytes())}"):
      return path
  # Other processes may build it at the same time. Each builds in a folder of
  # its own and renames the finished file, so that no one loads half of it.
  with tempfile.TemporaryDirectory(dir=cache) as folder:
    built = make(folder)
    name = f"{name}-{digest(built.read_bytes())}{built.suffix}"
    return built.replace(cache / name)


def _build(folder: str) -> Path:
  path = Path(folder) / "native.so"
  command = [*_compiler(), *_FLAGS, "-isystem", jax.ffi.include_dir(),
             *map(str, _SOURCES), "-o", str(path)]  # fmt: skip
  for tuning in _TUNING:
    result = _run([*command, *tuning])
    if result.returncode == 0:
      break
  result.check_returncode()
  return path


def _run(command: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run(
    command, capture_output=True, text=True, errors="replace"
  )


def _compiler() -> list[str]:
  if command := os.environ.get("CXX"):
    return shlex.split(command)
  for name in ("c++", "g++", "clang++"):
    if path := shutil.which(name):
      return [path]
  raise FileNotFoundError("no C++ compiler is installed")
