"""Reads PyTorch's weight files, and converts their names to ours and back."""

from collections.abc import Mapping
import itertools
import json
import logging
import os
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from convmixer_jax import files
from convmixer_jax import models
from convmixer_jax import torch_pickle
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

# A row of a family's TORCH_NAMES is (timm's module, ours, kind). The kind says
# what the module's arrays are called (PyTorch's name -> collection, ours), and
# how they are turned (from PyTorch's [out, in, ...] to ours, and back). Rows of
# kind "array" name an array, not a module.
_NAMES = {
  "norm": {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
  },
  "affine": {"alpha": ("params", "scale"), "beta": ("params", "bias")},
  "array": {"": ("params", "")},
}
_LAYER = {"weight": ("params", "kernel"), "bias": ("params", "bias")}
_TURNS = {
  ("conv", "kernel"): (
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
  ),
  ("pointwise", "kernel"): (
    lambda x: x.reshape(x.shape[:2]).T,  # Only if it is 1 x 1.
    lambda x: x.T[:, :, None, None],
  ),
  ("linear", "kernel"): (lambda x: x.T, lambda x: x.T),
  ("affine", "scale"): (lambda x: x[0, 0], lambda x: x[None, None]),
  ("affine", "bias"): (lambda x: x[0, 0], lambda x: x[None, None]),
}
_AS_IT_IS = (lambda x: x,) * 2


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a PyTorch model's state_dict to our variables.

  Args:
    state_dict: name -> array (or CPU tensor), of timm's model of any family, or
      of the nn.Sequential in the paper and in the authors' CIFAR-10 script.

  Returns:
    {'params', 'batch_stats'} of numpy arrays, float32 whatever the type there,
    for an unrolled model.

  Raises:
    UserError: a name that the family lacks, or a tensor that does not fit it.
  """
  state_dict = _without_prefix({k: _array(x) for k, x in state_dict.items()})
  # Whole numbers without a dimension count batches or updates.
  names = [
    name
    for name, x in state_dict.items()
    if x.ndim or jnp.issubdtype(x.dtype, jnp.floating)
    if not name.endswith(".num_batches_tracked")
  ]
  # The family is the one that knows most of the names.
  candidates = [
    (family, {name: _to_ours(family, name) for name in names})
    for family in models.families()
    if "TORCH_NAMES" in vars(family)
  ]
  family, found = max(
    candidates, key=lambda c: sum(path is not None for path in c[1].values())
  )
  flat = {}
  for name, match in found.items():
    if match is None:
      model = family.MODEL.__name__
      raise UserError(
        f"{name}: not a tensor of timm's {model}; if the model is your own,"
        " name it: MODULE:VARIANT"
      )
    path, kind = match
    value = state_dict[name]
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f"{name}: of {value.dtype}, not floating-point")
    value = value.astype(np.float32, copy=False)
    try:
      value = _TURNS.get((kind, path[-1]), _AS_IT_IS)[0](value)
    except (ValueError, IndexError) as e:
      raise UserError(f"{name}: {value.shape} is no {kind} {path[-1]}'s") from e
    flat[path] = value
  return traverse_util.unflatten_dict(flat)


def _array(x):
  """A numpy array of an array or a tensor."""
  brain = str(getattr(x, "dtype", "")) == "torch.bfloat16"  # numpy lacks it.
  return np.asarray(x.float() if brain else x)


def _to_ours(family, name):
  """Our path of a timm tensor, and the kind of its layer; None if unknown.

  'blocks.2.1.weight' -> ('params', 'block_2', 'pointwise', 'kernel'),
  'pointwise'.
  """
  module, _, leaf = name.rpartition(".")
  module = family.timm_module(module)
  for theirs, ours, kind in family.TORCH_NAMES:
    names = _NAMES.get(kind, _LAYER)
    where, what = (name, "") if kind == "array" else (module, leaf)
    path = _renamed(where, theirs, ours)
    if path and what in names:
      collection, our_leaf = names[what]
      return tuple(
        f"{collection}/{path}/{our_leaf}".strip("/").split("/")
      ), kind
  return None


def _renamed(name, pattern, target):
  """'a.2.b', 'a.{i}.b', 'x_{i}' -> 'x_2'; None if the pattern does not fit."""
  regex = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(pattern))
  match = re.fullmatch(regex, name)
  return match and target.format(**match.groupdict())


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Converts our variables, scanned or not, to timm's state_dict.

  Raises:
    UserError: no family has such variables.
  """
  variables = models.unstack_blocks(variables)
  known = models.infer(variables["params"])
  if known is None:
    raise UserError("not the variables of a known model")
  models.require(known[0], "TORCH_NAMES")
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    name, kind = _to_theirs(known[0], path)
    if name is None:
      raise UserError(f"{'/'.join(path)}: timm's model has no such tensor")
    value = _TURNS.get((kind, path[-1]), _AS_IT_IS)[1](np.asarray(value))
    # safetensors would write a transposed array's buffer in the wrong order.
    state_dict[name] = np.ascontiguousarray(value)
  return state_dict


