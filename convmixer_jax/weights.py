"""Variables from wherever they are: a workdir, a file, the Hugging Face Hub."""

from collections.abc import Mapping
import os
from pathlib import Path
import sys
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax

from convmixer_jax import checkpoint
from convmixer_jax import config as config_lib
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError


def load(where: str | os.PathLike) -> dict[str, Any]:
  """Reads {'params', 'batch_stats'} of numpy arrays, as an unrolled model has.

  Args:
    where: a workdir, of which the newest checkpoint is taken, or what
      `interop.load` takes.

  Raises:
    UserError: nothing of the kind is there.
  """
  where = os.path.expanduser(where)
  if not os.path.isdir(where):
    state_dict = interop.load(where)
    try:
      return interop.from_torch(state_dict)
    except UserError as e:
      raise UserError(f"{where}: {e}") from e
  if checkpoint.latest_step(where) is None:
    raise UserError(f"{where}: holds no checkpoints")
  return checkpoint.load_variables(where)


def fit(
  loaded: Mapping[str, Any],
  wanted: Mapping[str, Any],
  name: str,
  *,
  new_head: bool = False,
) -> dict[str, Any]:
  """Checks that variables are those of a model, one by one.

  Args:
    loaded: from `load`, so of an unrolled model.
    wanted: the model's, arrays or shapes; it may be a scanned one.
    name: of `loaded`, for messages.
    new_head: keep `wanted`'s head where `loaded`'s is missing or of another
      shape, and say so.

  Returns:
    {'params', 'batch_stats'}, named as in `wanted`.

  Raises:
    UserError: naming a tensor that is missing, unknown or of another shape.
  """
  has = traverse_util.flatten_dict(loaded, sep="/")
  fresh = traverse_util.flatten_dict(wanted, sep="/")
  shapes = jax.eval_shape(models.unstack_blocks, wanted)
  wants = traverse_util.flatten_dict(shapes, sep="/")
  anew = []
  if new_head:
    for head in [path for path in wants if path.startswith("params/head/")]:
      shape = has[head].shape if head in has else "not"
      if shape != wants[head].shape:
        text = f"{head}: {shape} in {name}; starts anew as {wants[head].shape}"
        anew.append(text)
        has[head] = fresh[head]
  for path in sorted(has.keys() | wants.keys()):
    if path not in has:
      text = f"has no {path}; the model's is {wants[path].shape}"
    elif path not in wants:
      text = f"{path} {has[path].shape} is not in the model"
    elif has[path].shape != wants[path].shape:
      text = f"{path} is {has[path].shape}; the model's is {wants[path].shape}"
    else:
      continue
    raise UserError(f"{name}: {text}")
  for text in anew:
    print(text)
  fitted = traverse_util.unflatten_dict(has, sep="/")
  if "blocks" in wanted["params"]:
    fitted = models.stack_blocks(fitted)
  return {"batch_stats": {}} | fitted


def architecture(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
  """What the tensors tell of an unrolled ConvMixer.

  Args:
    variables: from `load`.
    name: of them, for the message.

  Returns:
    dim, depth, patch_size, kernel_size, and num_classes, None without a head.

  Raises:
    UserError: they are not a ConvMixer's, or of a size that no config may have.
  """
  params = variables.get("params", {})
  head = params.get("head")
  try:
    patch, _, _, dim = params["stem"]["kernel"].shape
    kernel, *_ = params["block_0"]["depthwise"]["kernel"].shape
    classes = head["kernel"].shape[-1] if head else None
  except (KeyError, ValueError, IndexError) as e:
    raise UserError(f"{name}: not a ConvMixer's weights") from e
  found = {
    "dim": dim,
    "depth": sum(module.startswith("block_") for module in params),
    "patch_size": patch,
    "kernel_size": kernel,
  }
  config_lib.check_values(
    {f"model.{k}": v for k, v in found.items()}, f"{name}: "
  )
  return found | {"num_classes": classes}


def warn_of_activation(
  variables: Mapping[str, Any], model: nn.Module, name: str
) -> None:
  """Warns where published weights meet the activation that is not theirs.

  No tensor tells: the 768/32 of the paper has ReLU, the others have GELU.
  """
  variant = _variant(architecture(variables, name))
  if variant is None:
    return
  theirs = models.create_model(variant).activation
  if model.activation != theirs:
    print(
      f"warning: {name}: looks like {variant}, which was trained with {theirs};"
      f" the model has {model.activation}",
      file=sys.stderr,
    )


def _variant(found):
  """The name in VARIANTS of such an architecture, or None."""
  for name, fields in models.VARIANTS.items():
    if all(found[field] == fields[field] for field in
           ("dim", "depth", "patch_size", "kernel_size")):  # fmt: skip
      return name
  return None


def load_model(
  where: str, model_name: str | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """Builds the model that weights belong to.

  Args:
    where: see `load`. A workdir's config says what its model is; of a file,
      the tensors do, and the variant of that size says the activation.
    model_name: a key of `models.VARIANTS`, instead.

  Returns:
    The model, unrolled; its variables; and how its images are made: image_size,
    crop_pct, mean, std, and class_names or None.

  Raises:
    UserError: no such weights, or they are not those of `model_name`.
  """
  variables = load(where)
  data = {
    "image_size": 224,  # As timm has it for the published three.
    "crop_pct": 0.96,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
  }
  folder = Path(where).expanduser()
  if folder.is_dir():
    if model_name is not None:
      raise UserError(f"--model={model_name}: {where} says what its model is")
    config = config_lib.flatten(workdir_lib.read_config(folder))
    wanted = [f"data.{name}" for name in data] + ["model.name"]
    wanted += [name for name in config if name.startswith("model.")]
    config = {name: config.get(name) for name in wanted}
    config_lib.check_values(config, f"{folder / 'config.json'}: ")
    data = {name: config[f"data.{name}"] for name in data}
    classes = architecture(variables, where)["num_classes"]
    overrides = {
      name.removeprefix("model."): value
      for name, value in config.items()
      if name.startswith("model.")
    }
    model = models.create_model(
      num_classes=classes, **overrides | {"scan": False}
    )
  else:
    found = architecture(variables, where)
    classes = found["num_classes"]
    if classes is None:
      raise UserError(f"{where}: has no head, so it tells no classes")
    name = model_name or _variant(found)
    if name is None:
      model = models.ConvMixer(**found)
    else:
      model = models.create_model(name, num_classes=classes)
    warn_of_activation(variables, model, where)
  variables = fit(variables, models.variable_shapes(model), where)
  return model, variables, data | {"class_names": _class_names(folder, classes)}


def _class_names(folder, classes):
  own = folder / "classes.txt"
  builtin = Path(__file__).parent / "data" / "imagenet_names.txt"
  for path in (own, builtin):
    if path.exists():
      try:
        names = path.read_text().splitlines()
      except (OSError, ValueError) as e:
        raise UserError(f"{path}: {e}") from e
      if len(names) == classes:
        return names
  return None
