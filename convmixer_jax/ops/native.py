"""Calls of native.cc's and augment.cc's functions on JAX arrays, for CPUs.

`call` runs one op. It can be jitted, vmapped, scanned, and sharded over the
batch, but not differentiated. `dispatch` chooses between native.cc and plain
XLA. `bilinear` makes a differentiable op of the two. `build` compiles the
library.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import contextvars
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp

from convmixer_jax.ops import build
from convmixer_jax.ops import cuda
from convmixer_jax.ops import derivative
from convmixer_jax.ops import partition
from convmixer_jax.ops import tpu

Op = Callable[..., Any]

IMPLEMENTATIONS = (
  "auto",
  "xla",
  "shift",
  "native",
  "banded",
  "pallas",
  "cuda",
)

ACTIVATIONS = "identity", "relu", "gelu"  # Of native.cc, in its order.
_DTYPES = (jnp.float32, jnp.bfloat16)
_LOCK = threading.Lock()
_portable = contextvars.ContextVar("portable", default=False)

# The dimensions of each op's arguments and results: see `partition`. Without a
# residual, any array may stand in its place: the dimension e.
_OPS = {
  "depthwise": "n h w c, k l c -> n h w c",
  "depthwise_norm": "n h w c, k l c, c, c, c, n h w c -> n h w c",
  "depthwise_vjp": "n b h w c, k l c, n b h w c -> n b h w c, n k l c",
  "pointwise": "n h w c, c d -> n h w d",
  "pointwise_norm": "n h w c, c d, d, d, d, n h w e -> n h w d",
  "pointwise_vjp": "n b h w c, c d, n b h w d -> n b h w c, n c d",
  "moments": "n h w c, c -> n c, n c",
  "normalize": "n h w c, c, n c, n c, n h w c -> n h w c",
  "grad_sums": "n h w c, c, n c, n h w c -> n c, n c",
  "input_grad": "n h w c, c, n c, n c, n c, n h w c -> n h w c, n c",
  "stages": "n h w c, s n, s n, s n m, s n, c -> n h w c",
  "noise": "n h w c, n i, n, p j -> n h w c",
}
_IN_PLACE = ("noise",)  # The first argument's memory becomes the result's.


def available(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether native.cc's ops can run on x; the first call compiles them."""
  return x.dtype in _DTYPES and loaded()


def loaded() -> bool:
  """Whether there is a library of ops; the first call compiles it."""
  if _portable.get():
    return False
  with _LOCK:
    return _registered()


def on_cpu() -> bool:
  """Whether the program being traced is for CPUs, and there is a library."""
  return partition.device().platform == "cpu" and loaded()


@functools.cache
def _registered() -> bool:
  """Loads the library and registers its ops with XLA; False if it has none."""
  library = build.load()
  for name in _OPS if library else ():
    jax.ffi.register_ffi_target(
      _target(name),
      jax.ffi.pycapsule(getattr(library, f"convmixer_{name}")),
      platform="cpu",
    )
  return library is not None


def _target(name: str) -> str:
  """An op's name in XLA programs.

  It holds the library's key, so that XLA's cache of compiled programs does not
  return one that was compiled for another version of native.cc.
  """
  return f"convmixer_{name}_{build.key()}"


def chosen(
  implementation: str | None, dtype: Any, kernel_size: int | None = None
) -> str:
  """What runs on `partition.device()`: the name of a function of `dispatch`.

  Args:
    implementation: see `depthwise_conv`.
    dtype: of the images.
    kernel_size: of depthwise convolutions; None stands for other operations.

  Returns:
    One of `IMPLEMENTATIONS`, not 'auto'. 'pallas' and 'cuda' do not support all
    shapes.
  """
  platform = partition.device().platform
  auto = implementation in (None, "auto")
  if auto and kernel_size is not None and cuda.is_faster(dtype, kernel_size):
    implementation = "cuda"
  if implementation in ("xla", "shift", "banded"):
    return implementation
  if (implementation, platform) == ("pallas", "tpu") and tpu.available():
    return "pallas"
  if (implementation, platform) == ("cuda", "gpu") and cuda.available():
    return "cuda"
  if implementation != "native" and platform != "cpu":
    return "xla"
  return "native" if available(jax.ShapeDtypeStruct((), dtype)) else "shift"


@contextlib.contextmanager
def portable() -> Iterator[None]:
  """Within this context, programs are traced without native.cc.

  An exported program then runs on machines that do not have this library.
  """
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)


