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
from convmixer_jax import ops
from convmixer_jax import optim
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError

AHEAD = 2  # Steps that the host may enqueue before the device has done them.


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  accept_changes: bool = False,
) -> step_lib.TrainState:
  """Trains as `config` says; goes on where `workdir` has been left.

  Args:
    config: see `config.FIELDS`.
    workdir: see `logger.Logger`; a second call with the same config resumes, or
      says that the run is finished.
    accept_changes: goes on though `workdir` holds another config.

  Returns:
    The last state.

  Raises:
    UserError: something in `config` or `workdir` is not as it must be; what is
      there is left whole.
    SystemExit: SIGTERM or SIGINT came, and the state is saved.
  """
  # --- Data. All that can be wrong is found before anything is written.
  config_lib.check(config, jax.device_count())
  changes = workdir_lib.config_changes(config, workdir, config_lib.FREE_FIELDS)
  if changes and not accept_changes:
    raise UserError(
      f"{workdir} holds a run of another config ({'; '.join(changes)}); give"
      " another --workdir, or go on all the same with --accept_changes"
    )
  data, batch_size = config.data, config.batch_size
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

  # --- Model, optimiser, and the step for all devices.
  model, shapes = make_model(config, train_source.num_classes)
  tx, schedule = make_optimizer(config, shapes, len(train_source))
  mesh = sharding.make_mesh()
  train_step = jit_step(config, model, tx, mesh, crop=crops(train_source))

  # --- State: what was saved here > the weights of another run > scratch.
  state = init_state(config, model, tx, mesh)
  if config.init_from is not None and checkpoint.latest_step(workdir) is None:
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    loaded = _load_init_from(config, model, fresh, new_head=True)
    loaded = jax.device_put(loaded, sharding.replicated(mesh))
    # Copied: the step's donated buffers must not be one another.
    averages = jax.tree.map(jnp.copy, loaded) if state.ema else {}
    state = state.replace(ema=averages, **loaded)

  with contextlib.ExitStack() as stack:
    stack.enter_context(workdir_lib.locked(workdir))
    checkpointer = checkpoint.Checkpointer(workdir)
    stack.callback(checkpointer.close)
    state = checkpointer.restore(state) or state
    step = first_step = int(state.step)
    if first_step > total_steps:
      raise UserError(
        f"{workdir}: is at step {first_step} of {total_steps}; its data changed"
      )
    scored = workdir_lib.read_eval(workdir, first_step)
    if first_step == total_steps and scored:
      if jax.process_index() == 0:
        print(
          f"{workdir}: finished at step {first_step}; nothing to do\n"
          + logger_lib.eval_line(scored)
        )
      return state

    # --- The files, and the programs: the loop itself compiles nothing, so that
    # no signal waits for the compiler.
    logger = logger_lib.Logger(
      workdir,
      config.to_json(indent=2),
      first_step=first_step,
      total_steps=total_steps,
      batch_size=batch_size,
      active=jax.process_index() == 0,
      changes=changes,
    )
    status = "failed"
    stack.callback(lambda: logger.close(status, step))
    if first_step == 0:
      logger.write_classes(train_source.class_names)
      logger.print_parameters(shapes["params"])
    else:
      logger.say(f"going on in {workdir} from step {first_step}")
    operations = ops.chosen(model.implementation, model.dtype)
    logger.say(f"convolutions and BatchNorm: {operations}")
    train_step = _compiled(train_step, state, mesh, config)
    evaluate = _make_evaluate(config, model, eval_source, mesh, state)
    learning_rate = jax.jit(lambda step: schedule(step - 1))

    # --- The loop. Step n means n updates done. A log or a save waits for the
    # device; other steps wait for the one AHEAD before, so that the device
    # always has one to do.
    pending, metrics = [], None

    def finite():
      """The metrics of the pending steps, if they are numbers."""
      scalars = jax.device_get(pending)
      for number, values in enumerate(scalars, step + 1 - len(pending)):
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
          checkpointer.close()  # What is being written is good.
          raise UserError(
            _nonfinite(config, workdir, train_source, number, values)
          )
      return scalars

    stopped = stack.enter_context(_stop_signals())
    # A run that was stopped while it scored a step scores it now.
    if first_step and due(first_step, config.eval_every) and not scored:
      metrics = evaluate(state, stopped)
      logger.log_eval(step, metrics)
    batches = stack.enter_context(
      contextlib.closing(
        train_batches(
          config, train_source, mesh, first_step, total_steps, stopped
        )
      )
    )
    logger.start_clock(step)
    for batch in logger.timed(
      sharding.to_global(mesh, batch, batch_size) for batch in batches
    ):
      state, scalars = train_step(state, batch)
      step += 1
      pending.append(scalars)
      if len(pending) > AHEAD:
        pending[-1 - AHEAD]["loss"].block_until_ready()
      if due(step, config.log_every):
        logger.log_train(
          step,
          finite(),
          epoch=step / steps_per_epoch,
          learning_rate=float(jax.device_get(learning_rate(state.step))),
        )
        pending = []
      if due(step, config.eval_every):
        metrics = evaluate(state, stopped)
        logger.log_eval(step, metrics)
      if due(step, config.save_every):
        finite()
        checkpointer.save(step, state)
        logger.start_clock(step)
      if checkpointer.preempted(step):
        break
    finished = step == total_steps and metrics is not None
    if not finished:
      finite()
      checkpointer.save(step, state)
    checkpointer.close()
    status = "finished" if finished else "interrupted"
  if not finished:
    signum = stopped() or signal.SIGTERM
    logger.say(
      f"stopped by {signal.Signals(signum).name}: step {step} is saved in"
      f" {workdir}; the same command goes on from there"
    )
    raise SystemExit(128 + signum)
  logger.say(f"finished: {logger_lib.eval_line(metrics)}; workdir {workdir}")
  return state


