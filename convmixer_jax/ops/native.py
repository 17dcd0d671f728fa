"""`native.cc`, built at first use, as functions of JAX arrays.

Each may be jitted, vmapped, scanned, and sharded over the batch; none is
differentiable by itself. They run on CPUs alone.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import contextvars
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
import threading
from typing import Any

from absl import logging
import jax
from jax.experimental import custom_partitioning
import jax.numpy as jnp
from jaxlib import version

Op = Callable[..., Any]

_SOURCE = Path(__file__).with_name("native.cc")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# The first that the compiler takes: x86 and Arm, others, any.
_TUNING = (["-march=native"], ["-mcpu=native"], [])
_DTYPES = (jnp.float32, jnp.bfloat16)
_LOCK = threading.Lock()
_portable = contextvars.ContextVar("portable", default=False)

IMPLEMENTATIONS = ("auto", "xla", "shift", "native")

# What each op takes and gives, as dimensions. Work is divided over b alone;
# results without b are sums over it. A residual that there is not may be of any
# size (e).
_OPS = {
  "depthwise": "b h w c, k l c -> b h w c",
  "depthwise_norm": "b h w c, k l c, c, c, c, b h w c -> b h w c",
  "depthwise_vjp": "b h w c, k l c, b h w c -> b h w c, k l c",
  "pointwise": "b h w c, c d -> b h w d",
  "pointwise_norm": "b h w c, c d, d, d, d, b h w e -> b h w d",
  "pointwise_vjp": "b h w c, c d, b h w d -> b h w c, c d",
  "moments": "b h w c, c -> b c, b c",
  "normalize": "b h w c, c, b c, b c, b h w c -> b h w c",
  "grad_sums": "b h w c, c, b c, b h w c -> b c, b c",
  "input_grad": "b h w c, c, b c, b c, b c, b h w c -> b h w c, b c",
}


def available(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether the ops take arrays of x's type; builds them at the first call."""
  if x.dtype not in _DTYPES or _portable.get():
    return False
  with _LOCK:
    return _library() is not None


def chosen(implementation: str | None, dtype: Any) -> str:
  """What `dispatch` runs for arrays of `dtype` on the default backend.

  'native', 'shift' or 'xla', for an implementation as in `depthwise_conv`.
  """
  if implementation not in (None, "auto", "native"):
    return implementation
  if implementation != "native" and jax.default_backend() != "cpu":
    return "xla"
  return "native" if available(jax.ShapeDtypeStruct((), dtype)) else "shift"


@contextlib.contextmanager
def portable() -> Iterator[None]:
  """What is traced inside is plain XLA, and runs without this code."""
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)


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

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r}: must be one of {IMPLEMENTATIONS}"
    )
  # With a GPU there, nobody waits for a compiler that would serve the CPU only.
  if chosen(implementation, args[0].dtype) != "native":
    native = shift
  if implementation == "auto":
    return jax.lax.platform_dependent(*args, cpu=native, default=xla)
  return {"native": native, "shift": shift, "xla": xla}[implementation](*args)


def bilinear(
  name: str, xla: Op, shift: Op | None = None, shift_vjp: Op | None = None
) -> Op:
  """An op of two arrays that is linear in each, differentiable in both.

  Args:
    name: of `native.cc`'s op; NAME_vjp takes the gradient too, and gives both.
    xla: the same in XLA, which jax differentiates.
    shift: see `dispatch`; default: `xla`.
    shift_vjp: x, kernel, gradient -> the gradients; default: jax's.

  Returns:
    (implementation, x, kernel) -> y; see `dispatch`.
  """
  shift = shift or xla

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def op(implementation, *args):
    return dispatch(
      implementation,
      *args,
      native=lambda *args: call(name, *args)[0],
      shift=shift,
      xla=xla,
    )

  def vjp(function):
    return lambda x, kernel, grad: jax.vjp(function, x, kernel)[1](grad)

  def backward(implementation, args, grad):
    return dispatch(
      implementation,
      *args,
      grad,
      native=lambda *args: tuple(call(f"{name}_vjp", *args)),
      shift=shift_vjp or vjp(shift),
      xla=vjp(xla),
    )

  op.defvjp(lambda implementation, *args: (op(implementation, *args), args),
            backward)  # fmt: skip
  return op


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
    if 0 in size.values():  # What is summed over nothing, if anything.
      return [jnp.zeros(result.shape, result.dtype) for result in results]
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
    library = _load()
  except (OSError, ValueError, subprocess.SubprocessError) as e:
    output = getattr(e, "stderr", None) or str(e)
    lines = output.strip().splitlines() or [type(e).__name__]
    logging.warning(
      "plain XLA runs the depthwise convolutions, which takes several times as"
      " long: the C++ of ops/native.cc did not build (%s). It needs a compiler,"
      " from `apt-get install g++` for instance, or named by CXX.",
      next((line for line in lines if "error" in line), lines[-1]),
    )
    return None
  for name in _OPS:
    jax.ffi.register_ffi_target(
      f"convmixer_{name}_{_key()}",
      jax.ffi.pycapsule(getattr(library, f"convmixer_{name}")),
      platform="cpu",
    )
  return library


def _load() -> ctypes.CDLL:
  # The cache may be full, or on a file system that runs nothing.
  if (cache := cache_folder()) is not None:
    with contextlib.suppress(OSError):
      return ctypes.CDLL(str(_cached(cache)))
  with tempfile.TemporaryDirectory(prefix="convmixer_jax_") as folder:
    return ctypes.CDLL(str(_build(folder)))


def cache_folder() -> Path | None:
  """The user's own folder, in which no one else can leave a library.

  None where there is none that can be written.
  """
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = Path(cache) / "convmixer_jax"
  if not folder.is_absolute():  # There is no home.
    return None
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
  except OSError:
    return None
  own = stat.st_uid == os.getuid() and not stat.st_mode & 0o022
  return folder if own and os.access(folder, os.W_OK) else None


def _cached(cache: Path) -> Path:
  """The library's file, built unless it is there and whole."""
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  for path in cache.glob(f"native-{_key()}-*.so"):
    if path.stem.endswith(f"-{digest(path)}"):
      return path
  # Other processes may be building it too: each leaves a whole one.
  with tempfile.TemporaryDirectory(dir=cache) as folder:
    built = _build(folder)
    path = cache / f"native-{_key()}-{digest(built)}.so"
    return built.replace(path)


def _build(folder: str) -> Path:
  path = Path(folder) / "native.so"
  command = [*_compiler(), *_FLAGS, "-isystem", jax.ffi.include_dir(),
             str(_SOURCE), "-o", str(path)]  # fmt: skip
  for tuning in _TUNING:
    result = _run([*command, *tuning])
    if result.returncode == 0:
      return path
  raise subprocess.CalledProcessError(
    result.returncode, command, stderr=result.stderr
  )


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


@functools.cache
def _key() -> str:
  """Of all that the library is made of and for."""
  compiler = _run([*_compiler(), "--version"])
  compiler.check_returncode()
  parts = [
    _SOURCE.read_text(),
    *_FLAGS,
    *itertools.chain(*_TUNING),
    *_compiler(),
    compiler.stdout,
    platform.machine(),
    cpu(),
    version.__version__,
  ]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu() -> str:
  """What the CPU is and can do."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  kinds = ("model name", "flags", "features")
  return "\n".join(sorted({x for x in lines if x.lower().startswith(kinds)}))
