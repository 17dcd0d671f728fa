"""Models by name.

A family is a module with these names, and the only way in which the rest of the
code knows its models:

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

A module outside this package is a family too: its variants are called
module:variant or path/to/file.py:variant. It needs MODEL and VARIANTS. `infer`
is needed to load its weights without a config, `flops` to plan and for tables,
and TORCH_NAMES for files of PyTorch; all else has a default. Attributes that
`config.FIELDS` lacks are what its variants say.

To add a family to this package, add its module to `FAMILIES`, and attributes
that no other family has to `config.FIELDS`.
"""

from collections.abc import Mapping
import difflib
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convmixer_jax import imports
from convmixer_jax import ops
from convmixer_jax.errors import UserError
from convmixer_jax.models import convmixer
from convmixer_jax.models import gmlp
from convmixer_jax.models import layers
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


# Families outside this package that `find` was asked for, by their module.
_OWN: dict[str, types.ModuleType] = {}
_DEFAULTS = {
  "preprocessing": lambda name: layers.IMAGENET,
  "timm_module": str,
  "num_patches": layers.any_number,
  "at_resolution": layers.any_resolution,
  "describe": lambda model: type(model).__name__,
}


def families() -> tuple[types.ModuleType, ...]:
  """All families: `FAMILIES`, after those outside that this process uses."""
  return *_OWN.values(), *FAMILIES


def is_own(name: Any) -> bool:
  """Whether this names a variant outside this package; see `find`."""
  return isinstance(name, str) and ":" in name


def is_known(name: str) -> bool:
  """Whether `find` needs to import nothing for this name."""
  return any(name in family.VARIANTS for family in families())


def find(name: str) -> tuple[types.ModuleType, dict[str, Any]]:
  """The family of a variant, and the arguments of its model.

  Args:
    name: key of a family's `VARIANTS`, or a module or file and its variant,
      'module:variant', which is imported.

  Raises:
    UserError: no such variant; or no such module, it raises an exception, or it
      is not a family.
  """
  source, _, _ = name.rpartition(":")
  if source and source not in _OWN:
    _OWN[source] = _import_family(name, source)
  known = {
    variant: family
    for family in ((_OWN[source],) if source else FAMILIES)
    for variant in family.VARIANTS
  }
  if name not in known:
    near = difflib.get_close_matches(name, known, 3, cutoff=0)
    raise UserError(
      f"model.name={name}: unknown; nearest of {len(known)} are"
      f" {', '.join(near)}"
    )
  return known[name], known[name].VARIANTS[name]


def _import_family(name, source):
  """The module, whose variants have names that `find` takes."""
  try:
    module, _ = imports.load(name)
  except UserError as e:
    raise UserError(f"model.name={e}") from e
  model, variants = (getattr(module, x, None) for x in ("MODEL", "VARIANTS"))
  is_module = isinstance(model, type) and issubclass(model, nn.Module)
  has = lambda x: hasattr(model, x) or x in model.__dataclass_fields__
  if not is_module or not all(map(has, ("check", "dtype", "num_classes"))):
    text = "MODEL, a linen module with check(image_size), dtype, num_classes"
    raise UserError(f"model.name={name}: {source} lacks {text}")
  if not isinstance(variants, dict) or not variants:
    text = "VARIANTS, a dict: name -> arguments of MODEL"
    raise UserError(f"model.name={name}: {source} lacks {text}")
  family = types.ModuleType(source)
  vars(family).update(_DEFAULTS | vars(module))
  family.VARIANTS = {f"{source}:{k}": v for k, v in variants.items()}
  return family


def require(family: types.ModuleType, *parts: str) -> None:
  """Raises UserError if a family outside this package lacks one of `parts`."""
  for part in parts:
    if part not in vars(family):
      raise UserError(
        f"model.name={next(iter(family.VARIANTS))}: its module has no {part},"
        " which this needs; convmixer_jax/models/__init__.py says what it is"
      )


def create_model(
  name: str, num_classes: int = 1000, **overrides: Any
) -> nn.Module:
  """Builds a model by its name.

  Args:
    name: of a variant; see `find`.
    num_classes: size of the head.
    **overrides: attributes of the model; None keeps the variant's own value.

  Returns:
    An unbound linen module; see `ConvMixer` for its call.

  Raises:
    UserError: no such variant, or an attribute that its family lacks.
  """
  family, arguments = find(name)
  given = {k: v for k, v in overrides.items() if v is not None}
  if lacks := sorted(given.keys() - family.MODEL.__dataclass_fields__.keys()):
    raise UserError(
      f"model.name={name}: no such field: {', '.join(lacks)}; leave it None, as"
      f" with --config.model.{lacks[0]}=None"
    )
  try:
    return family.MODEL(num_classes=num_classes, **(arguments | given))
  except TypeError as e:
    raise UserError(f"model.name={name}: {e}") from e


def family_of(model: nn.Module) -> types.ModuleType:
  """The module of `families` that `model` belongs to."""
  return next(f for f in families() if isinstance(model, f.MODEL))


def unrolled(model: nn.Module) -> nn.Module:
  """The same model without `scan`, if it has that attribute."""
  return model.clone(scan=False) if getattr(model, "scan", False) else model


def flops(model: nn.Module, image_size: int) -> int:
  """Floating-point operations of one image's forward pass."""
  family = family_of(model)
  require(family, "flops")
  return family.flops(model, image_size)


def operations(model: nn.Module) -> str:
  """What computes its convolutions and BatchNorm here: see `ops.chosen`."""
  return ops.chosen(
    getattr(model, "implementation", None),
    model.dtype,
    getattr(model, "kernel_size", None),
  )


def describe(model: nn.Module) -> str:
  """One phrase for reports: 'ConvMixer-1536/20, patch 7, kernel 9'."""
  return family_of(model).describe(model)


def infer(
  params: Mapping[str, Any],
) -> tuple[types.ModuleType, dict[str, Any]] | None:
  """Finds the family of an unrolled model's params, and its arguments.

  num_classes is None if there is no head. Returns None if no family matches.
  """
  for family in families():
    try:
      found = family.infer(params) if "infer" in vars(family) else None
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