def make_model(
  config: ml_collections.ConfigDict, num_classes: int
) -> tuple[Any, Any]:
  """The model of a run, and the shapes of its variables."""
  model = models.create_model(num_classes=num_classes, **config.model)
  return model, models.variable_shapes(model)


def make_optimizer(
  config: ml_collections.ConfigDict, shapes: Any, num_images: int
) -> tuple[Any, Callable]:
  """The optimiser of a run, and its schedule: updates done -> learning rate.

  Args:
    config: of the run.
    shapes: of the model's variables.
    num_images: in an epoch.
  """
  schedule = optim.make_schedule(
    config.optim.schedule,
    config.optim.learning_rate,
    config.epochs,
    num_images / config.batch_size,
    config.optim.warmup_epochs,
  )
  tx = optim.make_optimizer(
    schedule,
    shapes["params"],
    config.optim,
    freeze=config.freeze,
    backbone_lr_scale=config.backbone_lr_scale,
  )
  return tx, schedule


def init_state(
  config: ml_collections.ConfigDict, model: Any, tx: Any, mesh: Any
) -> step_lib.TrainState:
  """The state that a run begins with from scratch, on all devices."""
  ema = config.ema_decay > 0
  init = lambda key: step_lib.init_state(
    key, model, tx, config.data.image_size, ema
  )
  init = jax.jit(init, out_shardings=sharding.replicated(mesh))
  return init(jax.random.key(config.seed))


def train_batches(
  config: ml_collections.ConfigDict,
  source: sources.Source,
  mesh: Any,
  start: int,
  stop: int,
  stopped: Callable[[], object] = lambda: False,
) -> Iterator[stream.Batch]:
  """This process's part of a run's batches; see `stream.train_batches`."""
  data = config.data
  return stream.train_batches(
    source,
    seed=config.seed,
    batch_size=config.batch_size,
    rows=sharding.local_rows(mesh, config.batch_size),
    start=start,
    stop=stop,
    image_size=data.image_size,
    num_workers=data.num_workers,
    max_unreadable=data.max_unreadable,
    stopped=stopped,
    scale=config.augment.crop_scale,
    ratio=config.augment.crop_ratio,
    interpolation=config.augment.interpolation,
  )


