"""The paper's optimiser, AdamW, and learning-rate schedules."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convmixer_jax.errors import UserError

SCHEDULES = ("onecycle", "cosine", "constant")


def make_schedule(
  name: str,
  peak: float,
  epochs: int,
  steps_per_epoch: float,
  warmup_epochs: float = 0.0,
) -> optax.Schedule:
  """The learning rate over a run, by name.

  onecycle: the authors', piecewise linear in epochs, through (0, 0),
  (2E // 5, peak), (4E // 5, peak / 20) and (E, 0). cosine: half a cosine from
  the peak to 0. constant: the peak. The last two rise linearly from 0 during
  warm-up.

  Update i, counted from 0, uses the value at i + 1, as in the authors' script.
  So the first update has a rate above 0, and the last one has 0 if the schedule
  ends there.

  Args:
    name: one of `SCHEDULES`.
    peak: the highest learning rate, absolute.
    epochs: E, at least 1.
    steps_per_epoch: updates per epoch, not necessarily whole.
    warmup_epochs: less than E; ignored by onecycle.

  Returns:
    A function from the number of updates done to the learning rate of the next.
  """
  knots = [0, 2 * epochs // 5, 4 * epochs // 5, epochs]
  values = [0, peak, peak / 20, 0]

  def schedule(count):
    epoch = (count + 1) / steps_per_epoch
    if name == "onecycle":
      # Where the knots of a short run coincide, the later wins, as in numpy.
      return jnp.interp(epoch, jnp.array(knots, jnp.float32), jnp.array(values))
    rate = peak
    if name == "cosine":
      done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
      rate = peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
    if warmup_epochs:
      rate = jnp.minimum(rate, peak * epoch / warmup_epochs)
    return jnp.asarray(rate)

  return schedule


def make_optimizer(
  schedule: optax.Schedule,
  params: Any,
  config: Mapping[str, Any],
  *,
  freeze: Sequence[str] = (),
  backbone_lr_scale: float = 1.0,
) -> optax.GradientTransformation:
  """Clip, AdamW, schedule.

  Args:
    schedule: see `make_schedule`.
    params: the tree to optimise; shapes and names are enough.
    config: a config's `optim`. These fields are read:
      weight_decay: decoupled, multiplied by the learning rate (PyTorch's
        AdamW).
      decay_all: decay every tensor; otherwise only kernels (tensors with two
        or more dimensions in PyTorch), no biases and no norm's parameters.
      eps: added to the root of the second moment.
      betas: decay of the first and second moments.
      clip_norm: largest global gradient norm; 0 does not clip.
    freeze: path prefixes ('stem', 'block_0/depthwise') of parameters that are
      not updated and do not count in the norm. The names are those of an
      unrolled model, also if the model is scanned.
    backbone_lr_scale: factor on the learning rate of all but the head.

  Returns:
    An optax transformation for trees like `params`.

  Raises:
    UserError: no parameter has a prefix in `freeze`.
  """
  by_path = jax.tree_util.tree_map_with_path
  prefixes = {prefix: prefix.split("/") for prefix in freeze}
  paths = [
    names
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    for names in _names(path, leaf)
  ]
  for prefix, frozen in prefixes.items():
    if not any(names[: len(frozen)] == frozen for names in paths):
      known = ", ".join(sorted({names[0] for names in paths}))
      raise UserError(f"freeze={prefix}: no parameter under it; has {known}")

  def scale_of(names) -> float:
    if any(names[: len(frozen)] == frozen for frozen in prefixes.values()):
      return 0.0
    return 1.0 if names[0] == "head" else backbone_lr_scale

  def scales_of(path, leaf):
    scales = [scale_of(names) for names in _names(path, leaf)]
    return np.reshape(np.float32(scales), [-1] + [1] * (len(leaf.shape) - 1))

  scales = by_path(scales_of, params)
  is_kernel = by_path(lambda path, _: path[-1].key == "kernel", params)

  def scaled(factors):
    return optax.stateless(
      lambda updates, _: jax.tree.map(jnp.multiply, factors, updates)
    )

  return optax.chain(
    scaled(jax.tree.map(lambda scale: np.float32(scale > 0), scales)),
    optax.clip_by_global_norm(config["clip_norm"])
    if config["clip_norm"]
    else optax.identity(),
    optax.adamw(
      schedule,
      b1=config["betas"][0],
      b2=config["betas"][1],
      eps=config["eps"],
      weight_decay=config["weight_decay"],
      mask=None if config["decay_all"] else is_kernel,
    ),
    scaled(scales),
  )


def _names(path, leaf):
  """A parameter's path; in a scanned model's blocks, one for each block."""
  names = [part.key for part in path]
  if names[0] != "blocks":
    return [names]
  return [[f"block_{i}", *names[1:]] for i in range(leaf.shape[0])]
