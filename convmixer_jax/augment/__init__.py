"""Augmentation, inside the train step; for TPUs, partly before it.

All functions are pure; their randomness comes from a PRNG key. See
`Recipe.host` for TPUs.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from convmixer_jax.augment.erasing import random_erasing as random_erasing
from convmixer_jax.augment.geometry import random_flip as random_flip
from convmixer_jax.augment.geometry import (
  random_resized_crop as random_resized_crop,
)
from convmixer_jax.augment.jitter import color_jitter as color_jitter
from convmixer_jax.augment.mixing import mix as mix
from convmixer_jax.augment.randaugment import apply_policy as apply_policy
from convmixer_jax.augment.randaugment import parse as parse
from convmixer_jax.augment.rows import Rows as Rows


def make_normalize(
  mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function from images to float32 of zero mean and unit variance.

  It takes images [..., C] with values in [0, 255]. The channels' means and
  standard deviations are fractions of 255 (0.485 is ImageNet's mean red).
  """

  def normalize(images):
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean)) / jnp.array(std)

  return normalize


def make_policy(
  config: Mapping[str, Any], *, mean: Sequence[float], crop: bool = True
) -> Callable[..., jax.Array]:
  """Returns the first part of `make_augment`: crop, flip and RandAugment.

  It maps (key, images uint8 [R, H, W, C], rows) to images of the same shape.
  `rows` are those of the batch that the images are; None: all. For the other
  arguments see `make_augment`.
  """
  policy = parse(config["randaugment"]) if config["randaugment"] else None
  fill = [round(255 * m) for m in mean] if policy and policy.smooth else [0] * 3

  def apply(key, images, rows=None):
    keys = jax.random.split(key, 6)
    if crop and (*config["crop_scale"], *config["crop_ratio"]) != (1, 1, 1, 1):
      images = random_resized_crop(
        keys[0],
        images,
        scale=config["crop_scale"],
        ratio=config["crop_ratio"],
        interpolation=config["interpolation"],
        rows=rows,
      )
    if config["flip"]:
      images = random_flip(keys[1], images, rows)
    if policy:
      images = apply_policy(keys[2], images, policy, fill, rows)
    return images

  return apply


def make_augment(
  config: Mapping[str, Any],
  *,
  mean: Sequence[float],
  std: Sequence[float],
  crop: bool = True,
  policy: bool = True,
):
  """Returns a function that augments and normalises a batch.

  It maps (key, images uint8 [B, H, W, C], targets float [B, K]) to
  (images float32 [B, H, W, C], targets).

  Args:
    config: the config's `augment`; see `config.FIELDS`. label_smoothing is not
      used here.
    mean: see `make_normalize`. timm's RandAugment fills with this colour,
      torchvision's with black.
    std: see `make_normalize`.
    crop: False if the host has cropped the images already.
    policy: False if `make_policy`'s function was applied already.
  """
  normalize = make_normalize(mean, std)
  first = make_policy(config, mean=mean, crop=crop) if policy else None

  def augment(key, images, targets):
    keys = jax.random.split(key, 6)
    if first:
      images = first(key, images)
    if config["color_jitter"]:
      images = color_jitter(keys[3], images, config["color_jitter"])
    images, targets = mix(
      keys[4],
      images,
      targets,
      mixup_alpha=config["mixup_alpha"],
      cutmix_alpha=config["cutmix_alpha"],
      switch_prob=config["cutmix_prob"],
      group_size=config["mix_group_size"],
    )
    images = normalize(images)
    if config["erase_prob"]:
      images = random_erasing(
        keys[5],
        images,
        prob=config["erase_prob"],
        mode=config["erase_mode"],
        area=config["erase_area"],
        aspect=config["erase_aspect"],
      )
    return images, targets

  return augment
