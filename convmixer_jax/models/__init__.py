"""Models by name."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp

from convmixer_jax.errors import UserError
from convmixer_jax.models.convmixer import ConvMixer as ConvMixer
from convmixer_jax.models.stack import stack_blocks as stack_blocks
from convmixer_jax.models.stack import unstack_blocks as unstack_blocks


def _convmixer(dim, depth, patch_size, kernel_size, **more):
  return dict(
    dim=dim,
    depth=depth,
    patch_size=patch_size,
    kernel_size=kernel_size,
    **more,
  )


# Every size of the paper's tables, named dim_depth; the published three have
# timm's names. 256_8 and 128_4 are the CIFAR-10 models. The table that each
# comes from has other patches and kernels too: those are overrides.
VARIANTS: dict[str, dict[str, Any]] = {
  "convmixer_1536_20": _convmixer(1536, 20, 7, 9),
  "convmixer_768_32": _convmixer(768, 32, 7, 7, activation="relu"),
  "convmixer_1024_20_ks9_p14": _convmixer(1024, 20, 14, 9),
  "convmixer_1024_16": _convmixer(1024, 16, 7, 9),
  "convmixer_1024_12": _convmixer(1024, 12, 7, 8),
  "convmixer_512_16": _convmixer(512, 16, 7, 8),
  "convmixer_512_12": _convmixer(512, 12, 7, 8),
  "convmixer_256_8": _convmixer(256, 8, 1, 9),
  "convmixer_128_4": _convmixer(128, 4, 1, 8),
}


def create_model(
  name: str, num_classes: int = 1000, **overrides: Any
) -> ConvMixer:
  """Builds a model of `VARIANTS`.

  Args:
    name: key of `VARIANTS`.
    num_classes: size of the head.
    **overrides: attributes of the model; None keeps the variant's own value.

  Returns:
    An unbound linen module; see `ConvMixer` for its call.

  Raises:
    UserError: no such variant, or an attribute that its family lacks.
  """
  if name not in VARIANTS:
    near = difflib.get_close_matches(name, VARIANTS, 1, cutoff=0)[0]
    raise UserError(
      f"model.name={name}: unknown; nearest is {near}; known are"
      f" {', '.join(VARIANTS)}"
    )
  given = {k: v for k, v in overrides.items() if v is not None}
  fields = ConvMixer.__dataclass_fields__
  for field in given:
    if field not in fields:
      raise UserError(f"model.{field}: {name} has no such field")
  return ConvMixer(num_classes=num_classes, **(VARIANTS[name] | given))


def variable_shapes(model: ConvMixer) -> dict[str, Any]:
  """{'params', 'batch_stats'} of a model for RGB images, without computing."""
  images = jnp.zeros((1, model.patch_size, model.patch_size, 3))
  init = lambda: model.init(jax.random.key(0), images, train=False)
  return {"batch_stats": {}} | jax.eval_shape(init)


def forward_flops(model: ConvMixer, image_size: int) -> int:
  """Floating-point operations of one image's forward pass.

  A multiply-add is two. Convolutions and the head are counted; activations,
  norms, residuals and biases, under 1 %, are not.
  """
  side = image_size // model.patch_size
  stem = 3 * model.patch_size**2 * model.dim
  block = model.kernel_size**2 * model.dim + model.dim**2
  locations = side**2 * (stem + model.depth * block)
  return 2 * (locations + model.dim * model.num_classes)
