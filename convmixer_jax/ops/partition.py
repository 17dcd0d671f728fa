"""Operations on images that run on each device's share of a batch."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import contextvars
import math
from typing import Any

import jax
from jax.experimental import custom_partitioning
import jax.numpy as jnp

from convmixer_jax.ops import derivative

_mesh = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def over(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Within this context, batches lie on the axis `data` of a mesh.

  The kernels for TPUs need it to run on each device's images.
  """
  token = _mesh.set(mesh)
  try:
    yield
  finally:
    _mesh.reset(token)


def device() -> Any:
  """A device that programs are traced for: of `over`'s mesh, or of JAX's."""
  mesh = _mesh.get()
  return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def on_gpu() -> bool:
  """Whether the program being traced is for GPUs."""
  return device().platform == "gpu"


def on_shards(rule: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Like `over_images`, for TPUs, whose compiler has no custom_partitioning.

  Arguments and results with a dimension n are sharded as `over` says. Without
  it, or if the batch does not divide, each device computes all of it.
  """
  spec = lambda dims: jax.P(*("data" if d == "n" else None for d in dims))
  takes, gives = (
    tuple(spec(dims.split()) for dims in side.split(","))
    for side in rule.split("->")
  )

  def call(*args):
    mesh = _mesh.get()
    batch = args[0].shape[takes[0].index("data")]
    if mesh is None or mesh.size == 1 or batch % mesh.size:
      return function(*args)
    op = jax.shard_map(
      function, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False
    )
    return op(*args)

  return call


def by_device(x: jax.Array) -> jax.Array:
  """[B, ...] -> [n, B / n, ...]: a part for each device, if B divides.

  Each device sums its own images, and XLA adds the sums.
  """
  mesh = _mesh.get()
  count = jax.device_count() if mesh is None else mesh.size
  parts = math.gcd(len(x), count)
  return x.reshape(parts, len(x) // parts, *x.shape[1:])


def over_images(rule: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function of arrays one that can be sharded and vmapped.

  XLA cannot look into it, so each device calls it with the images that it has.

  Args:
    rule: the dimensions of arguments and results: 'n h w c, k l c -> n h w c'.
      Only n is sharded, the same dimension in all: images, or parts [n, b] of
      a batch, each with the kernel's gradient of its own images. No result is
      a sum over n, which would count what XLA pads a device's share with.
    function: arrays -> list of arrays.
  """
  split = lambda side: [dims.split() for dims in side.split(",")]
  takes, gives = map(split, rule.split("->"))

  @custom_partitioning.custom_partitioning
  def op(*args):
    return function(*args)

  def partition(mesh, args, results):
    # XLA may divide any dimension, also along a part of a mesh axis, which has
    # no name. n stays divided as it is, and the others are not.
    del results
    hlo = args[0].sharding._to_xla_hlo_sharding(args[0].ndim)
    n, count = takes[0].index("n"), 1
    if not hlo.is_replicated():
      count = hlo.tile_assignment_dimensions()[n]
    devices = hlo.tile_assignment_devices() or [0]
    shape = count, len(devices) // count
    shard = lambda dims: jax.NamedSharding(
      jax.sharding.AbstractMesh(shape, ("n", "copies")),
      jax.P(*("n" if d == "n" else None for d in dims)),
      _logical_device_ids=tuple(devices),
    )
    return mesh, op.fun, [*map(shard, gives)], tuple(map(shard, takes))

  not_sharded = dict.fromkeys(d for dims in takes for d in dims if d != "n")
  op.def_partition(
    partition,
    sharding_rule=rule,
    need_replication_factors=tuple(not_sharded),
    decode_shardings=False,
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
      # Every channel is computed on its own, so that the mapped axis can become
      # more channels: one call instead of `axis_size`.
      merge = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
      unmerge = lambda y: y.reshape(*y.shape[:-1], axis_size, -1)
      results = with_vmap(*map(merge, args))
      results = [jnp.moveaxis(unmerge(y), -2, 0) for y in results]
    else:
      results = jax.lax.map(lambda args: with_vmap(*args), args)
    return results, [True] * len(results)

  return lambda *args: derivative.varying((args, with_vmap(*args)))[1]
