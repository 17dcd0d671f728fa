"""Training: `train_and_evaluate` reads from top to bottom."""

import contextlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convmixer_jax import best as best_lib
from convmixer_jax import checkpoint
from convmixer_jax import classes
from convmixer_jax import config as config_lib
from convmixer_jax import evaluate as evaluate_lib
from convmixer_jax import files
from convmixer_jax import logger as logger_lib
from convmixer_jax import models
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import runtime
from convmixer_jax import sharding
from convmixer_jax import step as step_lib
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax import writers
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  accept_changes: bool = False,
  profile: range | None = None,
  wandb: writers.Wandb | None = None,
) -> step_lib.TrainState:
  """Trains as `config` says, and resumes the run that `workdir` holds.

  Args:
    config: see `config.FIELDS`.
    workdir: see `logger.Logger`. If its run is finished, nothing is done.
    accept_changes: resume although `workdir` holds another config.
    profile: the updates of which a trace is written; 0 is the first.
    wandb: where records are written too.

  Returns:
    The last state.

  Raises:
    UserError: invalid config or workdir; existing files are untouched.
    SystemExit: a signal stopped the run, and the state is saved.
  """
  # --- 1. Data and recipe. Mistakes are found before anything is written.
  config_lib.check(config, jax.device_count())
  best = best_lib.Best(config, workdir)
  changes = workdir_lib.config_changes(config, workdir, config_lib.FREE_FIELDS)
  saved = checkpoint.latest_step(workdir)
  if saved is None and workdir_lib.lacks_checkpoints(workdir):
    raise UserError(
      f"{workdir}: has the metrics.jsonl of a run, but no checkpoints; put"
      " checkpoints/ back, pass another --workdir, or remove metrics.jsonl to"
      " start again"
    )
  if saved is None and not workdir_lib.read_metrics(workdir):
    changes = {}  # That run ended before it had anything to resume.
  if changes and not accept_changes:
    texts = "; ".join(changes.values())
    raise UserError(
      f"{workdir} holds a run of another config ({texts}); pass another"
      " --workdir, or --accept_changes to resume anyway"
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
  if train_source.label_shape:
    text = "has several labels an image: for --mode eval only"
    raise UserError(f"data.name={data.name}: {text}")
  recipe = recipe_lib.build(config, train_source)
  mesh, total_steps = recipe.mesh, recipe.total_steps
  if profile and profile.stop > total_steps:
    text = f"--profile={profile.start}:{profile.stop}"
    raise UserError(f"{text}: the run has only {total_steps} steps")
  if saved is not None:
    _check_progress(recipe, workdir, changes, saved)
    classes.check(workdir, train_source.class_names, trains=False)

  # --- 2. State: the newest checkpoint > weights of another run > scratch.
  state = recipe.init_state()
  if config.init_from is not None and saved is None:
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    loaded = weights.load_init_from(
      config.init_from,
      recipe.model,
      fresh,
      class_names=train_source.class_names,
      new_head=True,
    )
    loaded = jax.device_put(loaded, sharding.replicated(mesh))
    # Copied, because the step donates every buffer.
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
        f"{workdir}: is at step {first_step}, but this config and data give"
        f" {total_steps} steps; pass another --workdir"
      )
    metrics = workdir_lib.read_eval(workdir, first_step)
    if first_step == total_steps and metrics:
      if jax.process_index() == 0:
        workdir_lib.mark_finished(workdir, metrics)
        print(
          f"{workdir}: finished at step {first_step}; nothing to do\n"
          + logger_lib.eval_line(metrics)
          + best.describe()
        )
      return state

    # --- 3. Logs and programs. All are compiled here, so that no signal waits
    # for their compilation.
    logger = logger_lib.Logger(
      workdir,
      config.to_json(indent=2),
      first_step=first_step,
      total_steps=total_steps,
      batch_size=batch_size,
      active=jax.process_index() == 0,
      changes=[*changes.values()],
      num_devices=mesh.size,
      peak_rate=recipe.peak_rate,
      profile=profile,
      wandb=wandb,
    )
    status = "failed"
    stack.callback(lambda: logger.close(status, step))
    if first_step == 0:
      logger.write_classes(train_source.class_names)
      logger.print_parameters(recipe.shapes["params"])
    else:
      changed = (
        f" with changes: {'; '.join(changes.values())}" if changes else ""
      )
      logger.say(f"resuming {workdir} from step {first_step}{changed}")
    operations = models.operations(recipe.model)
    if operations in ("cuda", "pallas"):
      operations += " for what it supports, xla for the rest"
    logger.say(f"convolutions and BatchNorm: {operations}")
    if warning := best.warning(train_source, eval_source):
      logger.say(warning)
    seed = recipe.seed
    train_step = recipe.train_step.lower(
      seed, state, recipe.batch_shapes()
    ).compile()
    _ = recipe.policy
    evaluate = evaluate_lib.make_evaluate(recipe, eval_source, state)
    learning_rate = jax.jit(lambda step: recipe.schedule(step - 1))

    # --- 4. The loop. Step n means n updates done. Logging and saving wait for
    # the device. Other steps let the host go on, so that the device always has
    # work.
    received = stack.enter_context(runtime.stop_signals())
    stopped = lambda: bool(received)
    # A run that was stopped during an evaluation repeats it now.
    if first_step and not metrics and recipe.is_due(step, config.eval_every):
      metrics = evaluate(state, stopped)
      logger.log_eval(step, metrics)
    best.offer(step, metrics, state)
    batches = stack.enter_context(
      contextlib.closing(recipe.train_batches(step, total_steps, stopped))
    )
    pending = []  # Metrics of the steps since the last record.
    logger.start_clock(step)
    for batch in logger.timed(
      sharding.to_global(mesh, batch, batch_size) for batch in batches
    ):
      if step == 0:
        images, targets = recipe.training_images(batch, state.step, num=16)
        logger.log_images(images, targets, train_source.class_names)
      logger.start_profile(step, state)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, scalars = train_step(seed, state, batch)
      step += 1
      logger.stop_profile(step, state)
      pending.append(scalars)
      runtime.bound_memory(pending)
      if recipe.is_due(step, config.log_every):
        _check_finite(recipe, workdir, checkpointer, step, pending)
        logger.log_train(
          step,
          jax.device_get(pending),
          epoch=step / recipe.steps_per_epoch,
          learning_rate=float(jax.device_get(learning_rate(state.step))),
        )
        pending = []
      if recipe.is_due(step, config.eval_every):
        metrics = evaluate(state, stopped)
        best.offer(step, metrics, state)
        logger.log_eval(step, metrics)
      if recipe.is_due(step, config.save_every):
        _check_finite(recipe, workdir, checkpointer, step, pending)
        checkpointer.save(step, state)
        logger.start_clock(step)
      if checkpointer.preempted(step):
        break
    # The last step is evaluated unless a signal came meanwhile.
    finished = step == total_steps and metrics is not None
    if not finished:
      _check_finite(recipe, workdir, checkpointer, step, pending)
      checkpointer.save(step, state)
    checkpointer.close()
    status = "finished" if finished else "interrupted"
  if not finished:
    signum = received[0] if received else signal.SIGTERM
    logger.say(
      f"stopped by {signal.Signals(signum).name}: step {step} is saved in"
      f" {workdir}; rerun the same command to resume"
    )
    raise SystemExit(128 + signum)
  line = f"{logger_lib.eval_line(metrics)}; workdir {workdir}{best.describe()}"
  logger.say(f"finished: {line}")
  return state


