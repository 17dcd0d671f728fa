"""Exact metrics: every image of a split is counted once."""

from collections.abc import Callable
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import logger
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import runtime
from convmixer_jax import sharding
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from convmixer_jax.step import TrainState


def make_evaluate(
  recipe: recipe_lib.Recipe, source: sources.Source, state: TrainState
) -> Callable[..., dict[str, Any] | None]:
  """Compiles the function that scores a state on all images of `source`.

  Args:
    recipe: of the run. Its batch size is rounded up to a multiple of the number
      of devices.
    source: the split to score.
    state: one like those that will be scored.

  Returns:
    (state, stopped=never) -> top1 and, of more than five classes, top5 in
    percent, loss in nats, count, the number of images, and, for at most
    `step.MOST_COUNTED` classes, confusion, int32 [K, K], see `step.confusion`.
    It raises an error unless every readable image with a label was counted.
    `stopped` is called before each batch; once it returns true, the result is
    None.
  """
  data, mesh = recipe.config.data, recipe.mesh
  batch_size = -(-recipe.config.batch_size // mesh.size) * mesh.size
  batch = recipe.batch_shapes(batch_size)
  batch["mask"] = batch["label"].update(dtype=np.dtype(bool))
  shape = (batch_size, *source.label_shape)
  batch["label"] = batch["label"].update(shape=shape)
  eval_step = recipe.eval_step.lower(state, batch).compile()
  add = jax.jit(jnp.add, donate_argnums=0)

  def evaluate(state: TrainState, stopped: Callable = lambda: False):
    batches = stream.eval_batches(
      source,
      batch_size=batch_size,
      rows=sharding.local_rows(mesh, batch_size),
      image_size=data.image_size,
      crop_pct=data.crop_pct,
      num_workers=data.num_workers,
      max_unreadable=data.max_unreadable,
      stopped=stopped,
    )
    sums, confusion = [], None
    for batch in logger.progress(batches, -(-len(source) // batch_size)):
      sums.append(eval_step(state, sharding.to_global(mesh, batch, batch_size)))
      # Added on the device: those of all batches would take too much memory.
      counts = sums[-1].pop("confusion", None)
      confusion = counts if confusion is None else add(confusion, counts)
      runtime.bound_memory(sums)
    if stopped():
      return None
    total = jax.tree.map(
      lambda *x: np.sum(x, dtype=np.float64), *jax.device_get(sums)
    )
    missing = len(source) - total["count"] - total.get("unlabelled", 0)
    if not total["count"]:
      raise UserError("data.eval_split: none of its images can be decoded")
    if not 0 <= missing <= data.max_unreadable * jax.process_count():
      raise RuntimeError(
        f"scored {total['count']:.0f} of {len(source)} images: a bug"
      )
    names = ("top1", "top5") if recipe.model.num_classes > 5 else ("top1",)
    metrics = {
      **{name: 100 * total[name] / total["count"] for name in names},
      "loss": total["loss"] / total["count"],
      "count": int(total["count"]),
    }
    if confusion is not None:
      metrics["confusion"] = jax.device_get(confusion)
    return metrics

  return evaluate


def evaluate_checkpoint(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> dict[str, Any]:
  """Scores weights on `config.data.eval_split`.

  The weights are those of the newest checkpoint in `workdir`. If it has no
  checkpoint, they are those that `config.init_from` names.

  Returns:
    step (None for `init_from`), what `make_evaluate`'s function returns, and,
    with confusion, per_class: for each class name; images, their number; top1
    in percent, None without images; mistaken_for, the class most often
    predicted instead, None if none is; and mistakes, how often.

  Raises:
    UserError: invalid config or workdir, no weights, or weights of other
      classes than the data's; see `weights.match`.
  """
  config_lib.check(config, num_devices=None)
  # The model and its input are fixed; where and how it is evaluated is free.
  fixed = ("model.", "data.image_size", "data.mean", "data.std")
  free = [name for name in config_lib.FIELDS if not name.startswith(fixed)]
  free += config_lib.FREE_FIELDS
  if changes := workdir_lib.config_changes(config, workdir, free):
    raise UserError(
      f"{workdir} holds a run of another config: {'; '.join(changes.values())}."
      f" Pass --config {workdir}/config.json to start from its own"
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
  recipe = recipe_lib.build(config, source)
  model, shapes, names = recipe.model, recipe.shapes, source.class_names
  if step is None:
    variables = weights.load_init_from(
      config.init_from, model, shapes, class_names=names
    )
  else:
    variables = weights.match(
      weights.load(workdir), shapes, str(workdir), class_names=names
    )
  variables = jax.device_put(variables, sharding.replicated(recipe.mesh))
  state = TrainState(step=step, opt_state=(), **variables)
  metrics = make_evaluate(recipe, source, state)(state) | {"step": step}
  if "confusion" in metrics:
    metrics["per_class"] = _per_class(metrics["confusion"], names)
  return metrics


def _per_class(confusion, names):
  """See `evaluate_checkpoint`."""
  wrong = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
  found = []
  for k, (name, row) in enumerate(zip(names, confusion)):
    images, most = int(row.sum()), wrong[k].argmax()
    found.append(
      {
        "name": name,
        "images": images,
        "top1": 100 * int(row[k]) / images if images else None,
        "mistaken_for": names[most] if wrong[k, most] else None,
        "mistakes": int(wrong[k, most]),
      }
    )
  return found
