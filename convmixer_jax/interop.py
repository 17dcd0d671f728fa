"""PyTorch's names and layouts, as in timm's ConvMixer, to ours and back."""

from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util
import numpy as np

from convmixer_jax import UserError

# timm's module -> ours; within a block, and outside.
_IN_BLOCK = {
  "0.fn.0": "depthwise",
  "0.fn.2": "depthwise_norm",
  "1": "pointwise",
  "3": "pointwise_norm",
}
_OUTSIDE = {"stem.0": "stem", "stem.2": "stem_norm", "head": "head"}
_NORM_LEAVES = {
  "weight": ("params", "scale"),
  "bias": ("params", "bias"),
  "running_mean": ("batch_stats", "mean"),
  "running_var": ("batch_stats", "var"),
}
_LAYER_LEAVES = {"weight": ("params", "kernel"), "bias": ("params", "bias")}


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """timm's state_dict to our variables.

  Args:
    state_dict: name -> array (or CPU tensor), of a ConvMixer in timm's names.

  Returns:
    {'params', 'batch_stats'} of numpy arrays, for an unrolled model.

  Raises:
    UserError: a name that no ConvMixer has.
  """
  flat = {}
  for name, value in state_dict.items():
    module, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":  # Unused with a fixed momentum.
      continue
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block:
      path = (f"block_{block[1]}", _IN_BLOCK.get(block[2], ""))
    else:
      path = (_OUTSIDE.get(module, ""),)
    leaves = _NORM_LEAVES if path[-1].endswith("_norm") else _LAYER_LEAVES
    if not path[-1] or leaf not in leaves:
      raise UserError(f"{name}: not a tensor of timm's ConvMixer")
    collection, our_leaf = leaves[leaf]
    value = np.asarray(value)
    if path[-1] == "pointwise" and leaf == "weight":
      value = value[:, :, 0, 0]
    if value.ndim == 4:  # [out, in, k, k] -> [k, k, in, out]
      value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
      value = value.T
    flat[(collection, *path, our_leaf)] = value
  return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Our variables, of an unrolled model, to timm's state_dict: the inverse."""
  theirs = {ours: name for name, ours in (_IN_BLOCK | _OUTSIDE).items()}
  leaves = {
    ours: name for name, ours in (_NORM_LEAVES | _LAYER_LEAVES).items()
  } | {("params", "scale"): "weight"}
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    collection, *modules, leaf = path
    module = theirs[modules[-1]]
    if modules[0].startswith("block_"):
      module = f"blocks.{modules[0].removeprefix('block_')}.{module}"
    value = np.asarray(value)
    if value.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    elif value.ndim == 2:
      value = value.T
    if modules[-1] == "pointwise" and leaf == "kernel":
      value = value[:, :, None, None]
    state_dict[f"{module}.{leaves[collection, leaf]}"] = value
  return state_dict
