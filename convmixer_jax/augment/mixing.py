"""Mixup and cutmix, as timm's FastCollateMixup does them on uint8 images."""

import jax
import jax.numpy as jnp


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  switch_prob: float,
  group_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Mixes image i of each group of n images with image n - 1 - i.

  All images of a group share the choice between mixup and cutmix, the weight
  and the box. The weight of cutmix is the area that the box covers after it was
  clipped at the image's edges.

  Args:
    key: PRNG key.
    images: uint8 [B, H, W, C], like the result.
    targets: float [B, K], probabilities, like the result.
    mixup_alpha: the weight is drawn from Beta(alpha, alpha); 0 disables mixup.
    cutmix_alpha: the same for cutmix.
    switch_prob: probability of cutmix, if both are enabled.
    group_size: n, a divisor of B; 0 makes the whole batch one group.
  """
  if not mixup_alpha and not cutmix_alpha:
    return images, targets
  batch, height, width, _ = images.shape
  size = group_size or batch
  groups = batch // size
  switch_key, weight_key, y_key, x_key = jax.random.split(key, 4)
  if mixup_alpha and cutmix_alpha:
    is_cutmix = jax.random.bernoulli(switch_key, switch_prob, (groups,))
  else:
    is_cutmix = jnp.full(groups, bool(cutmix_alpha))
  alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha)
  keys = jax.random.split(weight_key)
  first, second = (_log_gamma_variate(key, alpha) for key in keys)
  weight = jax.nn.sigmoid(first - second)  # Beta(alpha, alpha).

  # The box has the image's aspect ratio and its centre anywhere in the image.
  side = jnp.sqrt(1 - weight)
  y_low, y_high = _interval(y_key, side, height)
  x_low, x_high = _interval(x_key, side, width)
  covered = (y_high - y_low) * (x_high - x_low)
  kept = 1 - covered.astype(jnp.float32) / (height * width)
  weight = jnp.where(is_cutmix, kept, weight)

  of_group = lambda values: values.reshape(groups, 1, 1, 1, 1)
  y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
  in_box = (of_group(y_low) <= y) & (y < of_group(y_high))
  in_box &= (of_group(x_low) <= x) & (x < of_group(x_high))

  first = images.reshape(groups, size, *images.shape[1:])
  second = first[:, ::-1]
  w = of_group(weight)
  mixed = jnp.round(first * w + second * (1 - w)).astype(jnp.uint8)
  cut = jnp.where(in_box, second, first)
  images = jnp.where(of_group(is_cutmix), cut, mixed).reshape(images.shape)

  first = targets.reshape(groups, size, -1)
  w = weight[:, None, None]
  mixed = first * w + first[:, ::-1] * (1 - w)
  return images, mixed.reshape(targets.shape)


def _interval(key, side, length):
  """Start and end of a random interval of side * length pixels: int32 [G]."""
  half = jnp.floor(length * side).astype(jnp.int32) // 2
  centre = jax.random.randint(key, side.shape, 0, length)
  return jnp.maximum(centre - half, 0), jnp.minimum(centre + half, length)


def _log_gamma_variate(key, alpha):
  """The logarithms of Gamma(alpha) variates, for alpha [G].

  By the method of Marsaglia and Tsang (2000), with 16 attempts, each accepted
  with a probability above 0.95. jax.random.gamma repeats until the whole array
  is accepted. For a sharded array, this needs communication.
  """
  normal_key, uniform_key, power_key = jax.random.split(key, 3)
  shape = (*alpha.shape, 16)
  # A variate of alpha + 1, which the last line scales down to alpha.
  d = (alpha + 1 - 1 / 3)[:, None]
  x = jax.random.normal(normal_key, shape)
  v = (1 + x / jnp.sqrt(9 * d)) ** 3
  log_v = jnp.log(jnp.maximum(v, 1e-30))
  log_u = jnp.log1p(-jax.random.uniform(uniform_key, shape))
  accepted = (v > 0) & (log_u < 0.5 * x**2 + d - d * v + d * log_v)
  first = accepted.argmax(1)[:, None]
  log_v = jnp.take_along_axis(log_v, first, axis=1)[:, 0]
  power = jnp.log1p(-jax.random.uniform(power_key, alpha.shape)) / alpha
  return jnp.log(d[:, 0]) + log_v + power
