"""Loads variables from workdirs, files and the Hugging Face Hub; saves them."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
import sys
import types
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
import safetensors.numpy

from convmixer_jax import checkpoint
from convmixer_jax import classes
from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError

# Fields that `save` leaves out: the variant's name, which it adds, and how a
# model is trained or run, which is not part of it.
_NOT_SAVED = ("model.name", "model.bn_group_size", "model.dtype",
              "model.implementation", "model.remat", "model.scan")  # fmt: skip


def load(where: str | os.PathLike) -> dict[str, Any]:
  """Reads {'params', 'batch_stats'} of an unrolled model, as numpy arrays.

  Args:
    where: a workdir, whose newest checkpoint is read, or what `interop.load`
      accepts.

  Raises:
    UserError: no weights are there, or they cannot be read.
  """
  where = os.fspath(files.path(where))
  if not files.is_folder(where):
    state_dict = interop.load(where)
    try:
      return interop.from_torch(state_dict)
    except UserError as e:
      raise UserError(f"{where}: {e}") from e
  if checkpoint.latest_step(where) is None:
    raise UserError(f"{where}: holds no checkpoints")
  return checkpoint.load_variables(where)


def match(
  loaded: Mapping[str, Any],
  wanted: Mapping[str, Any],
  name: str,
  *,
  class_names: Sequence[str] | None = None,
  new_head: bool = False,
) -> dict[str, Any]:
  """Fits variables to the image size, and checks them tensor by tensor.

  Args:
    loaded: from `load`; those of an unrolled model.
    wanted: the model's variables, arrays or shapes; it may be a scanned one.
    name: where `loaded` is from.
    class_names: of the data; see `classes.check`.
    new_head: if `loaded` has no head or one of another shape, take it from
      `wanted`, and print that.

  Returns:
    {'params', 'batch_stats'}, named as in `wanted` and of its types.

  Raises:
    UserError: a tensor is missing, unknown or of another shape; the weights are
      another family's, of other classes, or fit another image size alone.
  """
  shapes = jax.eval_shape(models.unstack_blocks, wanted)
  known, model = (models.infer(x.get("params", {})) for x in (loaded, shapes))
  if known and model:
    theirs, ours = known[0].MODEL.__name__, model[0].MODEL.__name__
    if theirs != ours:
      raise UserError(
        f"{name}: the weights of a {theirs}; the model is a {ours}"
      )
    try:
      params = known[0].at_resolution(loaded["params"], shapes["params"])
    except UserError as e:
      raise UserError(f"{name}: {e}") from e
    loaded = {**loaded, "params": params}
  has = traverse_util.flatten_dict(loaded, sep="/")
  fresh = traverse_util.flatten_dict(wanted, sep="/")
  wants = traverse_util.flatten_dict(shapes, sep="/")
  size = lambda tree: getattr(tree.get("params/head/bias"), "size", "no")
  theirs, ours = size(has), size(wants)
  anew = [
    path
    for path in wants
    if new_head and path.startswith("params/head/")
    if path not in has or has[path].shape != wants[path].shape
  ]
  has |= {path: fresh[path] for path in anew}
  for path in sorted(has.keys() | wants.keys()):
    if path not in has:
      text = f"has no {path}; the model's is {wants[path].shape}"
    elif path not in wants:
      text = f"{path} {has[path].shape} is not in the model"
    elif has[path].shape == wants[path].shape:
      has[path] = has[path].astype(wants[path].dtype, copy=False)
      continue
    elif path == "params/head/bias":
      names = f" ({classes.listed(class_names)})" if class_names else ""
      text = (
        f"the weights have {theirs} classes, the data {ours}{names}: evaluate"
        " on data of the weights' classes, or train on these with"
        " config.init_from, which starts a new head"
      )
    else:
      text = f"{path} is {has[path].shape}; the model's is {wants[path].shape}"
    sizes = model[1] if known and model else {}
    told = ", ".join(
      f"{k} is {known[1][k]} there and {v} here"
      for k, v in sizes.items()
      if k != "num_classes" and known[1].get(k, v) != v
    )
    raise UserError(f"{name}: {text}" + (f" ({told})" if told else ""))
  if anew and jax.process_index() == 0:
    print(
      f"init_from: the weights have {theirs} classes, the data {ours}: the head"
      " starts anew"
    )
  if class_names and not anew:
    classes.check(name, class_names, trains=new_head)
  fitted = traverse_util.unflatten_dict(has, sep="/")
  if "blocks" in wanted["params"]:
    fitted = models.stack_blocks(fitted)
  return {"batch_stats": {}} | fitted


def load_init_from(
  init_from: str,
  model: nn.Module,
  wanted: Mapping[str, Any],
  **options: Any,
) -> dict[str, Any]:
  """Loads the weights that `config.init_from` names; see `match`."""
  name = os.fspath(files.path(init_from))
  folder = files.is_folder(name)
  try:
    if not folder:
      models.require(models.family_of(model), "TORCH_NAMES")
    loaded = load(name)
    matched = match(loaded, wanted, name, **options)
  except UserError as e:
    raise UserError(f"config.init_from={e}") from e
  if not folder:
    _warn_of_other_arguments(loaded, model, name)
  return matched


def architecture(
  variables: Mapping[str, Any], name: str
) -> tuple[types.ModuleType, dict[str, Any]]:
  """The family of an unrolled model, and the arguments that its shapes imply.

  Args:
    variables: from `load`.
    name: where they are from, for the message.

  Returns:
    One of `models.families`, and arguments of its model. num_classes is None
    where there is no head.

  Raises:
    UserError: no family has such tensors, or a size is out of range.
  """
  known = models.infer(variables.get("params", {}))
  if known is None:
    families = " or ".join(f.MODEL.__name__ for f in models.families())
    raise UserError(f"{name}: not the weights of a {families}")
  sizes = {f"model.{k}": v for k, v in known[1].items()}
  sizes = {k: v for k, v in sizes.items() if k in config_lib.FIELDS}
  config_lib.check_values(sizes, f"{name}: ")
  return known


def _variant(family, found):
  """The name of the published variant with such arguments, or None."""
  for name, arguments in family.VARIANTS.items():
    if all(found[k] == v for k, v in arguments.items() if k in found):
      return name
  return None


def _warn_of_other_arguments(variables, model, name):
  """Warns if the model differs from the published one that has these shapes.

  No tensor tells the activation: the paper's 768/32 has ReLU, others GELU.
  """
  known = models.infer(variables["params"])
  if known is None:  # A family of one's own may lack `infer`.
    return
  family, found = known
  variant = _variant(family, found)
  if variant is None or not isinstance(model, family.MODEL):
    return
  published = models.create_model(variant)
  untold = {k for v in family.VARIANTS.values() for k in v} - found.keys()
  for field in sorted(untold):
    theirs, ours = getattr(published, field), getattr(model, field)
    if theirs != ours:
      print(
        f"warning: {name}: looks like {variant}, which was trained with"
        f" {field}={theirs}; the model has {field}={ours}",
        file=sys.stderr,
      )


def load_model(
  where: str, model_name: str | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """Builds the model that weights belong to.

  Args:
    where: see `load`. A workdir's config defines its model, and so does the
      header of a file that `save` wrote. Another file's tensors imply the
      sizes, and the published variant of these sizes the rest.
    model_name: of a variant, for a file; see `models.find`.

  Returns:
    The model, unrolled; its variables; and the preprocessing of its images:
    image_size, crop_pct, mean, std, and class_names or None.

  Raises:
    UserError: no such weights, or they do not belong to `model_name`.
  """
  own, is_folder = models.is_own(model_name), files.is_folder(where)
  if own:
    models.find(model_name)
  variables = load(where)
  if is_folder:
    if model_name is not None:
      raise UserError(
        f"--model={model_name}: omit it; {where} has a config that names it"
      )
    origin = files.path(where) / "config.json"
    config = config_lib.flatten(workdir_lib.read_config(where))
  else:
    origin = where
    config = interop.read_header(where) if own or not model_name else None
  name = config.get("model.name") if config else model_name
  if models.is_own(name):
    told = not own or name == model_name
    if not is_folder and not (told and models.is_known(name)):
      # Reading a file must not run code that the user did not name.
      raise UserError(f"{where}: holds {name}; pass --model={name}")
    models.require(models.find(name)[0], "infer")
  family, found = architecture(variables, where)
  count = found["num_classes"]
  if count is None and not is_folder:
    raise UserError(f"{where}: has no head, so its classes are unknown")
  if config is not None:
    of = lambda section, names: {k: config.get(f"{section}.{k}") for k in names}
    data = of("data", family.preprocessing(None))
    arguments = of(
      "model",
      ["name"] + [k[6:] for k in config if k.startswith("model.")],
    )
    config_lib.check_values(
      {f"data.{k}": v for k, v in data.items()}
      | {f"model.{k}": v for k, v in arguments.items()},
      f"{origin}: ",
    )
    try:
      model = models.create_model(**arguments | {"num_classes": count})
    except UserError as e:
      raise UserError(f"{origin}: {e}") from e
    model = models.unrolled(model)
  else:
    name = model_name or _variant(family, found)
    data = family.preprocessing(name)
    if (patches := family.num_patches(variables["params"])) is not None:
      side = math.isqrt(patches) * found["patch_size"]
      data = {**data, "image_size": side}
    if name is None:
      model = family.MODEL(**found)
    else:
      model = models.create_model(name, num_classes=count)
    _warn_of_other_arguments(variables, model, where)
  wanted = models.variable_shapes(model, data["image_size"])
  variables = match(variables, wanted, where)
  names = classes.told(where, config, count)
  if names is None and count == len(classes.imagenet()):
    names = classes.imagenet()
  return model, variables, data | {"class_names": names}


def save(
  path: str | os.PathLike,
  model: nn.Module,
  variables: Mapping[str, Any],
  data: Mapping[str, Any],
) -> None:
  """Writes a safetensors file with timm's names of the tensors.

  Its header tells `load_model` the rest: the arguments of the model, the
  preprocessing and the names of the classes.

  Args:
    path: of the file.
    model: as `load_model` returns it, like the others.
    variables: of the model.
    data: the preprocessing of its images.

  Raises:
    UserError: the file cannot be written, or timm's model lacks a tensor.
  """
  variants = models.family_of(model).VARIANTS
  known = filter(None, (_arguments(model, name) for name in variants))
  told = min(known, key=len)
  told |= {k if k == "class_names" else f"data.{k}": v for k, v in data.items()}
  metadata = {"format": "pt", interop.HEADER: json.dumps(told)}
  content = safetensors.numpy.save(interop.to_torch(variables), metadata)
  try:
    Path(path).write_bytes(content)
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e


def _arguments(model, name):
  """A variant, and the fields in which a model differs from it.

  None if it also differs in an attribute that is no field.
  """
  variant, told = models.create_model(name), {"model.name": name}
  for attribute in models.find(name)[1]:
    if f"model.{attribute}" not in config_lib.FIELDS and (
      getattr(model, attribute) != getattr(variant, attribute)
    ):
      return None
  for field in config_lib.FIELDS:
    section, _, attribute = field.partition(".")
    is_saved = section == "model" and field not in _NOT_SAVED
    if is_saved and hasattr(variant, attribute):
      value = getattr(model, attribute)
      if value != getattr(variant, attribute):
        told[field] = value
  return told
