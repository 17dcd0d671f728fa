"""Operations on pixels, one after the other; each image has its own.

On CPUs, `ops/augment.cc` computes only those that were drawn for an image.
Elsewhere, and without a compiler, XLA computes all of them for every image.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from convmixer_jax.augment import color
from convmixer_jax.augment import geometry
from convmixer_jax.ops import native

GEOMETRIC_OPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

# The operations' numbers in augment.cc.
_CODES = {
  op: code for code, op in enumerate((*color.TABLE_OPS, *color.ENHANCE_OPS), 1)
}
_CODES |= dict.fromkeys(GEOMETRIC_OPS, len(_CODES) + 1)


# The operations of one stage: operation -> bool [B], the images to which it is
# applied; their arguments, float32 [B]; and `geometry.affine`'s bicubic. The
# operations are `color.TABLE_OPS`, `color.ENHANCE_OPS`, `GEOMETRIC_OPS` and
# 'Identity'. Arguments: Rotate: degrees, counter-clockwise. ShearX, ShearY:
# pixels per pixel. TranslateX, TranslateY: pixels to the left and up. For the
# others, see `color`.
Stage = tuple[Mapping[str, jax.Array], jax.Array, jax.Array | None]


def apply_stages(
  images: jax.Array,
  draw: Callable[[Any], Stage],
  xs: Any,
  fill: Sequence[int] = (0, 0, 0),
) -> jax.Array:
  """Applies one operation, or none, to each image in each stage.

  Args:
    images: uint8 [B, H, W, 3], like the result.
    draw: one of `xs` -> `Stage`.
    xs: array or tree of arrays, along whose first axis are the stages.
    fill: RGB of the pixels that geometric operations take from outside an
      image.
  """

  def drawn(x):
    chosen, args, bicubic = draw(x)
    return chosen, args, _matrix(chosen, args, images.shape), bicubic

  # In a loop: drawn all at once, they would be rounded in another way, and a
  # few pixels of every run with them.
  chosen, args, matrix, bicubic = jax.lax.map(drawn, xs)
  if native.on_cpu():
    code = sum(_CODES.get(op, 0) * mask for op, mask in chosen.items())
    filters = jnp.zeros_like(code) if bicubic is None else 1 + bicubic
    (images,) = native.call(
      "stages",
      images,
      code.astype(jnp.int32),
      args.astype(jnp.float32),
      matrix.reshape(*code.shape, 6).astype(jnp.float32),
      filters.astype(jnp.int32),
      jnp.array(fill, jnp.int32),
    )
    return images
  # With a scan, the operations are compiled only once.
  images, _ = jax.lax.scan(
    lambda images, stage: (_apply(images, *stage, fill), None),
    images,
    (chosen, args, matrix, bicubic),
  )
  return images


def _apply(images, chosen, args, matrix, bicubic, fill):
  """One stage of `apply_stages`."""
  of = lambda ops: {op: chosen[op] for op in ops if op in chosen}
  if table_ops := of(color.TABLE_OPS):
    images = color.lookup(images, table_ops, args)
  if enhance_ops := of(color.ENHANCE_OPS):
    images = color.enhance(images, enhance_ops, args)
  if geometric_ops := of(GEOMETRIC_OPS):
    moved = geometry.affine(images, matrix, fill, bicubic)
    any_chosen = sum(geometric_ops.values()) > 0
    images = jnp.where(any_chosen[:, None, None, None], moved, images)
  return images


def _matrix(chosen, args, shape):
  """`geometry.affine`'s matrices: float32 [B, 2, 3]."""
  arg_of = lambda op: jnp.where(chosen.get(op, False), args, 0.0)
  angle = arg_of("Rotate") * (math.pi / 180)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = shape[2] / 2, shape[1] / 2
  xx, xy = cos, arg_of("ShearX") - sin
  yx, yy = arg_of("ShearY") + sin, cos
  dx = arg_of("TranslateX") + x - cos * x + sin * y
  dy = arg_of("TranslateY") + y - sin * x - cos * y
  return jnp.stack([xx, xy, dx, yx, yy, dy], -1).reshape(-1, 2, 3)
