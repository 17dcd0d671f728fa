"""Measurements of a trained model: kernels, receptive fields, CKA, mistakes."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from convmixer_jax import augment
from convmixer_jax import step


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model, its variables, and the mean and std of its images.

  The model has a stem and blocks, and takes `return_features` and `num_blocks`
  as `models.ConvMixer` does.
  """

  model: nn.Module
  variables: Mapping[str, Any]
  mean: Sequence[float]
  std: Sequence[float]

  @property
  def depth(self) -> int:
    """Number of blocks."""
    names = self.variables["params"]
    return sum(bool(re.search(r"(^|_)block_\d+$", name)) for name in names)

  def center(self, image_size: int, num_blocks: int) -> float:
    """The pixel, from 0, in the middle of a map's middle location.

    A ResNet's own stem and each of its later stages see pixels 0, s, 2 s, ...
    """

    def side(num_blocks):
      images = jnp.zeros((1, image_size, image_size, 3))
      features = lambda v, x: self.features(v, x, num_blocks)
      return jax.eval_shape(features, self.variables, images).shape[1]

    patch = self.model.patch_size
    halved = math.ceil(math.log2(side(0) / side(num_blocks)))
    stride = (patch or 4) * 2**halved
    return side(num_blocks) // 2 * stride + ((patch or 1) - 1) / 2

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 images -> the model's input."""
    return augment.make_normalize(self.mean, self.std)(images)

  def logits(self, variables, images: jax.Array) -> jax.Array:
    """uint8 [B, S, S, 3] -> [B, K]."""
    return self.model.apply(variables, self.normalize(images), train=False)

  def features(self, variables, x: jax.Array, num_blocks: int) -> jax.Array:
    """Normalised [B, S, S, 3] -> float32 [B, S / p, S / p, dim]."""
    maps = self.model.apply(
      variables, x, train=False, return_features=True, num_blocks=num_blocks
    )
    return maps.astype(jnp.float32)


def depthwise_kernels(params: Mapping[str, Any], block: int) -> np.ndarray:
  """float32 [k, k, dim]."""
  kernels = params[f"block_{block}"]["depthwise"]["kernel"]
  return np.asarray(kernels, np.float32)[:, :, 0]


