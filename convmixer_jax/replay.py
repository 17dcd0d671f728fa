"""Does one step of a run again, from the nearest checkpoint before it.

  python -m convmixer_jax.replay --workdir runs/cifar10 --step 4700
  python -m convmixer_jax.replay --workdir runs/cifar10 --step 4700 --json

The images and the randomness of a step depend on (seed, step) alone, so this is
the step that was done, to the bit on the same machine: for a loss that leapt,
or is no number. Prints its metrics, the norm of the gradient of every layer
before clipping, and which images were in its batch. Writes nothing.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

from absl import flags
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from convmixer_jax import checkpoint
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import sharding
from convmixer_jax import train
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Of the run: --workdir runs/cifar10.", flag_values=_FLAGS
)
_STEP = flags.DEFINE_integer(
  "step",
  None,
  "The update, counted from 1 as everywhere: --step 4700.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print a JSON object: --json.", flag_values=_FLAGS
)


def main() -> None:
  """Runs what the flags say; see --help."""
  workdir = os.path.expanduser(cli.required(_WORKDIR))
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
  """Does the steps from the last checkpoint before `step` up to it again.

  Args:
    workdir: of the run; nothing is written there.
    step: 1 is the first update.

  Returns:
    step; start, that of the checkpoint, 0 for the run's beginning; metrics and
    layers, by name; images, see `stream.image_ids`.

  Raises:
    UserError: there is no such run or step, or not all that it needs.
  """
  config = workdir_lib.load_config(workdir)
  config_lib.check(config, jax.device_count())
  data = config.data
  source = sources.open_source(
    data.name, data.dir, data.train_split, data.image_size
  )
  total = -(-config.epochs * len(source) // config.batch_size)
  if step > total:
    raise UserError(f"--step={step}: the run has {total}")
  model, shapes = train.make_model(config, source.num_classes)
  tx, _ = train.make_optimizer(config, shapes, len(source))
  mesh = sharding.make_mesh()
  state = train.init_state(config, model, tx, mesh)
  saved = checkpoint.restore(workdir, state, before=step)
  if saved is None and config.init_from is not None:
    raise UserError(
      f"{workdir}: has no checkpoint before step {step}, and began from"
      f" {config.init_from}"
    )
  state = saved or state
  start = int(state.step)

  tx = _with_layer_norms(tx)
  layers = jax.eval_shape(_layer_norms, shapes["params"])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), layers)
  state = state.replace(opt_state=(state.opt_state, zeros))
  train_step = train.jit_step(config, model, tx, mesh, crop=train.crops(source))
  metrics = {}
  batches = train.train_batches(config, source, mesh, start, step)
  for batch in logger.progress(batches, step - start, "replaying"):
    batch = sharding.to_global(mesh, batch, config.batch_size)
    state, metrics = train_step(state, batch)
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


def _with_layer_norms(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """The same updates; its state is tx's, and the norms of what came in."""

  def update(grads, state, params):
    updates, inner = tx.update(grads, state[0], params)
    return updates, (inner, _layer_norms(grads))

  return optax.GradientTransformation(
    lambda params: (tx.init(params), _layer_norms(params)), update
  )


def _layer_norms(tree: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The norm of each layer's arrays together, by the layer's name."""
  layers = {}
  flat = flax.traverse_util.flatten_dict(models.unstack_blocks(tree))
  for (*layer, leaf), value in flat.items():
    layers.setdefault("/".join(layer), {})[leaf] = value
  return {name: optax.tree.norm(arrays) for name, arrays in layers.items()}


if __name__ == "__main__":
  cli.run(main, _FLAGS)