def _check_progress(recipe, workdir, changes, saved):
  """Raises UserError unless step n has the same images as before step `saved`.

  It has if neither the batch size nor the number of images has changed.
  """
  config, size = recipe.config, recipe.data.size
  changed = changes.get("batch_size")
  for record in reversed(workdir_lib.read_metrics(workdir)):
    match record:
      case {"step": step, "epoch": float(epoch)} if step <= saved and epoch > 0:
        there = round(step * config.batch_size / epoch)
        if not changed and there != size:
          split = f"data.train_split={config.data.train_split}"
          changed = f"{split} had {there} images there and has {size} here"
        break
  if changed:
    raise UserError(
      f"{workdir}: {changed}; the images of step n depend on this, so its"
      " epochs would leap. Pass another --workdir, and"
      f" --config.init_from={workdir} to start from its weights"
    )


def _check_finite(recipe, workdir, checkpointer, step, pending):
  """Raises UserError if the loss or gradient of a pending step is not finite.

  `pending` are the metrics of the last steps before `step`. nonfinite.json
  records the first such step and the images of its batch.
  """
  for number, values in enumerate(
    jax.device_get(pending), step + 1 - len(pending)
  ):
    loss, norm = values["loss"], values["grad_norm"]
    if np.isfinite([loss, norm]).all():
      continue
    checkpointer.close()  # Waits for the checkpoint of an earlier step.
    config, path = recipe.config, files.path(workdir) / "nonfinite.json"
    record = {"step": number, "loss": str(loss), "grad_norm": str(norm)}
    record["images"] = stream.image_ids(
      recipe.data, config.seed, number - 1, config.batch_size
    )
    if jax.process_index() == 0:
      with files.writing(path.parent):
        files.write_whole(path, json.dumps(record) + "\n")
    saved = checkpoint.latest_step(workdir)
    saved = "nothing is saved" if saved is None else f"step {saved} is saved"
    raise UserError(
      f"step {number}: loss {loss}, gradient norm {norm}; {saved}, {path} names"
      " the images of this step, and python -m convmixer_jax.replay --workdir"
      f" {workdir} --step {number} repeats it"
    )
