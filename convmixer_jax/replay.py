"""Repeats one step of a run, from the nearest checkpoint before it.

  python -m convmixer_jax.replay --workdir runs/cifar10 --step 4700
  python -m convmixer_jax.replay --workdir runs/cifar10 --step 4700 --json

Use it to find out why a loss jumped or became NaN. The images and the
randomness of a step depend on (seed, step) alone, so on the same machine the
result is bit-equal to the run's. Prints the step's metrics, the gradient norm
of every layer before clipping, and the images of its batch. Writes nothing.
"""

import dataclasses
import json
import os
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from convmixer_jax import checkpoint
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sharding
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_WORKDIR = _FLAGS.string("workdir", "The run's folder: --workdir runs/cifar10.")
_STEP = _FLAGS.positive("step", "Update to repeat, from 1: --step 4700.")
_JSON = _FLAGS.boolean("json", "Print a JSON object: --json.")


def main() -> None:
  """Runs what the flags say; see --help."""
  workdir = files.path(cli.required(_WORKDIR))
  record = replay(workdir, cli.required(_STEP))
  if _JSON.value:
    print(json.dumps(record, indent=2))
    return
  for name, value in record["metrics"].items():
    print(f"{name:28} {value:.9g}")
  print(f"\ngradient norms of step {record['step']}, by layer")
  for name, value in record["layers"].items():
    print(f"  {name:26} {value:.6g}")
  print("\nimages of its batch, row by row")
  print(*(f"  {image}" for image in record["images"]), sep="\n")


def replay(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
  """Repeats the steps from the last checkpoint before `step` up to it.

  The first update is step 1. The workdir is not changed. Raises UserError if
  there is no such run or step, its data are missing, or the config has changed
  since (`--accept_changes`).

  Returns:
    step; start, the checkpoint's step, or 0; metrics and layers, by name;
    images, see `stream.image_ids`.
  """
  config = workdir_lib.load_config(workdir)
  config_lib.check(config, jax.device_count())
  data = config.data
  source = sources.open_source(
    data.name, data.dir, data.train_split, data.image_size
  )
  recipe = recipe_lib.build(config, source)
  if step > recipe.total_steps:
    raise UserError(f"--step={step}: the run has {recipe.total_steps}")
  state = recipe.init_state()
  saved = checkpoint.restore(workdir, state, before=step)
  if saved is None and config.init_from is not None:
    raise UserError(
      f"{workdir}: has no checkpoint before step {step}, and began from"
      f" {config.init_from}"
    )
  state = saved or state
  start = int(state.step)
  for begun in workdir_lib.read_starts(workdir)["starts"]:
    if begun.get("changes") and begun["first_step"] > start:
      raise UserError(
        f"--step={step}: the config was changed at step {begun['first_step']}"
        f" ({'; '.join(begun['changes'])}); only later steps can be repeated"
      )

  layers = jax.eval_shape(_layer_norms, recipe.shapes["params"])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), layers)
  state = state.replace(opt_state=(state.opt_state, zeros))
  recipe = dataclasses.replace(recipe, tx=_with_layer_norms(recipe.tx))
  metrics = {}
  batches = recipe.train_batches(start, step)
  for batch in logger.progress(batches, step - start, "replaying"):
    batch = sharding.to_global(recipe.mesh, batch, config.batch_size)
    state, metrics = recipe.train_step(recipe.seed, state, batch)
  _, layers = state.opt_state
  as_numbers = lambda tree: {k: float(v) for k, v in sorted(tree.items())}
  return {
    "step": step,
    "start": start,
    "metrics": as_numbers(metrics),
    "layers": as_numbers(layers),
    "images": stream.image_ids(
      source, config.seed, step - 1, config.batch_size
    ),
  }


def _with_layer_norms(tx):
  """Also keeps the gradient's norms in the state: (tx's state, norms)."""

  def update(grads, state, params):
    updates, inner = tx.update(grads, state[0], params)
    return updates, (inner, _layer_norms(grads))

  return optax.GradientTransformation(
    lambda params: (tx.init(params), _layer_norms(params)), update
  )


def _layer_norms(tree):
  """Layer's name -> norm of its arrays together."""
  layers = {}
  flat = flax.traverse_util.flatten_dict(models.unstack_blocks(tree))
  for (*layer, leaf), value in flat.items():
    layers.setdefault("/".join(layer), {})[leaf] = value
  return {name: optax.tree.norm(arrays) for name, arrays in layers.items()}


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
