"""Checkpoints of the train state; the only file that names orbax.

A checkpoint holds arrays in orbax's format, JSON, and a checksum of every
array. Reading one executes nothing that is in it.
"""

import logging as std_logging
import os
from pathlib import Path
import sys
from typing import Any
import zlib

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from convmixer_jax import files
from convmixer_jax import models
from convmixer_jax.errors import UserError
from convmixer_jax.files import damage
from convmixer_jax.files import writing
from convmixer_jax.step import TrainState

KEEP = 3  # Number of checkpoints; older ones are deleted.

# orbax also logs the errors that it raises, with tracebacks and whole files.
# asyncio logs those that nobody waited for.
logging.get_absl_logger().addFilter(
  lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname
)
std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)


class Checkpointer:
  """Saves and restores states under `workdir`/checkpoints.

  Checkpoints are written in the background while training continues. Each gets
  its final name when it is complete, so that killing the process while it
  writes one leaves the previous one intact. That one is on the disk before the
  next is begun, so that a power failure leaves it too. Scanned blocks are saved
  as unrolled ones; a run may resume with either.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._directory = _directory(workdir)
    with writing(self._directory, ValueError, RuntimeError):
      self._manager = _manager(
        workdir, max_to_keep=KEEP, cleanup_tmp_directories=True
      )

  def save(self, step: int, state: TrainState) -> None:
    """Starts to write a checkpoint, unless there is one of `step`.

    Raises UserError if this or the previous checkpoint cannot be written.
    """
    if step == self._manager.latest_step():
      return
    # orbax would silently create it again.
    if isinstance(self._directory, Path) and not self._directory.is_dir():
      raise UserError(
        f"{self._directory}: no longer exists; check that the disk is mounted"
      )
    state = jax.jit(models.unstack_blocks)(state)
    with writing(self._directory, ValueError, RuntimeError):
      self._finish()
      # The log must not lack records of a step that is saved.
      files.sync(self._directory.with_name("metrics.jsonl"))
      self._manager.save(
        step,
        args=ocp.args.StandardSave(state),
        custom_metadata={"crc32": _checksums(state)},
      )

  def save_only(self, step: int, state: TrainState) -> None:
    """As `save`; waits for the disk, and then removes all other checkpoints.

    `step` must be later than theirs.
    """
    self.save(step, state)
    with writing(self._directory, ValueError, RuntimeError):
      self._finish()
      for other in self._manager.all_steps():
        if other != step:
          self._manager.delete(other)

  def _finish(self):
    """Waits until the last checkpoint is written, and forces it to the disk."""
    self._manager.wait_until_finished()
    step = self._manager.latest_step()
    on_disk = isinstance(self._directory, Path)
    if jax.process_index() == 0 and step is not None and on_disk:
      folder = self._directory / str(step)
      files.sync(*folder.rglob("*"), folder, *folder.parents[:3])

  def restore(self, template: TrainState) -> TrainState | None:
    """The newest state, with `template`'s structure and sharding, or None.

    Moves newer checkpoints that are damaged to `workdir`/damaged, with a
    warning, so that the run can save their steps again. A checkpoint is damaged
    if in every process its files can be read and do not hold what was saved.
    Raises UserError if no checkpoint can be read, they are of another model, or
    reading fails for another reason.
    """
    with (
      files.reading(self._directory),
      _reader(self._directory.parent) as manager,
    ):
      state, damaged = _newest(manager, template, manager.all_steps())
    for step, problem in damaged.items():
      moved = self._set_aside(step)
      if jax.process_index() == 0:
        print(
          f"warning: the checkpoint of step {step} is damaged ({problem});"
          f" moved it to {moved}; using the previous one",
          file=sys.stderr,
        )
    return state

  def _set_aside(self, step):
    folder = self._directory.with_name("damaged")
    path = folder / str(step)
    if jax.process_index() == 0:
      with writing(self._directory, ValueError, RuntimeError):
        folder.mkdir(exist_ok=True)
        number = 0
        while path.exists():
          number += 1
          path = folder / f"{step}.{number}"
        files.move_folder(self._directory / str(step), path)
    multihost_utils.sync_global_devices("set aside")
    with files.reading(self._directory):
      self._manager.reload()
    return path

  def preempted(self, step: int) -> bool:
    """Whether the cluster has asked a run of several processes to stop.

    All processes must call this at every step; all get the same answer. It is
    always False for a single process, which handles signals itself.
    """
    return self._manager.reached_preemption(step)

  def close(self) -> None:
    """Waits until the last checkpoint is written; raises as `save` does."""
    with writing(self._directory, ValueError, RuntimeError):
      self._finish()
      self._manager.close()


def restore(
  workdir: str | os.PathLike, template: TrainState, before: int
) -> TrainState | None:
  """As `Checkpointer.restore`, of the steps before `before`. Read-only."""
  if latest_step(workdir) is None:
    return None
  folder = _directory(workdir)
  with files.reading(folder), _reader(workdir) as manager:
    steps = [step for step in manager.all_steps() if step < before]
    return _newest(manager, template, steps)[0]


def latest_step(workdir: str | os.PathLike) -> int | None:
  """The newest checkpoint's step; None if there is none. Read-only."""
  directory = _directory(workdir)
  try:
    names = [path.name for path in directory.iterdir()]
    steps = sorted(int(name) for name in names if name.isdecimal())
    while steps and not _is_complete(directory / str(steps[-1])):
      steps.pop()
  except (FileNotFoundError, NotADirectoryError):
    steps = []
  except OSError as e:
    raise UserError(f"{directory}: {e.strerror}") from e
  return steps[-1] if steps else None