def spread(kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distance of a block's weights from the centre of their kernels, in patches.

  Args:
    kernels: [k, k, N]. The centre is the tap at the output's own location; of
      an even kernel, the upper left one of the four in the middle.

  Returns:
    [D], the distances of taps; [D], the mean of |w| at each distance; and [N],
    the root mean square distance in each kernel, weighted by w^2.
  """
  k = len(kernels)
  steps = np.arange(k) - (k - 1) // 2
  distance = np.hypot(*np.meshgrid(steps, steps))
  distances, index = np.unique(distance.round(6), return_inverse=True)
  size = np.abs(kernels).mean(-1)
  sums = np.bincount(index.ravel(), size.ravel())
  means = sums / np.bincount(index.ravel())
  energy = np.square(kernels, dtype=np.float64)
  second = np.tensordot(distance**2, energy, 2)
  return (
    distances,
    means,
    np.sqrt(second / np.maximum(energy.sum((0, 1)), 1e-30)),
  )


def receptive_field(
  trained: Trained, batches: Iterable[np.ndarray], num_blocks: int
) -> np.ndarray:
  """Effective receptive field of the location in the middle.

  The mean over images of |df / dx|, summed over the colors. f is the sum of
  the features at that location, x a normalised pixel.

  Args:
    trained: the model.
    batches: uint8 [B, S, S, 3] each.
    num_blocks: number of blocks before the features.

  Returns:
    [S, S].
  """

  @jax.jit
  def gradient(variables, images):
    def middle(x):
      maps = trained.features(variables, x, num_blocks)
      return maps[:, maps.shape[1] // 2, maps.shape[2] // 2].sum()

    return jnp.abs(jax.grad(middle)(trained.normalize(images))).sum(-1).mean(0)

  fields = [gradient(trained.variables, images) for images in batches]
  return np.mean(np.asarray(fields, np.float64), 0)


def reach(field: np.ndarray, center: float, share: float) -> float:
  """Side in pixels of the smallest square that contains a share of a field.

  Args:
    field: [S, S], from `receptive_field`.
    center: row and column of the square's centre; see `Trained.center`.
    share: in (0, 1].
  """
  offset = np.abs(np.arange(len(field)) - center)
  distance = np.maximum(offset[:, None], offset).ravel()
  order = np.argsort(distance)
  held = np.cumsum(field.ravel()[order])
  index = np.searchsorted(held, share * held[-1] * (1 - 1e-9))
  return 2 * distance[order][index] + 1


def unbiased_hsic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Song et al.'s estimator: Gram matrices [M, n, n], [N, n, n] -> [M, N]."""
  n = a.shape[-1]
  a, b = a * (1 - np.eye(n)), b * (1 - np.eye(n))
  rows_a, rows_b = a.sum(-1), b.sum(-1)
  trace = np.tensordot(a, b, [(1, 2), (1, 2)])
  total = np.outer(rows_a.sum(-1), rows_b.sum(-1)) / ((n - 1) * (n - 2))
  return (trace + total - 2 / (n - 2) * rows_a @ rows_b.T) / (n * (n - 3))


def cka(a: Trained, b: Trained, batches: Sequence[np.ndarray]) -> np.ndarray:
  """Linear CKA between the stems and blocks of two models, by minibatches.

  As in Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same
  Things?", 2021: unbiased HSIC of each batch, averaged before the quotient.

  Args:
    a: a model.
    b: another one, or the same.
    batches: uint8 [B, S, S, 3] each, with B at least 4.

  Returns:
    [a's depth + 1, b's depth + 1]; nan for features that do not vary.
  """
  grams_a, grams_b = _make_grams(a), _make_grams(b)
  between = own_a = own_b = 0.0
  for images in tqdm.tqdm(batches, "CKA", disable=None):
    of_a = np.asarray(grams_a(a.variables, images), np.float64)
    of_b = np.asarray(grams_b(b.variables, images), np.float64)
    between += unbiased_hsic(of_a, of_b)
    own_a += np.diag(unbiased_hsic(of_a, of_a))
    own_b += np.diag(unbiased_hsic(of_b, of_b))
  with np.errstate(invalid="ignore"):
    return between / np.sqrt(np.outer(own_a, own_b))


def _make_grams(trained):
  """Returns (variables, images) -> [depth + 1, B, B], of centred features.

  Centring does not change HSIC, and keeps precision in float32.
  """

  @jax.jit
  def grams(variables, images):
    x = trained.normalize(images)
    rows = (
      trained.features(variables, x, n).reshape(len(x), -1)
      for n in range(trained.depth + 1)
    )
    rows = (row - row.mean(0) for row in rows)
    return jnp.stack([jnp.matmul(r, r.T, precision="highest") for r in rows])

  return grams


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A misclassified image, uint8 [S, S, 3]."""

  image: np.ndarray
  label: int
  predicted: int
  probability: float


def score(
  trained: Trained, batches: Iterable[Mapping[str, np.ndarray]], keep: int
) -> tuple[np.ndarray, list[Mistake]]:
  """Classifies all images.

  Args:
    trained: the model.
    batches: from `stream.eval_batches`.
    keep: how many mistakes to return.

  Returns:
    Counts [K, K], rows true and columns predicted; and the mistakes with the
    highest probability, highest first.
  """
  classes = trained.model.num_classes
  counts = np.zeros((classes, classes), np.int64)
  mistakes: list[Mistake] = []
  classify = jax.jit(
    lambda variables, images: jax.nn.softmax(trained.logits(variables, images))
  )
  for batch in batches:
    rows = np.asarray(classify(trained.variables, batch["image"]))
    labels, predicted = batch["label"], rows.argmax(-1)
    mask = batch["mask"]
    counts += np.asarray(step.confusion(labels, predicted, mask, classes))
    mistakes += [
      Mistake(batch["image"][i], labels[i], predicted[i], rows[i].max())
      for i in np.flatnonzero(mask & (labels != predicted))
    ]
    mistakes = sorted(mistakes, key=lambda m: -m.probability)[:keep]
  return counts, mistakes
