"""`native.cc`, built at first use, as functions of JAX arrays.

Each may be jitted, vmapped, scanned, and sharded over the batch; none is
differentiable by itself. They run on CPUs alone.
"""

from collections.abc import Callable
import ctypes
import functools
import hashlib
import os
from pathlib import Path
import platform
import shlex
import shutil
import subprocess
import tempfile
from typing import Any

from absl import logging
import jax
from jax.experimental import custom_partitioning
import jax.numpy as jnp
from jaxlib import version

Op = Callable[..., Any]

_SOURCE = Path(__file__).with_name("native.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
_DTYPES = (jnp.float32, jnp.bfloat16)

# What each op takes and gives, as dimensions. Work is divided over b alone;
# results without b are sums over it.
_OPS = {
  "depthwise": "b h w c, k l c -> b h w c",
  "depthwise_vjp": "b h w c, k l c, b h w c -> b h w c, k l c",
  "pointwise": "b h w c, c d -> b h w d",
  "pointwise_vjp": "b h w c, c d, b h w d -> b h w c, c d",
  "moments": "b h w c, c -> b c, b c",
  "normalize": "b h w c, c, b c, b c, b h w c -> b h w c",
  "grad_sums": "b h w c, c, b c, b h w c -> b c, b c",
  "input_grad": "b h w c, c, b c, b c, b c, b h w c -> b h w c, b c",
}


def available(x: jax.Array) -> bool:
  """Whether the ops take arrays of x's type; builds them at the first call."""
  return x.dtype in _DTYPES and _library() is not None


def call(name: str, *args: jax.Array, **attributes) -> list[jax.Array]:
  """Calls an op of `native.cc`.

  Args:
    name: key of `_OPS`, which says the shapes.
    *args: images and kernels in float32 or bfloat16, the rest in float32.
    **attributes: integers and booleans.

  Returns:
    Its results, in the first argument's type, [B, C] in float32.
  """
  return _op(name, tuple(attributes.items()))(*args)


def dispatch(
  implementation: str, *args: jax.Array, native: Op, shift: Op, xla: Op
) -> Any:
  """Calls one of three functions that compute the same.

  Args:
    implementation: see `depthwise_conv`.
    *args: the functions' arguments.
    native: for CPUs, made of `call`s.
    shift: for CPUs without a compiler.
    xla: for all else.
  """
  if implementation in ("auto", "native") and not available(args[0]):
    native = shift
  if implementation == "auto":
    return jax.lax.platform_dependent(*args, cpu=native, default=xla)
  return {"native": native, "shift": shift, "xla": xla}[implementation](*args)


@functools.cache
def _op(name, attributes):
  target = f"convmixer_{name}_{_key()}"
  takes, gives = (
    [dims.split() for dims in side.split(",")]
    for side in _OPS[name].split("->")
  )
  spec = lambda dims, axes: jax.P(axes if dims[0] == "b" else None)

  @custom_partitioning.custom_partitioning
  def op(*args):
    size = {}
    for dims, arg in zip(takes, args, strict=True):
      size |= zip(dims, arg.shape, strict=True)
    results = [
      jax.ShapeDtypeStruct(
        [size[d] for d in dims],
        jnp.float32 if dims == ["b", "c"] else args[0].dtype,
      )
      for dims in gives
    ]
    return jax.ffi.ffi_call(target, results)(*args, **dict(attributes))

  def partition(mesh, args, results):
    del results
    axes = [*args[0].sharding.spec, None][0]

    def part(*args):
      return [
        result if dims[0] == "b" or axes is None else jax.lax.psum(result, axes)
        for dims, result in zip(gives, op.fun(*args))
      ]

    shard = lambda dims: jax.NamedSharding(mesh, spec(dims, axes))
    return mesh, part, [*map(shard, gives)], tuple(map(shard, takes))

  whole = dict.fromkeys(d for dims in takes for d in dims if d != "b")
  op.def_partition(
    partition,
    sharding_rule=_OPS[name],
    need_replication_factors=tuple(whole),
  )

  @jax.custom_batching.custom_vmap
  def with_vmap(*args):
    return op(*args)

  @with_vmap.def_vmap
  def _(axis_size, is_batched, *args):
    args = [
      arg if batched else jnp.broadcast_to(arg, (axis_size, *arg.shape))
      for arg, batched in zip(args, is_batched)
    ]
    if all(dims[-1] == "c" for dims in takes):
      # Channels are all treated alike: more of them.
      merge = lambda x: x.reshape(*x.shape[:-2], -1)
      split = lambda x: x.reshape(*x.shape[:-1], axis_size, -1)
      merged = [merge(jnp.moveaxis(x, 0, -2)) for x in args]
      results = [jnp.moveaxis(split(y), -2, 0) for y in with_vmap(*merged)]
    else:
      results = jax.lax.map(lambda args: with_vmap(*args), args)
    return results, [True] * len(results)

  return with_vmap


# --- The library.


@functools.cache
def _library() -> ctypes.CDLL | None:
  """Loads the ops, and says in one line why they could not be."""
  try:
    library = ctypes.CDLL(str(_build()))
  except (OSError, subprocess.SubprocessError) as e:
    output = getattr(e, "stderr", None) or str(e)
    logging.warning(
      "plain XLA runs the depthwise convolutions, which takes several times as"
      " long: the C++ of ops/native.cc did not build (%s). It needs a compiler,"
      " from `apt-get install g++` for instance, or named by CXX.",
      output.strip().splitlines()[-1] if output.strip() else type(e).__name__,
    )
    return None
  for name in _OPS:
    jax.ffi.register_ffi_target(
      f"convmixer_{name}_{_key()}",
      jax.ffi.pycapsule(getattr(library, f"convmixer_{name}")),
      platform="cpu",
    )
  return library


def _compiler() -> list[str]:
  if command := os.environ.get("CXX"):
    return shlex.split(command)
  for name in ("c++", "g++", "clang++"):
    if path := shutil.which(name):
      return [path]
  raise FileNotFoundError("no C++ compiler is installed")


@functools.cache
def _key() -> str:
  """Of all that the library is made of and for."""
  compiler = subprocess.run(
    [*_compiler(), "--version"], capture_output=True, text=True, check=True
  )
  parts = [
    _SOURCE.read_text(),
    *_FLAGS,
    *_compiler(),
    compiler.stdout,
    platform.machine(),
    _cpu_features(),
    version.__version__,
  ]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return "".join(sorted({x for x in lines if x.lower().startswith(
    ("model name", "flags", "features"))}))  # fmt: skip


def _build() -> Path:
  """The library's file, from the user's cache where it is there."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = Path(cache) / "convmixer_jax"
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    usable = os.access(folder, os.W_OK)
  except OSError:
    usable = False
  if not usable:
    folder = Path(tempfile.mkdtemp(prefix="convmixer_jax_"))
  path = folder / f"native-{_key()}.so"
  if path.exists():
    return path
  # Other processes may be building it too: the last to finish wins.
  with tempfile.TemporaryDirectory(dir=folder) as build:
    built = os.path.join(build, path.name)
    include = ["-isystem", jax.ffi.include_dir()]
    subprocess.run(
      [*_compiler(), *_FLAGS, *include, str(_SOURCE), "-o", built],
      capture_output=True,
      text=True,
      check=True,
    )
    os.replace(built, path)
  return path
