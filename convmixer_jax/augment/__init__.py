"""Augmentation on the device: pure functions of (key, images)."""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from convmixer_jax.augment.geometry import random_flip as random_flip
from convmixer_jax.augment.geometry import (
  random_resized_crop as random_resized_crop,
)


def make_normalize(
  mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array], jax.Array]:
  """Returns images in [0, 255], [..., C] -> float32 of zero mean, unit std.

  Args:
    mean: of each channel, in units of 255 (ImageNet's red: 0.485).
    std: likewise.
  """

  def normalize(images):
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean)) / jnp.array(std)

  return normalize


def make_augment(
  normalize: Callable[[jax.Array], jax.Array],
  *,
  flip: bool,
  crop_scale: Sequence[float] | None,
  crop_ratio: Sequence[float],
  interpolation: str,
):
  """Returns (key, images uint8 [B, H, W, C], targets) -> (floats, targets).

  Args:
    normalize: from `make_normalize`; comes last.
    flip: flip left to right with probability 1/2.
    crop_scale: see `random_resized_crop`; None where the host has cropped.
    crop_ratio: likewise.
    interpolation: likewise.
  """

  def augment(key, images, targets):
    crop_key, flip_key = jax.random.split(key)
    if crop_scale is not None:
      images = random_resized_crop(
        crop_key,
        images,
        scale=crop_scale,
        ratio=crop_ratio,
        interpolation=interpolation,
      )
    if flip:
      images = random_flip(flip_key, images)
    return normalize(images), targets

  return augment
