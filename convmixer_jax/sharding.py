"""One mesh axis, `data`: parameters replicated, batches sharded."""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """`devices` (None: all, of all processes) along one axis named `data`."""
  return Mesh(np.array(devices or jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis is split across the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this process supplies, ascending.

  Args:
    mesh: from `make_mesh`.
    batch_size: of the global batch; a multiple of the number of devices.
  """
  shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = np.arange(batch_size)
  return np.sort(np.concatenate([rows[index] for index in shards.values()]))


@functools.cache
def _place(sharding):
  return jax.jit(lambda batch: batch, out_shardings=sharding)


def to_global(
  mesh: Mesh, local: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
  """Joins the rows of all processes into global arrays, sharded by batch.

  Args:
    mesh: from `make_mesh`.
    local: arrays whose leading axis holds the rows of `local_rows`.
    batch_size: of the global batch.
  """
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    # jit's own transfer takes a sixth of device_put's time.
    with jax.transfer_guard_host_to_device("allow"):
      return _place(sharding)(local)
  return {
    name: jax.make_array_from_process_local_data(
      sharding, array, (batch_size, *array.shape[1:])
    )
    for name, array in local.items()
  }
