"""Time and memory of augmentation, beside the time of the training step.

  python -m benchmarks.augment --config configs/cifar10.py:paper \\
      --config.batch_size=512 --config.model.patch_size=2
  python -m benchmarks.augment --config configs/imagenet.py --nostep

Images are random, and the step is without augmentation. Prints one JSON object:
seconds of both, their ratio, and the temporary memory of augmentation as a
multiple of a float32 batch.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from benchmarks import work
from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import step as step_lib

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_REPEATS = benchmarks.define_repeats(_FLAGS)
_STEP = _FLAGS.boolean(
  "step",
  "Also time the training step: --nostep where it would take hours.",
  default=True,
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
  runs = {"augment": lambda: compiled(key, images, targets)}
  if _STEP.value:
    runs["step"] = _step(config, images, targets)
  times = benchmarks.by_turns(runs, _REPEATS.value)
  result = {
    "config": _FLAGS["config"].config_filename,
    "batch": [batch, size, size, 3],
    "augment_seconds": benchmarks.summary(times["augment"]),
    "temporary_float32_batches": round(
      memory.temp_size_in_bytes / (4 * images.size), 2
    ),
  }
  if _STEP.value:
    share = np.median(times["augment"]) / np.median(times["step"])
    result["step_seconds"] = benchmarks.summary(times["step"])
    result["share"] = float(f"{share:.3g}")
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _step(config, images, targets):
  """Returns a function that makes one update, without augmentation."""
  model = models.create_model(num_classes=targets.shape[-1], **config.model)
  tx = work.make_optimizer(models.variable_shapes(model)["params"])
  normalize = augment.make_normalize(config.data.mean, config.data.std)
  step = step_lib.make_train_step(
    model,
    tx,
    lambda key, images, targets: (normalize(images), targets),
    seed=0,
    accum_steps=config.accum_steps,
  )
  state = step_lib.init_state(jax.random.key(0), model, tx, images.shape[1])
  batch = {"image": images, "label": targets}
  return work.repeated_step(jax.jit(step, donate_argnums=0), state, batch)


if __name__ == "__main__":
  cli.run(main, _FLAGS)
