"""Measurements; each prints JSON that says where it was taken."""

from collections.abc import Callable
import functools
import os
import platform
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import runtime
from convmixer_jax import step as step_lib
from convmixer_jax.errors import UserError


def define_model(
  flag_values: flags.FlagValues,
) -> Callable[..., tuple[models.ConvMixer, int, int]]:
  """Defines the flags of a model and its images.

  Returns:
    A function of further attributes of the model that returns what the flags
    say: the model, the batch size and the size of an image.
  """
  text = functools.partial(flags.DEFINE_string, flag_values=flag_values)
  whole = functools.partial(
    flags.DEFINE_integer, lower_bound=1, flag_values=flag_values
  )
  name = text(
    "model",
    "convmixer_256_8",
    f"--model convmixer_768_32. Known: {', '.join(models.VARIANTS)}.",
  )
  patch_size = whole(
    "patch_size", None, "--patch_size 2; default: the model's."
  )
  kernel_size = whole(
    "kernel_size", None, "--kernel_size 5; default: the model's."
  )
  image_size = whole("image_size", 224, "Pixels: --image_size 32.")
  num_classes = whole("num_classes", 1000, "--num_classes 10.")
  batch = whole("batch", 64, "Images at a time: --batch 64.")
  dtype = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Of the computation: --dtype bfloat16.",
    flag_values=flag_values,
  )

  def make(**attributes):
    model = models.create_model(
      name.value,
      num_classes.value,
      patch_size=patch_size.value,
      kernel_size=kernel_size.value,
      dtype=jnp.dtype(dtype.value),
      **attributes,
    )
    if model.patch_size > image_size.value:
      raise UserError(
        f"--image_size={image_size.value}: smaller than a patch of"
        f" {model.patch_size}"
      )
    return model, batch.value, image_size.value

  return make


def define_repeats(
  flag_values: flags.FlagValues, default: int = 7
) -> flags.FlagHolder:
  """Defines --repeats."""
  return flags.DEFINE_integer(
    "repeats",
    default,
    f"Timings of each: --repeats {default}.",
    lower_bound=1,
    flag_values=flag_values,
  )


def define_json(flag_values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --json."""
  return flags.DEFINE_bool(
    "json",
    False,
    "Print a JSON object instead of a table: --json.",
    flag_values=flag_values,
  )


def describe(model: models.ConvMixer) -> str:
  """A line: dim/depth, patch, kernel, type."""
  return (
    f"ConvMixer-{model.dim}/{model.depth}, patch {model.patch_size}, kernel"
    f" {model.kernel_size}, {jnp.dtype(model.dtype).name}"
  )


def random_variables(
  model: models.ConvMixer, rng: np.random.Generator
) -> dict[str, Any]:
  """Parameters as training begins with, and random running statistics."""
  images = jnp.zeros((1, model.patch_size, model.patch_size, 3))
  variables = jax.device_get(model.init(jax.random.key(0), images, train=False))
  stats = jax.tree.map(
    lambda v: rng.uniform(0.5, 1.5, v.shape).astype(np.float32),
    variables["batch_stats"],
  )
  return {"params": variables["params"], "batch_stats": stats}


def seconds(
  function, *, repeats: int, warmup: int = 1, **kwargs
) -> list[float]:
  """Wall times of `function(**kwargs)`, after calls that are not counted."""
  for _ in range(warmup):
    jax.block_until_ready(function(**kwargs))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(**kwargs))
    times.append(time.perf_counter() - start)
  return times


def digits(value: float) -> float:
  """To four digits."""
  return float(f"{value:.4g}")


def summary(values) -> dict[str, float]:
  """Median, least and greatest, to four digits."""
  return {
    "median": digits(np.median(values)),
    "least": digits(np.min(values)),
    "greatest": digits(np.max(values)),
  }


def provenance() -> dict[str, Any]:
  """Command, commit, device and versions."""
  return {
    "command": " ".join(
      ["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]
    ),
    "commit": runtime.provenance()["commit"],
    "device": jax.devices()[0].device_kind,
    "cpu": _cpu(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def _cpu():
  try:
    with open("/proc/cpuinfo") as file:
      names = [line for line in file if line.startswith("model name")]
    return names[0].partition(":")[2].strip()
  except (OSError, IndexError):
    return platform.processor()


def train_step(
  config: ml_collections.ConfigDict, images: jax.Array, targets: jax.Array
) -> Callable[[], Any]:
  """Returns a function that does the first update of a run again and again.

  Args:
    config: of a run; its augmentation is left out.
    images: uint8 [B, S, S, 3].
    targets: float [B, K], probabilities.
  """
  model = models.create_model(num_classes=targets.shape[-1], **config.model)
  shapes = models.variable_shapes(model)
  tx = optim.make_optimizer(lambda count: 1e-3, shapes["params"], config.optim)
  normalize = augment.make_normalize(config.data.mean, config.data.std)
  step = jax.jit(
    step_lib.make_train_step(
      model,
      tx,
      lambda key, images, targets: (normalize(images), targets),
      seed=0,
      accum_steps=config.accum_steps,
    )
  )
  state = step_lib.init_state(jax.random.key(0), model, tx, images.shape[1])
  return lambda: step(state, {"image": images, "label": targets})
