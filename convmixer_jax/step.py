"""One update, one evaluation of a batch, and the train state."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = dict[str, jax.Array]
DROPOUT = 0xD0  # Folded into a step's key, for the model's own randomness.
# With more classes there is no confusion matrix; this one takes 4 MB, int32.
MOST_COUNTED = 1000
# Augmentation and normalisation:
# (key, images uint8 [B, H, W, C], targets [B, K]) -> (float images, targets)
Augment = Callable[
  [jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
]


@flax.struct.dataclass
class TrainState:
  """What a run carries from step to step; nothing random is stored.

  Attributes:
    step: int32, the number of updates done.
    params: parameters, float32.
    batch_stats: running statistics of BatchNorm; empty without it.
    opt_state: the optimiser's.
    ema: moving averages, {'params', 'batch_stats'}, which evaluation uses
      instead; {} if off.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any = dataclasses.field(default_factory=dict)


def init_state(
  key: jax.Array,
  model: nn.Module,
  tx: optax.GradientTransformation,
  image_size: int,
  ema: bool = False,
) -> TrainState:
  """The state of step 0, drawn from a PRNG key.

  `image_size` is the side of the RGB images. With `ema`, the state has moving
  averages.
  """
  images = jnp.zeros((1, image_size, image_size, 3))
  variables = model.init(key, images, train=False)
  variables = {"batch_stats": {}} | variables
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    opt_state=tx.init(variables["params"]),
    ema=variables if ema else {},
    **variables,
  )