def _is_complete(folder):
  """On a disk orbax gives a folder its name at the end."""
  in_gcs = not isinstance(folder, Path) and folder.scheme == "gs"
  return not in_gcs or (folder / "commit_success.txt").exists()


def load_variables(workdir: str | os.PathLike) -> dict[str, Any]:
  """The newest checkpoint's params and batch_stats, as numpy arrays.

  If the run kept moving averages of them (EMA), those are returned. Raises
  UserError if the checkpoint is damaged.
  """
  state = _load(workdir)
  state = state.get("ema") or state
  return {name: state[name] for name in ("params", "batch_stats")}


def load_state(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
  """As `load_variables`, all arrays, by name such as 'params/stem/bias'."""
  return _named(_load(workdir))


def _load(workdir):
  path = _directory(workdir) / str(latest_step(workdir))
  jax.devices()  # A platform that is missing is no damage.
  try:
    with _reader(workdir, ocp.PyTreeCheckpointHandler) as manager:
      step = int(path.name)
      as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
      tree = manager.item_metadata(step).tree
      tree = jax.tree.map(lambda _: as_numpy, tree)
      args = ocp.args.PyTreeRestore(restore_args=tree)
      state = manager.restore(step, args=args)
      problem = _difference(manager, step, state)
  except Exception as e:  # orbax raises anything for a damaged file.
    state, problem = {}, e
  if problem:
    raise UserError(
      f"{path}: is damaged ({damage(path, problem)}); rerun the training"
      " command, which resumes from the previous checkpoint"
    )
  return state


def _directory(workdir):
  return files.absolute(workdir) / "checkpoints"


def _manager(workdir, handler=ocp.StandardCheckpointHandler, **options):
  return ocp.CheckpointManager(
    str(_directory(workdir)),
    item_handlers=handler(),
    options=ocp.CheckpointManagerOptions(**options),
  )


def _reader(workdir, handler=ocp.StandardCheckpointHandler):
  """A manager with which each process reads by itself and waits for none."""
  process = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=process,
    active_processes={process},
    barrier_sync_key_prefix=f"process_{process}",
  )
  return _manager(workdir, handler, create=False, multiprocessing_options=alone)


def _newest(manager, template, steps):
  """The newest readable state, and {step: problem} of newer checkpoints."""
  damaged = {}
  steps = sorted(steps)
  # Process 0 says which is next: another may not see its files yet.
  newest = lambda: np.int32(steps.pop() if steps else -1)
  while (step := int(multihost_utils.broadcast_one_to_all(newest()))) >= 0:
    state, problem = _read(manager, template, step)
    if not problem:
      if "blocks" in template.params:
        state = jax.jit(models.stack_blocks)(state)
      return state, damaged
    damaged[step] = problem
  if damaged:
    step = max(damaged)
    raise UserError(
      f"{manager.directory}: no checkpoint can be read; the newest, of step"
      f" {step}: {damaged[step]}"
    )
  return None, damaged


def _read(manager, template, step):
  """The state as saved, of unrolled blocks, and what is wrong with it or ''.

  All processes get the same answer, or each raises UserError.
  """
  path, failure = files.path(manager.directory) / str(step), None
  state, problem = None, ""
  try:
    state, problem = _read_alone(manager, template, step)
    problem = problem and damage(path, problem)
  except UserError as e:
    failure = e
  verdict = 2 if failure else 1 if problem else 0
  verdicts = multihost_utils.process_allgather(np.int32(verdict)).ravel()
  if failure:
    raise failure
  if len({*verdicts}) > 1:
    which = ", ".join(str(i) for i in np.flatnonzero(verdicts))
    raise UserError(
      f"{path}: cannot be read in process {which}, but in others it can; check"
      " that all hosts see the same files. Nothing was moved"
    )
  return state, problem


def _read_alone(manager, template, step):
  """The state and a text or exception; UserError if it is another model's."""
  saved = jax.tree.map(
    lambda x: x.update(sharding=template.step.sharding),
    jax.eval_shape(models.unstack_blocks, template),
  )
  try:
    there = _named(manager.item_metadata(step))
  except Exception as e:  # orbax raises anything for a damaged file.
    return None, e
  if not there:
    return None, "metadata missing"
  here = _named(saved)
  for name in sorted(there.keys() | here.keys()):
    shapes = [
      tuple(tree[name].shape) if name in tree else "absent"
      for tree in (there, here)
    ]
    if shapes[0] != shapes[1]:
      raise UserError(
        f"{manager.directory / str(step)}: {name} is {shapes[0]} in the"
        f" checkpoint and {shapes[1]} in this config"
      )
  try:
    state = manager.restore(step, args=ocp.args.StandardRestore(saved))
    return state, _difference(manager, step, state)
  except Exception as e:
    return None, e


def _named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _checksums(state):
  """{name: CRC-32} of all arrays; orbax does not detect a changed bit."""
  return {
    name: zlib.crc32(np.ascontiguousarray(array))
    for name, array in _named(jax.device_get(state)).items()
  }


def _difference(manager, step, state):
  """How `state` differs from what was saved; '' if it does not."""
  metadata = manager.metadata(step)
  if metadata.init_timestamp_nsecs is None:
    return "metadata missing"
  wanted = metadata.custom_metadata.get("crc32")
  if wanted is None:  # Saved before there were checksums.
    return ""
  got = _checksums(state)
  wrong = [k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k)]
  return f"{min(wrong)} does not match its checksum" if wrong else ""
