"""Exports a model for use without this code.

  python -m convmixer_jax.export --weights runs/cifar10 --out exported
  python -m convmixer_jax.export --weights convmixer_768_32.safetensors \\
      --out exported --format stablehlo

DIR/model.stablehlo takes uint8 RGB images [batch, size, size, 3] of any batch,
normalises them, and gives logits [batch, classes], on CPU, CUDA, ROCm and TPU:

  jax.export.deserialize(open("exported/model.stablehlo", "rb").read()).call(x)

DIR/model.json has the image size, how to resize, and the classes' names. The
file is read back and compared with the model before the command ends. There is
no ONNX: its one maintained converter, jax2onnx, refuses the checkpoint library
that this project is tested with.

The activation lies between a convolution and its BatchNorm, and the next
convolution pads with zeros: so only the last BatchNorm can be folded, exactly,
into the head. The others become one multiplication and one addition.
"""

from collections.abc import Callable
from collections.abc import Sequence
import json
import os
from pathlib import Path
from typing import Any

from absl import flags
import flax.linen as nn
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import ops
from convmixer_jax import weights
from convmixer_jax.errors import UserError
from convmixer_jax.models import ConvMixer
from convmixer_jax.models import unstack_blocks

_FLAGS = flags.FlagValues()
_WEIGHTS, _MODEL = cli.define_weights(_FLAGS)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "The folder to write: --out exported.",
  flag_values=_FLAGS,
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "stablehlo",
  ["stablehlo"],
  "What to write: --format stablehlo.",
  flag_values=_FLAGS,
)
# Largest relative difference of logits, float32.
TOLERANCE = 1e-4


def main() -> None:
  """Runs what the flags say; see --help."""
  where, out = cli.required(_WEIGHTS), Path(cli.required(_OUT)).expanduser()
  model, variables, data = weights.load_model(where, _MODEL.value)
  model = model.clone(dtype=jnp.float32)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"--out={out}: {e.strerror}") from e
  size = data["image_size"]
  function = inference_function(model, variables, data["mean"], data["std"])
  path = write_stablehlo(function, size, out)
  call = jax_export.deserialize(bytearray(path.read_bytes())).call

  images = np.random.default_rng(0).integers(
    0, 256, (3, size, size, 3), np.uint8
  )
  normalize = augment.make_normalize(data["mean"], data["std"])
  ours = model.apply(variables, normalize(images), train=False)
  difference = np.abs(call(images) - ours).max() / np.abs(ours).max()
  if not difference <= TOLERANCE:
    path.unlink()
    raise RuntimeError(f"{path}: differs by {difference:.1e}: a bug")
  (out / "model.json").write_text(json.dumps(data, indent=2))
  print(
    f"{path}: {os.path.getsize(path) / 2**20:.1f} MiB, uint8 images"
    f" [batch, {size}, {size}, 3] to logits [batch, {model.num_classes}];"
    f" read back, it differs from the model by {difference:.1e} of the largest"
  )


def inference_function(
  model: ConvMixer,
  variables: Any,
  mean: Sequence[float],
  std: Sequence[float],
) -> Callable[[jax.Array], jax.Array]:
  """Returns uint8 images [B, S, S, 3] -> logits, with BatchNorms folded.

  Args:
    model: unrolled or scanned.
    variables: its params and batch_stats.
    mean: see `augment.make_normalize`.
    std: likewise.
  """
  model, variables = model.clone(scan=False), unstack_blocks(variables)
  normalize = augment.make_normalize(mean, std)
  params: Any = jax.tree.map(np.asarray, variables["params"])
  affine = {}  # Path of a BatchNorm -> scale and shift.
  for path, norm in _norms(params, variables["batch_stats"]):
    scale = norm["scale"] / np.sqrt(norm["var"] + 1e-5)
    affine[path] = scale, norm["bias"] - norm["mean"] * scale
  last = (f"block_{model.depth - 1}", "pointwise_norm")
  if last in affine and not model.pointwise_residual:
    scale, shift = affine.pop(last)
    head = params["head"]
    bias = head["bias"] + shift @ head["kernel"]
    head = {"kernel": scale[:, None] * head["kernel"], "bias": bias}
    params = params | {"head": head}

  def intercept(call, args, kwargs, context):
    norm = context.module
    if not isinstance(norm, ops.BatchNorm):
      return call(*args, **kwargs)
    x = args[0]() if callable(args[0]) else args[0]
    y = ops.ACTIVATIONS[norm.activation](x + kwargs["bias"])
    if norm.path in affine:
      scale, shift = affine[norm.path]
      y = y * scale + shift
    return y if kwargs["residual"] is None else y + kwargs["residual"]

  def function(images):
    with nn.intercept_methods(intercept), ops.portable():
      variables = {"params": params}
      return jnp.asarray(model.apply(variables, normalize(images), train=False))

  return function


def _norms(params, batch_stats, path=()):
  """Yields each BatchNorm's path, and its scale, bias, mean and var."""
  for name, stats in batch_stats.items():
    if "mean" in stats:
      yield (*path, name), params[name] | stats
    else:
      yield from _norms(params[name], stats, (*path, name))


def write_stablehlo(
  function: Callable[[jax.Array], jax.Array], size: int, out: Path
) -> Path:
  """Writes `function` of uint8 images [batch, size, size, 3]; returns where."""
  (batch,) = jax_export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
  exported = jax_export.export(
    jax.jit(function), platforms=("cpu", "cuda", "rocm", "tpu")
  )(images)
  path = out / "model.stablehlo"
  path.write_bytes(exported.serialize())
  return path


if __name__ == "__main__":
  cli.run(main, _FLAGS)