def soft_targets(
  labels: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
  """[B] int labels -> [B, num_classes] probabilities.

  The true class gets 1 - smoothing, and smoothing is spread over all classes,
  the true one among them, as in PyTorch.
  """
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def augmented(
  augment: Augment,
  batch: Batch,
  num_classes: int,
  label_smoothing: float,
  seed: int | jax.Array,
  step: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """A batch as the model gets it after `step` updates.

  The randomness is a function of (seed, step) alone, so a resumed run repeats
  what an uninterrupted one does.

  Args:
    augment: see `Augment`.
    batch: image uint8 [B, H, W, C]; label int [B], or float [B, K].
    num_classes: K.
    label_smoothing: see `soft_targets`; not for labels [B, K].
    seed: of the run.
    step: the number of updates done.

  Returns:
    Float images [B, H, W, C], and targets [B, K].
  """
  targets = batch["label"]
  if targets.ndim == 1:
    targets = soft_targets(targets, num_classes, label_smoothing)
  with jax.named_scope("augment"):
    return augment(augment_key(seed, step), batch["image"], targets)


def augment_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
  """The key of a batch's augmentation after `step` updates."""
  return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  augment: Augment,
  *,
  seed: int | jax.Array,
  label_smoothing: float = 0.0,
  accum_steps: int = 1,
  ema_decay: float = 0.0,
  batch_sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the function of one update; jit it with the state donated.

  Args:
    model: called with `train=True` on augmented images.
    tx: the optimiser.
    augment: what is random in a batch; see `augmented`.
    seed: of the augmentation.
    label_smoothing: see `soft_targets`.
    accum_steps: number of equal microbatches of consecutive images, whose
      gradients, metrics and BatchNorm updates are averaged.
    ema_decay: of the moving averages, if the state has them.
    batch_sharding: of batches over the devices, and of microbatches.

  Returns:
    (state, batch) -> (state, metrics). batch: image uint8 [B, H, W, C], label
    int [B], or [B, K] float for soft targets. metrics, all scalars: loss, top1
    (of the augmented images, in percent) and grad_norm (before clipping).
  """

  def loss_fn(params, batch_stats, images, targets, key):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(
      variables,
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    with jax.named_scope("metrics"):
      loss = optax.softmax_cross_entropy(logits, targets).mean()
      hits = logits.argmax(-1) == targets.argmax(-1)
      metrics = {"loss": loss, "top1": 100 * hits.mean(dtype=jnp.float32)}
    return loss, (updated.get("batch_stats", {}), metrics)

  @jax.named_scope("microbatches")
  def split(x):  # [B, ...] -> [accum_steps, B / accum_steps, ...]
    x = x.reshape(accum_steps, -1, *x.shape[1:])
    if batch_sharding is None:
      return x
    spec = jax.sharding.PartitionSpec(None, *batch_sharding.spec)
    return jax.lax.with_sharding_constraint(x, batch_sharding.update(spec=spec))

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, DROPOUT)
    images, targets = augmented(
      augment, batch, model.num_classes, label_smoothing, seed, state.step
    )

    def gradients(images, targets, microbatch):
      grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
        state.params,
        state.batch_stats,
        images,
        targets,
        jax.random.fold_in(key, microbatch),
      )
      return grads, batch_stats, metrics

    if accum_steps == 1:
      grads, batch_stats, metrics = gradients(images, targets, 0)
    else:
      micro = *map(split, (images, targets)), jnp.arange(accum_steps)
      add = lambda total, part: total + part / accum_steps
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], micro)),
      )
      (grads, batch_stats, metrics), _ = jax.lax.scan(
        lambda total, part: (
          jax.tree.map(add, total, gradients(*part)),
          None,
        ),
        zeros,
        micro,
      )

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema:
      ema = optax.incremental_update(
        {"params": params, "batch_stats": batch_stats}, ema, 1 - ema_decay
      )
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return state, metrics

  return train_step


def confusion(
  labels: jax.Array, predicted: jax.Array, mask: jax.Array, num_classes: int
) -> jax.Array:
  """Counts the pairs of true and predicted class.

  Args:
    labels: int [B].
    predicted: int [B]; one outside 0, ..., num_classes - 1 is not counted.
    mask: bool [B]; where it is False, nothing is counted.
    num_classes: K.

  Returns:
    int32 [K, K]: a row for each true class, a column for each predicted one.
  """
  counts = jnp.zeros((num_classes, num_classes), jnp.int32)
  return counts.at[labels, predicted].add(mask.astype(jnp.int32), mode="drop")


def make_eval_step(
  model: nn.Module,
  normalize: Callable[[jax.Array], jax.Array],
  subset: np.ndarray | None = None,
) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
  """Returns the function that evaluates one batch.

  Args:
    model: called with `train=False`.
    normalize: uint8 images -> the model's floats.
    subset: bool [K], the classes that may be an answer; None: all.

  Returns:
    (state, batch) -> sums over the batch's real images: count, loss (nats),
    top1 and top5 (numbers of hits), and, for K = num_classes of at most
    `MOST_COUNTED`, confusion [K, K], see `confusion`. batch: image, label int
    [B], and mask bool [B], False for padding. Or label is int [B, L], several
    right answers and then -1: the loss is that of any of them, there is no
    confusion, and images without any are not counted, but their number is
    `unlabelled`.
  """

  def eval_step(state, batch):
    variables = state.ema or {
      "params": state.params,
      "batch_stats": state.batch_stats,
    }
    logits = model.apply(variables, normalize(batch["image"]), train=False)
    if subset is not None:
      logits = jnp.where(subset, logits, -jnp.inf)
    labels, mask, more = batch["label"], batch["mask"], {}
    _, best = jax.lax.top_k(logits, min(5, model.num_classes))
    if labels.ndim == 1:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      right = best == labels[:, None]
    else:
      any_of = jax.nn.one_hot(labels, model.num_classes, dtype=bool).any(1)
      losses = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(
        logits, -1, where=any_of
      )
      right = jnp.take_along_axis(any_of, best, axis=-1)
      more["unlabelled"] = (mask & ~any_of.any(-1)).sum(dtype=jnp.float32)
      mask &= any_of.any(-1)
    # top_k ranks NaN first. Such an image is no hit, and the loss is NaN.
    valid = ~jnp.isnan(losses)
    hits = right & valid[:, None]
    total = lambda x: jnp.where(mask, x, 0).sum(dtype=jnp.float32)
    more |= {
      "count": total(mask),
      "loss": total(losses),
      "top1": total(hits[:, 0]),
      "top5": total(hits.any(-1)),
    }
    if labels.ndim == 1 and (classes := model.num_classes) <= MOST_COUNTED:
      counted = mask & valid
      more["confusion"] = confusion(labels, best[:, 0], counted, classes)
    return more

  return eval_step
