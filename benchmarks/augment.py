"""What augmentation costs: its time beside the train step's, and its memory.

  python -m benchmarks.augment --config configs/cifar10.py:paper \\
      --config.batch_size=512 --config.model.patch_size=2
  python -m benchmarks.augment --config configs/imagenet.py --nostep

Images are random. Prints one JSON object: seconds of both, medians of
--repeats, the share, and the temporary memory of augmentation in units of a
float32 batch.
"""

import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import config as config_lib

_FLAGS = flags.FlagValues()
_CONFIG = cli.define_config(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_STEP = flags.DEFINE_bool(
  "step",
  True,
  "Time the train step too; --nostep where it would take hours.",
  flag_values=_FLAGS,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  config_lib.check(config, num_devices=1)
  batch, size, classes = config.batch_size, config.data.image_size, 1000
  rng = np.random.default_rng(0)
  images = jnp.asarray(
    rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
  )
  targets = jax.nn.one_hot(rng.integers(0, classes, batch), classes)
  key = jax.random.key(0)
  augment_fn = augment.make_augment(
    config.augment,
    mean=config.data.mean,
    std=config.data.std,
    crop=config.data.image_size <= 64,  # Larger images are cropped on the host.
  )
  compiled = jax.jit(augment_fn).lower(key, images, targets).compile()
  memory = compiled.memory_analysis()
  times = benchmarks.seconds(
    lambda: compiled(key, images, targets), repeats=_REPEATS.value
  )
  result = {
    "config": _FLAGS["config"].config_filename,
    "batch": [batch, size, size, 3],
    "augment_seconds": benchmarks.summary(times),
    "temporary_float32_batches": round(
      memory.temp_size_in_bytes / (4 * images.size), 2
    ),
  }
  if _STEP.value:
    step = benchmarks.train_step(config, images, targets)
    step_times = benchmarks.seconds(step, repeats=_REPEATS.value)
    result["step_seconds"] = benchmarks.summary(step_times)
    result["share"] = float(f"{np.median(times) / np.median(step_times):.3g}")
  print(json.dumps(result | benchmarks.provenance(), indent=2))


if __name__ == "__main__":
  cli.run(main, _FLAGS)
