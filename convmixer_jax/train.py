"""Training: `train_and_evaluate` reads from top to bottom."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import json
import os
from pathlib import Path
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convmixer_jax import augment
from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import evaluate as evaluate_lib
from convmixer_jax import logger as logger_lib
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax import UserError
from convmixer_jax import weights
from convmixer_jax.data import sources
from convmixer_jax.data import stream

AHEAD = 2  # Steps that the host may enqueue before the device has done them.


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> step_lib.TrainState:
  """Trains as `config` says; goes on where `workdir` has been left.

  Args:
    config: see `config.FIELDS`.
    workdir: see `logger.Logger`; a second call with the same config resumes, or
      says that the run is finished.

  Returns:
    The last state.

  Raises:
    UserError: something in `config` or `workdir` is not as it must be; nothing
      has been written.
    SystemExit: SIGTERM or SIGINT came, and the state is saved.
  """
  # --- Data. All that can be wrong is found before anything is written.
  config_lib.check(config, jax.device_count())
  _refuse_another_config(config, workdir, config_lib.FREE_FIELDS)
  data, batch_size, seed = config.data, config.batch_size, config.seed
  train_source, eval_source = (
    sources.open_source(data.name, data.dir, split, data.image_size)
    for split in (data.train_split, data.eval_split)
  )
  if [*train_source.class_names] != [*eval_source.class_names]:
    raise UserError(
      f"data.eval_split={data.eval_split}: its classes are not those of"
      f" data.train_split={data.train_split}"
    )
  steps_per_epoch = len(train_source) / batch_size
  total_steps = -(-config.epochs * len(train_source) // batch_size)
  due = lambda step, every: step % every == 0 or step == total_steps

  # --- Model and optimiser.
  model, shapes = _make_model(config, train_source.num_classes)
  schedule = optim.make_schedule(
    config.optim.schedule,
    config.optim.learning_rate,
    config.epochs,
    steps_per_epoch,
    config.optim.warmup_epochs,
  )
  tx = optim.make_optimizer(
    schedule,
    shapes["params"],
    config.optim,
    freeze=config.freeze,
    backbone_lr_scale=config.backbone_lr_scale,
  )

  # --- The step, compiled for all devices.
  mesh = sharding.make_mesh()
  replicated = sharding.replicated(mesh)
  host_crops = isinstance(train_source, sources.Encoded)
  train_step = jit_step(config, model, tx, mesh, crop=not host_crops)

  # --- State: what was saved here > the weights of another run > scratch.
  ema = config.ema_decay > 0
  init = lambda key: step_lib.init_state(key, model, tx, data.image_size, ema)
  state = jax.jit(init, out_shardings=replicated)(jax.random.key(seed))
  if config.init_from is not None and checkpoint.latest_step(workdir) is None:
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    loaded = _load_init_from(config, model, fresh, new_head=True)
    loaded = jax.device_put(loaded, replicated)
    # Copied: the step's donated buffers must not be one another.
    averages = jax.tree.map(jnp.copy, loaded) if ema else {}
    state = state.replace(ema=averages, **loaded)
  checkpointer = checkpoint.Checkpointer(_make_workdir(workdir))
  state = checkpointer.restore(state) or state
  first_step = int(state.step)
  if first_step > total_steps:
    raise UserError(
      f"{workdir}: is at step {first_step} of {total_steps}; its data changed"
    )
  scored = [
    record
    for record in logger_lib.read_metrics(workdir)
    if record["kind"] == "eval" and record["step"] == first_step
  ]
  if first_step == total_steps and scored:
    checkpointer.close()
    if jax.process_index() == 0:
      print(
        f"{workdir}: finished at step {first_step}; nothing to do\n"
        + logger_lib.eval_line(scored[-1])
      )
    return state

  # --- The loop. Step n means n updates done. A log waits for the device; other
  # steps wait for the one AHEAD before, so the device always has one to do.
  logger = logger_lib.Logger(
    workdir,
    config.to_json(indent=2),
    first_step=first_step,
    total_steps=total_steps,
    batch_size=batch_size,
    active=jax.process_index() == 0,
  )
  if first_step == 0:
    logger.classes(train_source.class_names)
    logger.overview(shapes["params"])
  else:
    logger.say(f"going on in {workdir} from step {first_step}")
  evaluate = _make_evaluate(
    config, model, eval_source, mesh, logger_lib.progress
  )
  batches = stream.train_batches(
    train_source,
    seed=seed,
    batch_size=batch_size,
    rows=sharding.local_rows(mesh, batch_size),
    start=first_step,
    stop=total_steps,
    image_size=data.image_size,
    num_workers=data.num_workers,
    max_unreadable=data.max_unreadable,
    scale=config.augment.crop_scale,
    ratio=config.augment.crop_ratio,
    interpolation=config.augment.interpolation,
  )
  learning_rate = jax.jit(lambda step: schedule(step - 1))
  status, step, pending, metrics = "failed", first_step, [], None
  try:
    with _stop_signals() as stopped:
      # A run that was stopped while it scored a step scores it now.
      if first_step and due(first_step, config.eval_every) and not scored:
        metrics = evaluate(state, stopped)
        logger.evaluated(step, metrics)
      batches = logger.timed(
        sharding.to_global(mesh, batch, batch_size)
        for batch in stream.until(stopped, batches)
      )
      for step, batch in enumerate(batches, start=first_step + 1):
        state, scalars = train_step(state, batch)
        pending.append(scalars)
        if len(pending) > AHEAD:
          pending[-1 - AHEAD]["loss"].block_until_ready()
        if step == first_step + 1:
          logger.start_clock(step)  # Compilation does not count in the rates.
        if due(step, config.log_every):
          logger.train(
            step,
            jax.device_get(pending),
            epoch=step / steps_per_epoch,
            learning_rate=float(jax.device_get(learning_rate(state.step))),
          )
          pending = []
        if due(step, config.eval_every):
          metrics = evaluate(state, stopped)
          logger.evaluated(step, metrics)
        if due(step, config.save_every):
          checkpointer.save(step, state)
          logger.start_clock(step)
        if checkpointer.preempted(step):
          break
      if step == total_steps and metrics is not None:
        status = "finished"
      else:
        checkpointer.save(step, state)
        status = "interrupted"
  finally:
    checkpointer.close()
    logger.close(status, step)
  if status == "interrupted":
    signum = stopped() or signal.SIGTERM
    logger.say(
      f"stopped by {signal.Signals(signum).name}: step {step} is saved in"
      f" {workdir}; the same command goes on from there"
    )
    raise SystemExit(128 + signum)
  logger.say(f"finished: {logger_lib.eval_line(metrics)}; workdir {workdir}")
  return state


def jit_step(
  config: ml_collections.ConfigDict,
  model: Any,
  tx: Any,
  mesh: jax.sharding.Mesh,
  *,
  crop: bool,
) -> Callable:
  """The train step of a run, jitted; it donates the state.

  Args:
    config: of the run.
    model: see `step.make_train_step`.
    tx: likewise.
    mesh: the devices, among which batches are cut.
    crop: whether the step crops, not the host.
  """
  replicated = sharding.replicated(mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  augment_fn = augment.make_augment(
    config.augment, mean=config.data.mean, std=config.data.std, crop=crop
  )

  def update(seed, state, batch):
    train_step = step_lib.make_train_step(
      model,
      tx,
      augment_fn,
      seed=seed,
      label_smoothing=config.augment.label_smoothing,
      accum_steps=config.accum_steps,
      ema_decay=config.ema_decay,
      batch_sharding=batch_sharding,
    )
    return train_step(state, batch)

  update = jax.jit(
    update,
    in_shardings=(replicated, replicated, batch_sharding),
    out_shardings=replicated,
    donate_argnames="state",
    compiler_options=(
      {"xla_gpu_deterministic_ops": True} if config.deterministic else None
    ),
  )
  # An argument, so that runs with other seeds find the program compiled.
  seed = jax.device_put(np.uint32(config.seed), replicated)
  return functools.partial(update, seed)


def evaluate_checkpoint(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> dict[str, Any]:
  """Scores weights on `config.data.eval_split`.

  Those of the newest checkpoint in `workdir`, or, where there is none, those
  that `config.init_from` names.

  Returns:
    step, None for `init_from`, and what `evaluate.make_evaluate` says.

  Raises:
    UserError: something in `config` or `workdir` is not as it must be.
  """
  config_lib.check(config, num_devices=None)
  # What the weights were trained for is fixed; how they are scored is free.
  fixed = ("model.", "data.image_size", "data.mean", "data.std")
  free = [name for name in config_lib.FIELDS if not name.startswith(fixed)]
  free += config_lib.FREE_FIELDS
  _refuse_another_config(config, workdir, free)
  step = checkpoint.latest_step(workdir)
  if step is None and config.init_from is None:
    raise UserError(
      f"--workdir={workdir}: holds no checkpoints, and config.init_from names"
      " no weights"
    )
  data = config.data
  source = sources.open_source(
    data.name, data.dir, data.eval_split, data.image_size
  )
  model, shapes = _make_model(config, source.num_classes)
  if step is None:
    variables = _load_init_from(config, model, shapes)
  else:
    variables = weights.fit(weights.load(workdir), shapes, str(workdir))
  mesh = sharding.make_mesh()
  variables = jax.device_put(variables, sharding.replicated(mesh))
  state = step_lib.TrainState(step=step, opt_state=(), **variables)
  evaluate = _make_evaluate(config, model, source, mesh, logger_lib.progress)
  metrics = evaluate(state)
  return metrics | {"step": step}


def _make_model(config, num_classes):
  """The model, and the shapes of its variables."""
  model = models.create_model(num_classes=num_classes, **config.model)
  return model, models.variable_shapes(model)


def _make_evaluate(config, model, source, mesh, progress):
  data = config.data
  return evaluate_lib.make_evaluate(
    step_lib.make_eval_step(model, augment.make_normalize(data.mean, data.std)),
    source,
    mesh,
    batch_size=config.batch_size,
    image_size=data.image_size,
    crop_pct=data.crop_pct,
    num_workers=data.num_workers,
    max_unreadable=data.max_unreadable,
    progress=progress,
  )


def _load_init_from(config, model, wanted, new_head=False):
  name = os.path.expanduser(config.init_from)
  try:
    loaded = weights.load(name)
    fitted = weights.fit(loaded, wanted, name, new_head=new_head)
  except UserError as e:
    raise UserError(f"config.init_from={e}") from e
  if not os.path.isdir(name):
    weights.warn_of_activation(loaded, model, name)
  return fitted


def _make_workdir(workdir):
  try:
    Path(workdir).mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}: {e.filename}") from e
  return workdir


def _refuse_another_config(config, workdir, may_differ):
  """Two configs in one workdir would make neither reproducible."""
  if "://" in str(workdir):
    raise UserError(
      f"--workdir={workdir}: must be on a file system; mount the bucket"
    )
  path = Path(workdir) / "config.json"
  if not path.exists():
    return
  old, new = (
    config_lib.flatten(json.loads(text))
    for text in (path.read_text(), config.to_json())
  )
  changed = [
    f"{name} is {old.get(name)} there and {new.get(name)} here"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name) and name not in may_differ
  ]
  if changed:
    raise UserError(
      f"{workdir} holds a run of another config ({'; '.join(changed)}); give"
      " another --workdir"
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
  """Turns SIGINT and SIGTERM into a question: which has come, or 0.

  A second Ctrl-C stops at once. With several processes SIGTERM is left to jax,
  which makes all of them stop at the same step (`Checkpointer.preempted`), and
  SIGINT becomes SIGTERM.
  """
  received = []

  def note(signum, frame):
    del frame
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      received.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  signals = [signal.SIGINT, signal.SIGTERM][: 1 + (jax.process_count() == 1)]
  if threading.current_thread() is not threading.main_thread():
    signals = []  # Python allows no other thread to handle them.
  previous = {signum: signal.signal(signum, note) for signum in signals}
  try:
    yield lambda: received[0] if received else 0
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)
