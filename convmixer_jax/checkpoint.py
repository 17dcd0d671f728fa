"""Checkpoints of the train state; the only file that names orbax."""

import os
from typing import Any
from typing import cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from convmixer_jax import models
from convmixer_jax.step import TrainState

KEEP = 3  # The newest ones.


class Checkpointer:
  """Saves and restores states under `workdir`/checkpoints.

  Writing goes on in the background while training continues; a checkpoint
  appears under its final name only when it is whole, so a process killed while
  writing leaves the one before. What is written is the state of an unrolled
  model, whether the model scans its blocks or not: a run may go on either way.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._manager = ocp.CheckpointManager(
      _directory(workdir),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=KEEP, cleanup_tmp_directories=True
      ),
    )

  def save(self, step: int, state: TrainState) -> None:
    """Starts to write, unless `step` is saved already."""
    if step != self._manager.latest_step():
      state = jax.jit(models.unstack_blocks)(state)
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, template: TrainState) -> TrainState | None:
    """The newest state, with `template`'s structure and sharding; or None."""
    step = self._manager.latest_step()
    if step is None:
      return None
    saved = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=template.step.sharding
      ),
      jax.eval_shape(models.unstack_blocks, template),
    )
    args = ocp.args.StandardRestore(saved)
    state = cast(TrainState, self._manager.restore(step, args=args))
    if "blocks" in template.params:
      state = jax.jit(models.stack_blocks)(state)
    return state

  def preempted(self, step: int) -> bool:
    """Whether the cluster asks a run of several processes to stop.

    All processes must call it at every step, and all get the same answer. With
    one process it is always False: the signal comes to the process itself.
    """
    return self._manager.reached_preemption(step)

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()


def latest_step(workdir: str | os.PathLike) -> int | None:
  """The newest checkpoint's step; None if there is none. Writes nothing."""
  directory = _directory(workdir)
  names = os.listdir(directory) if os.path.isdir(directory) else []
  return max((int(name) for name in names if name.isdigit()), default=None)


def load_variables(workdir: str | os.PathLike) -> dict[str, Any]:
  """The newest checkpoint's params and batch_stats, as numpy.

  Their moving averages, if the run kept them.
  """
  with ocp.CheckpointManager(
    _directory(workdir), item_handlers=ocp.PyTreeCheckpointHandler()
  ) as manager:
    step = manager.latest_step()
    saved = manager.item_metadata(step).tree
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
    )
    state = manager.restore(
      step, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
    )
  state = state.get("ema") or state
  return {name: state[name] for name in ("params", "batch_stats")}


def _directory(workdir):
  return os.path.join(os.path.abspath(workdir), "checkpoints")
