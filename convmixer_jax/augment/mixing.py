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
  """Mixes each image with its mirror in its group: i with n - 1 - i.

  All images of a group share the choice between mixup and cutmix, the weight
  and the box. What a box covers after clipping, not what was drawn, is its
  weight.

  Args:
    key: PRNG key.
    images: uint8 [B, H, W, C].
    targets: float [B, K], probabilities.
    mixup_alpha: of the weight, which is Beta(alpha, alpha); 0: no mixup.
    cutmix_alpha: likewise; 0: no cutmix.
    switch_prob: of cutmix, where both are on.
    group_size: n, divides B; 0: the whole batch is one group.

  Returns:
    uint8 [B, H, W, C] and float [B, K].
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
  first, second = map(
    _log_gamma_variate, jax.random.split(weight_key), [alpha, alpha]
  )
  weight = jax.nn.sigmoid(first - second)  # Beta(alpha, alpha).

  # The box: of the image's shape, its centre anywhere, clipped at the edges.
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
  """Ends of an interval of side * length pixels in [0, length]; int32 [G]."""
  half = jnp.floor(length * side).astype(jnp.int32) // 2
  centre = jax.random.randint(key, side.shape, 0, length)
  return jnp.maximum(centre - half, 0), jnp.minimum(centre + half, length)


def _log_gamma_variate(key, alpha, attempts=16):
  """Log of a Gamma(alpha) variate for each of alpha [G].

  By Marsaglia and Tsang (2000), with a fixed number of attempts, each of which
  is accepted with a probability above 0.95. jax.random.gamma loops until all of
  an array are accepted, for which the devices that share it must communicate.
  """
  normal_key, uniform_key, power_key = jax.random.split(key, 3)
  shape = (*alpha.shape, attempts)
  d = (alpha + 1 - 1 / 3)[:, None]  # Of alpha + 1, scaled down at the end.
  x = jax.random.normal(normal_key, shape)
  v = (1 + x / jnp.sqrt(9 * d)) ** 3
  log_v = jnp.log(jnp.maximum(v, 1e-30))
  log_u = jnp.log1p(-jax.random.uniform(uniform_key, shape))
  accepted = (v > 0) & (log_u < 0.5 * x**2 + d - d * v + d * log_v)
  first = accepted.argmax(1)[:, None]
  log_v = jnp.take_along_axis(log_v, first, axis=1)[:, 0]
  power = jnp.log1p(-jax.random.uniform(power_key, alpha.shape)) / alpha
  return jnp.log(d[:, 0]) + log_v + power
