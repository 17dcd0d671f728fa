"""Weights of PyTorch's ConvMixers: their files, and their names to ours."""

from collections.abc import Mapping
import logging
import os
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from convmixer_jax import models
from convmixer_jax import torch_pickle
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

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
  """A state_dict to our variables.

  Args:
    state_dict: name -> array (or CPU tensor), of timm's ConvMixer or of the
      nn.Sequential in the paper and in the authors' CIFAR-10 script.

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
    module = _from_sequential(module)
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
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f"{name}: of {value.dtype}, not floating-point")
    if path[-1] == "pointwise" and leaf == "weight":
      if value.shape[2:] != (1, 1):
        raise UserError(f"{name}: {value.shape} is no 1 x 1 convolution's")
      value = value[:, :, 0, 0]
    if value.ndim == 4:  # [out, in, k, k] -> [k, k, in, out]
      value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
      value = value.T
    flat[(collection, *path, our_leaf)] = value
  return traverse_util.unflatten_dict(flat)


def _from_sequential(module):
  """'3.0.fn.0' -> 'blocks.0.0.fn.0': stem 0 to 2, blocks from 3 on, head."""
  index, _, rest = module.partition(".")
  if not re.fullmatch("[0-9]{1,9}", index):
    return module
  if rest:
    return f"blocks.{int(index) - 3}.{rest}"
  return f"stem.{index}" if int(index) < 3 else "head"


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Our variables, scanned or not, to timm's state_dict: the inverse."""
  theirs = {ours: name for name, ours in (_IN_BLOCK | _OUTSIDE).items()}
  leaves = {
    ours: name for name, ours in (_NORM_LEAVES | _LAYER_LEAVES).items()
  } | {("params", "scale"): "weight"}
  state_dict = {}
  variables = models.unstack_blocks(variables)
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


# --- Files.


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors in a file. Never executes code that the file holds.

  Args:
    path: a .safetensors file, a PyTorch checkpoint (.pth or .pth.tar, in the
      current zip format or the one before torch 1.6), or hf-hub:OWNER/NAME for
      the model.safetensors of a model on the Hugging Face Hub.

  Returns:
    name -> array, without the prefix `module.`. Of a training checkpoint, the
    moving averages of the weights if it has them, otherwise the weights.

  Raises:
    UserError: the file does not exist, is damaged or of another format.
  """
  path = os.fspath(path)
  if path.startswith("hf-hub:"):
    path = _download(path)
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
  except OSError as e:
    raise UserError(f"{path}: {e.strerror or e}") from e
  except UserError:
    raise
  except Exception as e:  # A damaged file may raise anything.
    raise UserError(f"{path}: damaged or cut short: {first_line(e)}") from e
  for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
    if isinstance(found, dict) and isinstance(found.get(name), dict):
      found = found[name]
      break
  if not isinstance(found, dict):
    raise UserError(f"{path}: holds a {type(found).__name__}, not tensors")
  for name, value in found.items():
    if not isinstance(name, str):
      raise UserError(f"{path}: {name!r} is not the name of a tensor")
    if not isinstance(value, np.ndarray):
      raise UserError(
        f"{path}: {name} is a {type(value).__name__}, not a tensor"
      )
  return {name.removeprefix("module."): x for name, x in found.items()}


def _download(path):
  import huggingface_hub

  logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
  repository = path.removeprefix("hf-hub:")
  try:
    return huggingface_hub.hf_hub_download(repository, "model.safetensors")
  except Exception as e:  # No network, no such model, no permission.
    raise UserError(f"{path}: cannot be downloaded: {first_line(e)}") from e