def _to_theirs(family, path):
  """The inverse of `_to_ours`."""
  collection, *modules, leaf = path
  for theirs, ours, kind in family.TORCH_NAMES:
    if kind == "array":
      if name := _renamed("/".join([*modules, leaf]), ours, theirs):
        return name, kind
      continue
    leaves = {ours: name for name, ours in _NAMES.get(kind, _LAYER).items()}
    name = _renamed("/".join(modules), ours, theirs)
    if name and (collection, leaf) in leaves:
      return f"{name}.{leaves[collection, leaf]}", kind
  return None, None


# --- Files.

# What training scripts call the weights in their checkpoints; averages first.
_WEIGHTS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model",
            "model_state_dict")  # fmt: skip
_HUB_FILE = "model.safetensors"
HEADER = "convmixer_jax"  # The text in a safetensors file's metadata.
# Modules that hold another one: of DataParallel and of torch.compile.
_WRAPPERS = ("module", "_orig_mod")


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors in a file. Never executes code that the file holds.

  Args:
    path: a safetensors file, a PyTorch checkpoint (in the current zip format or
      the one before torch 1.6) with any suffix, or hf-hub:OWNER/NAME for the
      model.safetensors of a model on the Hugging Face Hub.

  Returns:
    name -> array, without a prefix that all names share. Of a training
    checkpoint, the moving averages of the weights if it has them, otherwise the
    weights. What is no tensor is left out.

  Raises:
    UserError: the file does not exist, is damaged or of another format, or it
      holds several models.
  """
  path = os.fspath(path)
  if re.fullmatch("hf-hub:[^/]+/[^/]+", path):
    path = _download(path)
  path = os.fspath(files.local(path))
  try:
    # Opening a FIFO would wait for a writer.
    if os.path.exists(path) and not os.path.isfile(path):
      raise UserError(f"{path}: not a file")
    with open(path, "rb") as file:
      start = file.read(9)
    # safetensors first: the length of its header may look like the others.
    if start[8:] == b"{":
      found = safetensors.numpy.load_file(path)
    elif start[:4] == b"PK\x03\x04":
      found = torch_pickle.load_zip(path)
    elif start[:1] == b"\x80":
      found = torch_pickle.load_legacy(path)
    else:
      raise UserError(f"{path}: neither a PyTorch checkpoint nor safetensors")
  except MemoryError as e:
    raise UserError(f"{path}: too large for this machine's memory") from e
  except OSError as e:
    text = f"{path}: {e.strerror or e}"
    if ":" in path and isinstance(e, FileNotFoundError):
      text += "; a model of the Hugging Face Hub is hf-hub:OWNER/NAME"
    raise UserError(text) from e
  except UserError:
    raise
  except Exception as e:  # A damaged file may raise anything.
    raise UserError(f"{path}: damaged or cut short: {first_line(e)}") from e
  return _without_prefix(_tensors(found, path))


def read_header(path: str | os.PathLike) -> dict[str, Any] | None:
  """What `weights.save` told of the model in a file that `load` has read.

  It is flat like a config; None of other files. Raises UserError if it is
  damaged.
  """
  where, path = path, os.fspath(path)
  if match := re.fullmatch("hf-hub:([^/]+/[^/]+)", path):
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(match[1], _HUB_FILE)
    path = str(cached)
  path = files.local(path)
  try:
    with safetensors.safe_open(path, "numpy") as file:
      text = (file.metadata() or {}).get(HEADER)
  except (OSError, safetensors.SafetensorError):
    return None
  if text is None:
    return None
  try:
    told = json.loads(text)
    if not isinstance(told, dict):
      raise ValueError("is no JSON object")
  except (ValueError, RecursionError) as e:
    raise UserError(f"{where}: header {HEADER}: {first_line(e)}") from e
  return told


def _tensors(found, path):
  """The dict of tensors in what a file holds, without its other values."""
  dicts, foreign, seen = [], [], set()
  values = [("", found)]
  for name, value in values:  # It grows.
    if isinstance(value, torch_pickle.Inert):
      foreign.append(value.name)
    if isinstance(value, dict) and id(value) not in seen:
      seen.add(id(value))
      values += value.items()
      arrays = {
        k: x
        for k, x in value.items()
        if isinstance(k, str) and isinstance(x, np.ndarray)
      }
      dicts.append((name, value, arrays))
  # The others are an optimiser's or stray ones.
  largest = max((len(arrays) for *_, arrays in dicts), default=0)
  dicts = [d for d in dicts if 2 * len(d[2]) >= largest > 0]
  named = [[d for d in dicts if d[0] == name] for name in _WEIGHTS]
  chosen = next(filter(None, named), dicts)
  if len(chosen) > 1:
    names = ", ".join(str(name) for name, *_ in chosen)
    raise UserError(f"{path}: holds several models: {names}; save one alone")
  for _, whole, arrays in chosen:
    # An object with a tensor's name may be a tensor of another kind.
    foreign = [
      value.name
      for name, value in whole.items()
      if isinstance(value, torch_pickle.Inert) and "." in str(name)
    ]
    if not foreign:
      return arrays
  if foreign:
    raise UserError(
      f"{path}: holds {foreign[0]}; only tensors and plain data are read; save"
      " the model's state_dict() instead"
    )
  raise UserError(f"{path}: holds a {type(found).__name__}, not tensors")


def _without_prefix(state_dict):
  """Removes the names of wrappers, and a prefix that all tensors share."""
  bare = {
    ".".join(part for part in name.split(".") if part not in _WRAPPERS): value
    for name, value in state_dict.items()
  }
  if len(bare) < len(state_dict):
    return dict(state_dict)
  # The counters of wrappers have no prefix.
  names = [name for name, value in bare.items() if np.ndim(value)]
  levels = zip(*(name.split(".")[:-1] for name in names))
  same = itertools.takewhile(lambda parts: len({*parts}) == 1, levels)
  prefix = "".join(f"{part}." for part, *_ in same if len(names) > 1)
  return {name.removeprefix(prefix): value for name, value in bare.items()}


def _download(path):
  import huggingface_hub

  logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
  where = path.removeprefix("hf-hub:"), _HUB_FILE
  problem = None
  try:
    # Asked once: without a network hf_hub_download would retry for half a
    # minute. It also finds what was downloaded before.
    huggingface_hub.get_hf_file_metadata(
      huggingface_hub.hf_hub_url(*where), timeout=5
    )
  except Exception as e:  # No network, no such model, no permission.
    problem = e
  try:
    return huggingface_hub.hf_hub_download(
      *where, local_files_only=problem is not None
    )
  except Exception as e:
    raise UserError(
      f"{path}: cannot be downloaded: {first_line(problem or e)}; if there is"
      " no network here, download its model.safetensors elsewhere and pass that"
    ) from e
