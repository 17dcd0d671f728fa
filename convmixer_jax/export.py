"""Exports a model for use without this code.

  python -m convmixer_jax.export --weights runs/cifar10 --out exported
  python -m convmixer_jax.export --weights runs/cifar10 --out exported \\
      --format timm

stablehlo: DIR/model.stablehlo takes uint8 RGB images [batch, size, size, 3] of
any batch, normalises them, and gives logits [batch, classes], on CPU, CUDA,
ROCm and TPU:

  data = bytearray(open("exported/model.stablehlo", "rb").read())
  logits = jax.export.deserialize(data).call(images)

DIR/model.json says how to make these images of any others, and has the names of
the classes. Mean and standard deviation are part of the program.

timm: DIR/model.safetensors has the weights by the names of timm's model, which
loads them with load_state_dict(safetensors.torch.load_file(path)). Its header
has the sizes, the preprocessing and the names of the classes: as --weights,
this file is as good as the workdir.

The file is read back and compared with the model before the command ends. There
is no ONNX export: the maintained converter, jax2onnx, needs an older orbax.

A BatchNorm cannot be folded into a convolution's weights here: the activation
lies between them, and the next convolution pads with zeros. But its variables
are constants, which XLA turns into one scale and one shift.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import files
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import weights
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_WEIGHTS, _MODEL = _FLAGS.define_weights()
_OUT = _FLAGS.string("out", "The folder to write: --out exported.")
_FORMAT = _FLAGS.enum(
  "format",
  "stablehlo: a program that needs only jax; timm: weights for PyTorch:"
  " --format timm.",
  "stablehlo",
  enum_values=["stablehlo", "timm"],
)
TOLERANCE = 1e-4  # Largest relative difference of logits, float32.


def main() -> None:
  """Runs what the flags say; see --help."""
  where, out = cli.required(_WEIGHTS), files.path(cli.required(_OUT))
  model, variables, data = weights.load_model(where, _MODEL.value)
  model = model.clone(dtype=jnp.float32)
  size, stats = data["image_size"], (data["mean"], data["std"])
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, size, size, 3), np.uint8)
  normalize = augment.make_normalize(*stats)
  ours = model.apply(variables, normalize(images), train=False)
  try:
    with files.output(out) as folder:
      if _FORMAT.value == "timm":
        path = folder / "model.safetensors"
        weights.save(path, model, variables, data)
        again, read, told = weights.load_model(path)
        call = inference_function(again, read, told["mean"], told["std"])
        what = f"{models.describe(again)}, with timm's names"
      else:
        function = inference_function(model, variables, *stats)
        path = write_stablehlo(function, size, folder)
        text = json.dumps(description(data, model.num_classes), indent=2)
        (folder / "model.json").write_text(text, "utf-8")
        call = jax_export.deserialize(bytearray(path.read_bytes())).call
        what = (
          f"uint8 images [batch, {size}, {size}, 3] to logits"
          f" [batch, {model.num_classes}]"
        )
      difference = np.abs(call(images) - ours).max() / np.abs(ours).max()
      if not difference <= TOLERANCE:
        path.unlink()
        raise RuntimeError(f"{path}: differs by {difference:.1e}: a bug")
      mebibytes = os.path.getsize(path) / 2**20
  except OSError as e:
    flag = "--out=" if e.filename == str(out) else ""
    raise UserError(f"{flag}{e.filename}: {e.strerror}") from e
  print(
    f"{out / path.name}: {mebibytes:.1f} MiB, {what}; read back, it differs"
    f" from the model by {difference:.1e} of the largest"
  )


def inference_function(
  model: nn.Module, variables: Any, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array], jax.Array]:
  """Returns uint8 images [B, S, S, 3] -> logits, in plain XLA.

  The model's variables become constants. Images are normalised by `mean` and
  `std` as in `augment.make_normalize`.
  """
  normalize = augment.make_normalize(mean, std)

  def function(images):
    with ops.portable():
      logits = model.apply(variables, normalize(images), train=False)
    return jnp.asarray(logits)

  return function


def description(data: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
  """What model.json says; `data` is from `weights.load_model`."""
  size = data["image_size"]
  return {
    "preprocessing": {  # `decode.eval_image`; what the caller does.
      "color": "RGB",
      "resize": "short side as below, other side int(below * long / short)",
      "resize_short_side": math.floor(size / data["crop_pct"]),
      "interpolation": "bicubic",
      "antialias": True,  # As in Pillow.
      "crop": "center: left and top are round((side - image_size) / 2)",
      "image_size": size,
      "crop_pct": data["crop_pct"],
    },
    "input": {
      "shape": ["batch", size, size, 3],
      "layout": "NHWC",
      "dtype": "uint8",
      "range": [0, 255],
    },
    "normalized_by_the_program": {"mean": data["mean"], "std": data["std"]},
    "output": {
      "shape": ["batch", num_classes],
      "dtype": "float32",
      "content": "logits",
    },
    "class_names": data["class_names"],
  }


def write_stablehlo(
  function: Callable[[jax.Array], jax.Array], size: int, out: Path
) -> Path:
  """Writes `function` of uint8 images [batch, size, size, 3]; returns where."""
  (batch,) = jax_export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
  platforms = ("cpu", "cuda", "rocm", "tpu")
  exported = jax_export.export(jax.jit(function), platforms=platforms)(images)
  path = out / "model.stablehlo"
  path.write_bytes(exported.serialize())
  return path


if __name__ == "__main__":
  cli.run(main, _FLAGS)
