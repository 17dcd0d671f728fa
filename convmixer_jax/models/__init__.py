"""Models by name.

A family is a module of this package with these names, and the only way in which
the rest of the code knows its models:

  MODEL              a linen module with attributes `num_classes` and `dtype`,
                     called (images [B, H, W, C], train) -> logits [B, K], and
                     `check(image_size)`, which raises UserError
  VARIANTS           name -> arguments of MODEL; timm's names where it has them
  preprocessing      name or None -> image_size, crop_pct, mean and std that
                     published weights expect
  TORCH_NAMES        rows of timm's module, ours, and the kind of layer; see
                     `interop`
  timm_module        other names that such modules have -> timm's
  infer              params -> the arguments that their shapes imply, or None
  num_patches        params -> number of patches of the images that they are
                     for, or None if it does not matter
  at_resolution      (params, wanted) -> params of an unrolled model, for images
                     of the size that `wanted`'s shapes are for, or UserError
  flops              (model, image_size) -> int, of one image's forward pass
  describe           model -> text for reports

To add one, add its module to `FAMILIES`, and attributes that no other family
has to `config.FIELDS`.
"""

from collections.abc import Mapping
import difflib
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax.errors import UserError
from convmixer_jax.models import convmixer
from convmixer_jax.models import gmlp
from convmixer_jax.models import mlp_mixer
from convmixer_jax.models import mobilenet_v3
from convmixer_jax.models import resmlp
from convmixer_jax.models import resnet
from convmixer_jax.models import vit
from convmixer_jax.models.convmixer import ConvMixer as ConvMixer
from convmixer_jax.models.stack import stack_blocks as stack_blocks
from convmixer_jax.models.stack import unstack_blocks as unstack_blocks

FAMILIES: tuple[types.ModuleType, ...] = (
  convmixer,
  mlp_mixer,
  gmlp,
  resmlp,
  vit,
  resnet,
  mobilenet_v3,
)

VARIANTS: dict[str, dict[str, Any]] = {
  name: arguments
  for family in FAMILIES
  for name, arguments in family.VARIANTS.items()
}


def create_model(
  name: str, num_classes: int = 1000, **overrides: Any
) -> nn.Module:
  """Builds a model by its name.

  Args:
    name: key of a family's `VARIANTS`.
    num_classes: size of the head.
    **overrides: attributes of the model; None keeps the variant's own value.

  Returns:
    An unbound linen module; see `ConvMixer` for its call.

  Raises:
    UserError: no such variant, or an attribute that its family lacks.
  """
  families = {name: family for family in FAMILIES for name in family.VARIANTS}
  if name not in families:
    near = difflib.get_close_matches(name, families, 3, cutoff=0)
    raise UserError(
      f"model.name={name}: unknown; nearest of {len(families)} are"
      f" {', '.join(near)}"
    )
  family = families[name]
  given = {k: v for k, v in overrides.items() if v is not None}
  for field, value in given.items():
    if field not in family.MODEL.__dataclass_fields__:
      raise UserError(
        f"model.{field}={value!r}: {name} has no such field; leave it None"
      )
  return family.MODEL(
    num_classes=num_classes, **(family.VARIANTS[name] | given)
  )


def family_of(model: nn.Module) -> types.ModuleType:
  """The module of `FAMILIES` that `model` belongs to."""
  return next(f for f in FAMILIES if isinstance(model, f.MODEL))


def unrolled(model: nn.Module) -> nn.Module:
  """The same model without `scan`, if it has that attribute."""
  return model.clone(scan=False) if getattr(model, "scan", False) else model


def flops(model: nn.Module, image_size: int) -> int:
  """Floating-point operations of one image's forward pass."""
  return family_of(model).flops(model, image_size)


def describe(model: nn.Module) -> str:
  """One phrase for reports: 'ConvMixer-1536/20, patch 7, kernel 9'."""
  return family_of(model).describe(model)


def infer(
  params: Mapping[str, Any],
) -> tuple[types.ModuleType, dict[str, Any]] | None:
  """Finds the family of an unrolled model's params, and its arguments.

  num_classes is None if there is no head. Returns None if no family matches.
  """
  for family in FAMILIES:
    try:
      found = family.infer(params)
    except (LookupError, ValueError):  # Tensors are missing, or of other ranks.
      continue
    if found is not None:
      return family, found
  return None


def variable_shapes(model: nn.Module, image_size: int = 224) -> dict[str, Any]:
  """{'params', 'batch_stats'} of a model for RGB images, without computing.

  Args:
    model: unbound.
    image_size: side of the images; it matters only to models with variables
      whose shapes depend on it.
  """
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  init = lambda images: model.init(jax.random.key(0), images, train=False)
  return {"batch_stats": {}} | jax.eval_shape(init, images)
