"""Compiles CUDA C++ to PTX by NVRTC, which JAX's CUDA packages install.

Neither a CUDA toolkit nor a GPU is needed. The PTX is kept in the user's cache
folder, as `build` keeps its library.
"""

import contextlib
import ctypes
import functools
import importlib.util
from pathlib import Path
import re
import tempfile

from convmixer_jax.ops import build

# The oldest cards with bfloat16 products. PTX for them runs on all later ones.
_FLAGS = ("-std=c++17", "-arch=compute_80")
# The first version of PTX with these products, so that older drivers take it.
_PTX_VERSION = ".version 7.0"


def ptx(path: Path, macros: list[str]) -> str:
  """Compiles a CUDA C++ file that includes nothing, or reads the cache.

  Args:
    path: the file.
    macros: -DNAME=VALUE flags.

  Returns:
    PTX for compute capability 8.0 and later.

  Raises:
    OSError: NVRTC is not installed.
    RuntimeError: it could not compile the file; with its messages.
  """
  library, source = _library(), path.read_text("utf-8")
  flags = [*_FLAGS, *macros]
  version = [ctypes.c_int(), ctypes.c_int()]
  library.nvrtcVersion(*map(ctypes.byref, version))
  parts = [source, *flags, _PTX_VERSION, *(str(v.value) for v in version)]
  key = build.digest("\0".join(parts).encode())

  def make(folder):
    built = Path(folder) / f"{path.stem}.ptx"
    built.write_text(_compile(library, source, flags), "utf-8")
    return built

  if (cache := build.cache_folder()) is not None:
    with contextlib.suppress(OSError):  # The cache may be full.
      return build.cached(cache, f"{path.stem}-{key}", make).read_text("utf-8")
  with tempfile.TemporaryDirectory(prefix="convmixer_jax_") as folder:
    return make(folder).read_text("utf-8")


def _compile(library, source, flags):
  program = ctypes.c_void_p()

  def check(code):
    if code:
      library.nvrtcGetErrorString.restype = ctypes.c_char_p
      raise RuntimeError(library.nvrtcGetErrorString(code).decode())

  def text(name):
    size = ctypes.c_size_t()
    check(library[f"nvrtcGet{name}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(library[f"nvrtcGet{name}"](program, buffer))
    return buffer.value.decode(errors="replace")

  create = library.nvrtcCreateProgram
  check(create(ctypes.byref(program), source.encode(), None,
               0, None, None))  # fmt: skip
  try:
    options = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
    if library.nvrtcCompileProgram(program, len(flags), options):
      raise RuntimeError(text("ProgramLog"))
    return re.sub(r"(?m)^\.version .*$", _PTX_VERSION, text("PTX"), count=1)
  finally:
    library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _library():
  """Loads NVRTC from its Python package or from the loader's path."""
  spec = importlib.util.find_spec("nvidia")
  folders = map(Path, spec.submodule_search_locations or ()) if spec else ()
  found = {
    path for f in folders for path in f.glob("*/lib/libnvrtc*.so.1[0-9]*")
  }
  found = {path for path in found if ".alt." not in path.name}
  # NVRTC does not find its builtins in its own folder, unless they are loaded.
  builtins = {path for path in found if "builtins" in path.name}
  names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
  for path in [*sorted(found - builtins, reverse=True), *names]:
    try:
      for builtin in builtins:
        if builtin.parent == Path(path).parent:
          ctypes.CDLL(str(builtin))
      return ctypes.CDLL(str(path))
    except OSError:
      continue
  raise OSError("libnvrtc.so is not installed")