def widened(x: jax.Array) -> jax.Array:
  """x in the type of its sums: float32, or float64 if x is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def call(name: str, *args: jax.Array, **attributes) -> list[jax.Array]:
  """Calls an op of native.cc. Its shapes are in `_OPS`.

  A model's images and kernels are float32 or bfloat16 and its other arrays
  float32; augment.cc names its own. Images among the results have the first
  argument's dtype; other results are float32. The attributes are the op's
  integers and booleans.
  """
  return _op(name, tuple(attributes.items()))(*args)


def dispatch(
  implementation: str,
  *args: jax.Array,
  native: Op,
  shift: Op,
  xla: Op,
  **others: Op,
) -> Any:
  """Calls one of several functions that compute the same result.

  Args:
    implementation: see `depthwise_conv`.
    *args: the functions' arguments.
    native: for CPUs, in terms of `call`.
    shift: for CPUs where native.cc cannot be compiled.
    xla: for all other platforms.
    **others: those of 'banded', 'pallas' and 'cuda' that are not `xla`.

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r}: must be one of {IMPLEMENTATIONS}"
    )
  # On a GPU or TPU, `chosen` does not compile native.cc for 'auto': that would
  # be a wait for a library that only the CPU uses.
  choice = chosen(implementation, args[0].dtype)
  if choice != "native":
    native = shift
  if implementation in ("auto", "pallas", "cuda"):
    platforms = {"cpu": native}
    if implementation == "pallas" and implementation in others:
      # A new function each time: JAX would return what it traced of the same
      # one for another mesh. `plan` traces it on machines without TPUs.
      platforms["tpu"] = lambda *args: others[implementation](*args)
    if choice == "cuda" and choice in others:
      platforms["cuda"] = lambda *args: others[choice](*args)
    return jax.lax.platform_dependent(*args, **platforms, default=xla)
  functions = {"native": native, "shift": shift, **others}
  return functions.get(implementation, xla)(*args)


def bilinear(
  name: str,
  xla: Op,
  shift: Op | None = None,
  shift_vjp: Op | None = None,
  **others: tuple[Op, Op],
) -> Op:
  """Makes an op of two arrays that is linear in each, differentiable in both.

  Args:
    name: native.cc's op; its op NAME_vjp computes both gradients.
    xla: the same in XLA; JAX differentiates it.
    shift: see `dispatch`; `xla` by default.
    shift_vjp: (x, kernel, gradient of y) -> gradients of x and kernel; JAX's
      derivative of `shift` by default.
    **others: see `dispatch`; each with its derivative, like `shift_vjp`.

  Returns:
    (implementation, x, kernel) -> y; see `dispatch`.
  """
  shift = shift or xla
  plain_vjp = lambda f: lambda x, kernel, grad: jax.vjp(f, x, kernel)[1](grad)
  xla_vjp, shift_vjp = plain_vjp(xla), shift_vjp or plain_vjp(shift)
  call_op = lambda *args: call(name, *args)[0]
  other_ops, other_vjps = (
    {key: pair[i] for key, pair in others.items()} for i in range(2)
  )

  def call_vjp(x, kernel, grad):
    split = partition.by_device
    grad_x, sums = call(f"{name}_vjp", split(x), kernel, split(grad))
    return grad_x.reshape(x.shape), sums.sum(0).astype(kernel.dtype)

  # Both functions are linear in each argument, and vjp is the gradient of
  # <grad, op(x, kernel)>. So their derivatives are sums of themselves.
  op = derivative.differentiable(
    lambda static, *args: dispatch(
      static, *args, native=call_op, shift=shift, xla=xla, **other_ops
    ),
    lambda static, args, dots: (
      op(static, dots[0], args[1]) + op(static, args[0], dots[1])
    ),
    lambda static, args, _, grad: vjp(static, *args, grad),
  )
  vjp = derivative.differentiable(
    lambda static, *args: dispatch(
      static, *args, native=call_vjp, shift=shift_vjp, xla=xla_vjp, **other_vjps
    ),
    lambda static, args, dots: jax.tree.map(
      jnp.add,
      vjp(static, *dots[:2], args[2]),
      vjp(static, *args[:2], dots[2]),
    ),
    lambda static, args, _, grads: (
      *vjp(static, *grads, args[2]),
      op(static, grads[0], args[1]) + op(static, args[0], grads[1]),
    ),
  )
  return op


@functools.cache
def _op(name, attributes):
  """Returns an op as a function that can be sharded and vmapped."""
  split = lambda side: [dims.split() for dims in side.split(",")]
  takes, gives = map(split, _OPS[name].split("->"))

  def op(*args):
    size = {}
    for dims, arg in zip(takes, args, strict=True):
      size |= zip(dims, arg.shape, strict=True)
    results = [
      jax.ShapeDtypeStruct(
        [size[d] for d in dims],
        args[0].dtype if "h" in dims else jnp.float32,
      )
      for dims in gives
    ]
    if 0 in size.values():  # The results are empty, or sums over nothing.
      return [jnp.zeros(result.shape, result.dtype) for result in results]
    if "b" not in size:
      return ffi_call(results, args)
    results = [result.update(shape=result.shape[1:]) for result in results]
    parts = [
      [a[i] if dims[0] == "n" else a for dims, a in zip(takes, args)]
      for i in range(size["n"])
    ]
    return [*map(jnp.stack, zip(*(ffi_call(results, part) for part in parts)))]

  def ffi_call(results, args):
    call = jax.ffi.ffi_call(
      _target(name),
      results,
      input_output_aliases={0: 0} if name in _IN_PLACE else None,
    )
    return call(*args, **dict(attributes))

  return partition.over_images(_OPS[name], op)
