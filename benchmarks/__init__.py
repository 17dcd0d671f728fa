"""Measurements; each prints JSON that says where it was taken."""

from collections.abc import Callable
import os
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import step as step_lib


def seconds(function, *, repeats: int, **kwargs) -> list[float]:
  """Wall times of `function(**kwargs)`, after one call that is not counted."""
  jax.block_until_ready(function(**kwargs))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(**kwargs))
    times.append(time.perf_counter() - start)
  return times


def summary(values) -> dict[str, float]:
  """Median, least and greatest, to four digits."""
  digits = lambda v: float(f"{v:.4g}")
  return {
    "median": digits(np.median(values)),
    "least": digits(np.min(values)),
    "greatest": digits(np.max(values)),
  }


def provenance() -> dict[str, Any]:
  """Command, commit, device and versions."""
  commit = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=40"],
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    "command": " ".join(
      ["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]
    ),
    "commit": commit.stdout.strip() or None,
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