def batch_shapes(
  config: ml_collections.ConfigDict, mesh: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """What a batch of a run looks like on all devices."""
  size = config.data.image_size
  like = functools.partial(
    jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh)
  )
  return {
    "image": like((config.batch_size, size, size, 3), np.uint8),
    "label": like((config.batch_size,), np.int32),
  }


def crops(source: sources.Source) -> bool:
  """Whether the step crops the images, for the host does not."""
  return not isinstance(source, sources.Encoded)


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
  # An argument, so that runs with other seeds find the program compiled.
  seed = jax.device_put(np.uint32(config.seed), sharding.replicated(mesh))
  update = jit_update(config, model, tx, mesh, crop=crop)
  return functools.partial(update, seed)


def jit_update(
  config: ml_collections.ConfigDict,
  model: Any,
  tx: Any,
  mesh: jax.sharding.Mesh,
  *,
  crop: bool,
) -> Any:
  """`jit_step` of any seed, a uint32, which comes before the state."""
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

  return jax.jit(
    update,
    in_shardings=(replicated, replicated, batch_sharding),
    out_shardings=replicated,
    donate_argnames="state",
    compiler_options=(
      {"xla_gpu_deterministic_ops": True} if config.deterministic else None
    ),
  )


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
  if changes := workdir_lib.config_changes(config, workdir, free):
    raise UserError(
      f"{workdir} holds a run of another config: {'; '.join(changes)}"
    )
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
  model, shapes = make_model(config, source.num_classes)
  if step is None:
    variables = _load_init_from(config, model, shapes)
  else:
    variables = weights.fit(weights.load(workdir), shapes, str(workdir))
  mesh = sharding.make_mesh()
  variables = jax.device_put(variables, sharding.replicated(mesh))
  state = step_lib.TrainState(step=step, opt_state=(), **variables)
  evaluate = _make_evaluate(config, model, source, mesh, state)
  metrics = evaluate(state)
  return metrics | {"step": step}


def _compiled(train_step, state, mesh, config):
  batch = batch_shapes(config, mesh)
  lowered = train_step.func.lower(*train_step.args, state, batch)
  return functools.partial(lowered.compile(), *train_step.args)


def _make_evaluate(config, model, source, mesh, state):
  data = config.data
  return evaluate_lib.make_evaluate(
    step_lib.make_eval_step(model, augment.make_normalize(data.mean, data.std)),
    source,
    mesh,
    state,
    batch_size=config.batch_size,
    image_size=data.image_size,
    crop_pct=data.crop_pct,
    num_workers=data.num_workers,
    max_unreadable=data.max_unreadable,
    progress=logger_lib.progress,
  )


def _nonfinite(config, workdir, source, step, values):
  """Writes down what step was the first without numbers; says it in a line."""
  loss, norm = (str(values[name]) for name in ("loss", "grad_norm"))
  record = {"step": step, "loss": loss, "grad_norm": norm}
  record["images"] = stream.image_ids(
    source, config.seed, step - 1, config.batch_size
  )
  path = Path(workdir) / "nonfinite.json"
  if jax.process_index() == 0:
    path.write_text(json.dumps(record) + "\n")
  saved = checkpoint.latest_step(workdir)
  return (
    f"step {step}: loss {loss}, gradient norm {norm}; "
    + ("nothing is saved" if saved is None else f"step {saved} is saved")
    + f", {path} names the images of this one, and python -m"
    f" convmixer_jax.replay --workdir {workdir} --step {step} does it again"
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


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
  """Turns signals to stop into a question: which has come, or 0.

  They are SIGINT, SIGTERM, and those that Slurm sends where it is told to,
  SIGUSR1 and SIGUSR2. A second Ctrl-C stops at once. With several processes
  SIGTERM is left to jax, which makes all of them stop at the same step
  (`Checkpointer.preempted`), and the others become SIGTERM.
  """
  received = []

  def note(signum, frame):
    del frame
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      received.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  signals = [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
  if jax.process_count() == 1:
    signals.append(signal.SIGTERM)
  if threading.current_thread() is not threading.main_thread():
    signals = []  # Python allows no other thread to handle them.
  previous = {signum: signal.signal(signum, note) for signum in signals}
  try:
    yield lambda: received[0] if received else 0
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)
