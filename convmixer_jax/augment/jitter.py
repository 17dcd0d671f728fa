"""Colour jitter, as torchvision defines it."""

import jax
import jax.numpy as jnp

from convmixer_jax.augment import stages

OPS = ("Brightness", "Contrast", "Color")


def color_jitter(
  key: jax.Array, images: jax.Array, strength: float
) -> jax.Array:
  """torchvision's ColorJitter of uint8 [B, H, W, 3], with hue left alone.

  Changes brightness, contrast and saturation in random order. Each factor is
  uniform in [max(0, 1 - strength), 1 + strength], where strength >= 0.
  """
  order, factors = draw(key, images.shape[0], strength)

  def stage(drawn):
    op_index, factor = drawn
    chosen = {op: op_index == i for i, op in enumerate(OPS)}
    return chosen, factor, None

  return stages.apply_stages(images, stage, (order.T, factors.T))


def draw(
  key: jax.Array, batch: int, strength: float
) -> tuple[jax.Array, jax.Array]:
  """Per image: order of the operations, int [B, 3]; factors, float [B, 3]."""
  order_key, factor_key = jax.random.split(key)
  order = jnp.tile(jnp.arange(3), (batch, 1))
  order = jax.random.permutation(order_key, order, axis=1, independent=True)
  factors = jax.random.uniform(
    factor_key, (batch, 3), minval=max(0.0, 1 - strength), maxval=1 + strength
  )
  return order, factors
