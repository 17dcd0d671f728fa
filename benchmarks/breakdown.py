"""Where the time of a model goes, by stage.

  python -m benchmarks.breakdown --model convmixer_256_8 --patch_size 2 \\
      --kernel_size 5 --image_size 32 --num_classes 10 --batch 64

Prints a table for inference and one for a training step with the recipe of
configs/cifar10.py, or of configs/imagenet.py for images above 64 pixels. A
stage's time is what it adds to the stages before it. `other` is the rest of the
whole: the stem, the head, dispatch, and what caches keep between stages in the
model but not in these measurements.
"""

from collections.abc import Callable
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import benchmarks
from benchmarks import work
from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import ops
from convmixer_jax.data import sources
from convmixer_jax.data import stream

_SMALL = 64  # Pixels. Such images are kept in memory and cropped in the step.
_WARMUP = 3  # Rounds that are not counted.

_FLAGS = cli.Flags()
_MODEL = benchmarks.define_model(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)


def main() -> None:
  """Runs what the flags say; see --help."""
  model, batch, size = _MODEL()
  chains = _chains(model, batch, size)
  record = {
    "model": benchmarks.title(model),
    "batch": batch,
    "image_size": size,
    "milliseconds": {},
  }
  for mode in ("infer", "train"):
    runs = {"whole": work.make_work(mode, model, batch, size)[0]}
    if mode == "train":
      runs["optimiser"] = _optimizer(model, size)
      runs["augmentation"] = _augment(_recipe(size), batch)
      if size <= _SMALL:
        runs["input"] = _input(batch, size)
    for name, chain in chains.items():
      for i, stage in enumerate(chain):
        runs[f"{name} {i}"] = _repeated(stage[mode], model.depth)
    times = benchmarks.by_turns(
      runs, _REPEATS.value, warmup=_WARMUP, label=mode
    )
    times = {name: 1e3 * values for name, values in times.items()}
    d, p = (
      [times.pop(f"{name} {i}") for i in range(len(chain))]
      for name, chain in chains.items()
    )
    ms = {
      "whole": times.pop("whole"),
      "depthwise": d[0],
      "pointwise": p[0],
      "bias, BatchNorm": d[1] - d[0] + p[1] - p[0],
      model.activation: d[2] - d[1] + p[2] - p[1],
    }
    if model.depthwise_residual:
      ms["residual"] = d[3] - d[2]
    if mode == "train":
      ms["optimiser"] = times.pop("optimiser")
    ms["other"] = 2 * ms["whole"] - sum(ms.values())
    ms |= {
      f"{name}, not in the whole": values for name, values in times.items()
    }
    record["milliseconds"][mode] = {
      name: benchmarks.digits(np.median(values)) for name, values in ms.items()
    }
  if _JSON.value:
    print(json.dumps(record | benchmarks.provenance(), indent=2))
    return
  for mode, ms in record["milliseconds"].items():
    print(f"{mode:30}{'ms':>8}  of the whole")
    for name, value in ms.items():
      print(f"{name:30}{value:8.4g}{100 * value / ms['whole']:12.1f} %")


Runs = dict[str, Callable[[], Any]]


def _repeated(run: Callable[[], Any], count: int) -> Callable[[], None]:
  """Returns a function that runs it `count` times and waits each time."""

  def repeat():
    for _ in range(count):
      jax.block_until_ready(run())

  return repeat


def _chains(model: nn.Module, batch: int, size: int) -> dict[str, list[Runs]]:
  """Each convolution of a block, alone and with more and more following steps.

  At inference that is one fused pass, whose parts cannot be timed separately.

  Returns:
    'depthwise' and 'pointwise', a list each: the convolution alone, then with
    bias and BatchNorm, then with the activation too, then (depthwise only) with
    the residual too. An entry has the forward pass as 'infer', and the forward
    pass with gradients as 'train'.
  """
  rng = np.random.default_rng(0)
  side, dim, k = work.stage_sizes(model, size)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), model.dtype)
  x, grad = array(batch, side, side, dim), array(batch, side, side, dim)
  how = {"implementation": model.implementation}

  def runs(op, kernel, activation=None, *residual):
    if activation is not None:
      module = ops.BatchNorm(model.bn_group_size, activation, **how)
      variables = module.init(jax.random.key(0), x, False)

    def stage(train, x, kernel, bias, *residual):
      if activation is None:
        return op(x, kernel, **how)
      return module.apply(
        variables,
        x,
        train,
        conv=ops.Convolution(op, kernel, bias),
        residual=residual[0] if residual else None,
        mutable=["batch_stats"],
      )[0]

    def both(grad, *args):
      y, vjp = jax.vjp(functools.partial(stage, True), *args)
      return y, vjp(grad)

    infer, both = jax.jit(functools.partial(stage, False)), jax.jit(both)
    args = x, kernel, jnp.zeros(dim), *residual
    return {"infer": lambda: infer(*args), "train": lambda: both(grad, *args)}

  depthwise = functools.partial(runs, ops.depthwise_conv, array(k, k, dim))
  pointwise = functools.partial(runs, ops.pointwise_conv, array(dim, dim))
  steps = [(), ("identity",), (model.activation,)]
  last = model.activation, array(*x.shape)
  return {
    "depthwise": [depthwise(*step) for step in [*steps, last]],
    "pointwise": [pointwise(*step) for step in steps],
  }


def _optimizer(model, size):
  variables = work.random_variables(model, size, np.random.default_rng(0))
  params = jax.tree.map(jnp.asarray, variables["params"])
  tx = work.make_optimizer(params)
  state = tx.init(params)

  @jax.jit
  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return lambda: update(params, state, params)


def _recipe(size):
  name = "cifar10" if size <= _SMALL else "imagenet"
  root = Path(__file__).parents[1]
  config = config_lib.load_file(str(root / "configs" / f"{name}.py"))
  config.data.image_size = size
  return config


def _augment(config, batch):
  size = config.data.image_size
  rng = np.random.default_rng(0)
  images = jnp.asarray(
    rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
  )
  targets = jax.nn.one_hot(rng.integers(0, 10, batch), 10)
  recipe = config.augment.to_dict() | {"mix_group_size": 0}
  run = jax.jit(
    augment.make_augment(
      recipe, mean=config.data.mean, std=config.data.std, crop=size <= _SMALL
    )
  )
  return lambda: run(jax.random.key(0), images, targets)


def _input(batch, size):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (50_000, size, size, 3), dtype=np.uint8)
  labels = rng.integers(0, 10, len(images)).astype(np.int32)
  source = sources.InMemory(images, labels, [str(i) for i in range(10)])
  batches = stream.train_batches(
    source,
    seed=0,
    batch_size=batch,
    rows=np.arange(batch),
    start=0,
    stop=10**6,
    image_size=size,
  )
  return lambda: jnp.asarray(next(batches)["image"])


if __name__ == "__main__":
  cli.run(main, _FLAGS)
