"""The paper's optimiser: AdamW under a piecewise-linear schedule."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from convmixer_jax import UserError


def make_schedule(
  peak: float, epochs: int, steps_per_epoch: float
) -> optax.Schedule:
  """The authors' one-cycle schedule, piecewise linear in epochs.

  Through (0, 0), (2E // 5, peak), (4E // 5, peak / 20) and (E, 0). Update i,
  counted from 0, uses the value at the end of its step, i + 1, so the first
  update moves the weights and the last one does not.

  Args:
    peak: the highest learning rate, absolute.
    epochs: E, at least 1.
    steps_per_epoch: updates per epoch; need not be whole.

  Returns:
    A function from the number of updates done to the learning rate of the next.
  """
  knots = [0, 2 * epochs // 5, 4 * epochs // 5, epochs]
  values = [0, peak, peak / 20, 0]

  def schedule(count):
    epoch = (count + 1) / steps_per_epoch
    # Where the knots of a short run coincide, the later wins, as in numpy.
    return jnp.interp(epoch, jnp.array(knots, jnp.float32), jnp.array(values))

  return schedule


def make_optimizer(
  schedule: optax.Schedule,
  params: Any,
  *,
  weight_decay: float,
  decay_all: bool,
  eps: float,
  betas: Sequence[float],
  clip_norm: float,
  freeze: Sequence[str] = (),
  backbone_lr_scale: float = 1.0,
) -> optax.GradientTransformation:
  """Clip, AdamW, schedule.

  Args:
    schedule: see `make_schedule`.
    params: the tree to optimise; shapes and names are enough.
    weight_decay: decoupled, multiplied by the learning rate (PyTorch's AdamW).
    decay_all: decay every tensor; otherwise kernels alone, the tensors that
      have two or more dimensions in PyTorch: no bias, no norm's parameter.
    eps: added to the root of the second moment.
    betas: decay of the first and second moments.
    clip_norm: largest global gradient norm; 0 does not clip.
    freeze: path prefixes ('stem', 'block_0/depthwise') of parameters that stay
      as they are and do not count in the norm.
    backbone_lr_scale: multiplies the learning rate of everything but the head.

  Returns:
    An optax transformation for trees like `params`.

  Raises:
    UserError: a prefix in `freeze` that no parameter has.
  """
  names_of = lambda path: [p.key for p in path]
  prefixes = {prefix: prefix.split("/") for prefix in freeze}
  paths = [names_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
  for prefix, names in prefixes.items():
    if not any(path[: len(names)] == names for path in paths):
      known = ", ".join(sorted({path[0] for path in paths}))
      raise UserError(f"freeze={prefix}: no parameter under it; has {known}")

  def scale_of(path) -> float:
    names = names_of(path)
    if any(names[: len(frozen)] == frozen for frozen in prefixes.values()):
      return 0.0
    return 1.0 if names[0] == "head" else backbone_lr_scale

  by_path = jax.tree_util.tree_map_with_path
  scales = by_path(lambda path, _: scale_of(path), params)
  is_kernel = by_path(lambda path, _: names_of(path)[-1] == "kernel", params)

  def scaled(factors):
    return optax.stateless(
      lambda updates, _: jax.tree.map(jnp.multiply, factors, updates)
    )

  return optax.chain(
    scaled(jax.tree.map(lambda scale: float(scale > 0), scales)),
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.adamw(
      schedule,
      b1=betas[0],
      b2=betas[1],
      eps=eps,
      weight_decay=weight_decay,
      mask=None if decay_all else is_kernel,
    ),
    scaled(scales),
  )
