"""Time and memory of augmentation: beside XLA's form, timm, and the train step.

  python -m benchmarks.augment --config configs/cifar10.py:paper \\
      --config.batch_size=512 --against xla
  python -m benchmarks.augment --config configs/imagenet.py --against timm \\
      --config.data.image_size=128 --config.batch_size=128

Ours is a config's `augment` on a batch of photographs. On CPUs, ops/augment.cc
does most of it. Beside it, in turns with it:

  xla    The same without augment.cc, as where there is no C++ compiler.
  timm   timm's training transforms with the same policy, on one core: crop,
         flip, RandAugment, normalisation and erasing. Images of more than 64
         pixels are cropped by Pillow here too; 'crop' is that part, to be
         added to ours. Ours includes mixup and CutMix, which timm's
         transforms do not.
  step   The train step of the config's model without augmentation.

Photographs are decoded before. Prints one JSON object: wall seconds of a batch,
milliseconds of CPU time an image (over all cores), seconds to trace and
compile, and the temporary memory as a multiple of a float32 batch.
"""

import contextlib
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import benchmarks
from benchmarks import work
from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import step as step_lib
from convmixer_jax.augment import randaugment
from convmixer_jax.data import decode
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_PHOTOS = benchmarks.define_photos(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_AGAINST = _FLAGS.enum(
  "against", "Beside what: --against timm.", None, enum_values=["xla", "timm"]
)
_STEP = _FLAGS.boolean("step", "Also time the train step: --step.")


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  config_lib.check(config, num_devices=1)
  jax.config.update("jax_enable_compilation_cache", False)
  size, batch = config.data.image_size, config.batch_size
  on_host = size > 64  # As data.sources: larger images are cropped on the host.
  photos = [Image.open(path).convert("RGB") for path in _PHOTOS()]
  if not on_host:
    photos = [photo.resize((size, size)) for photo in photos]
  photos = [photos[i % len(photos)] for i in range(batch)]
  rng = np.random.default_rng(0)
  crop = {
    name: config.augment[f"crop_{name}"] for name in ("scale", "ratio")
  } | {"interpolation": config.augment.interpolation}
  host = lambda photo: decode.random_crop(photo, size, rng, **crop)
  images = jnp.asarray(np.stack([host(photo) for photo in photos]))
  targets = jax.nn.one_hot(rng.integers(0, 1000, batch), 1000)

  compiled, calls = {}, {}
  for name in ("ours", *(["xla"] if _AGAINST.value == "xla" else [])):
    with ops.portable() if name == "xla" else contextlib.nullcontext():
      compiled[name] = _compile(config, not on_host, images, targets)
    calls[name] = lambda run=compiled[name][0]: run(images, targets)
  if _AGAINST.value == "timm":
    transform = _timm(config)
    calls["timm"] = lambda: [*map(transform, photos)] and None
    if on_host:
      calls["crop"] = lambda: [*map(host, photos)] and None
  if _STEP.value:
    calls["step"] = _step(config, images, targets)

  cpu = {name: [] for name in calls}
  timed = {
    name: lambda name=name, call=call: _timed(call, cpu[name])
    for name, call in calls.items()
  }
  wall = benchmarks.by_turns(timed, _REPEATS.value)
  result = {"batch": images.shape, "photos": len(_PHOTOS())}
  for name in calls:
    per_image = 1000 * np.array(cpu[name][-_REPEATS.value :]) / batch
    result[name] = {
      "seconds": benchmarks.summary(wall[name]),
      "core_ms_per_image": benchmarks.summary(per_image),
    }
    if name in compiled:
      _, seconds, memory = compiled[name]
      result[name]["compile_seconds"] = round(seconds, 2)
      result[name]["temporary_float32_batches"] = round(
        memory / (4 * images.size), 2
      )
  print(json.dumps(result | benchmarks.provenance(), indent=2))


def _compile(config, crop, images, targets):
  """Returns the compiled augmentation, its seconds and its bytes."""
  augment_fn = augment.make_augment(
    config.augment, mean=config.data.mean, std=config.data.std, crop=crop
  )
  key = jax.random.key(0)
  start = time.perf_counter()
  compiled = jax.jit(augment_fn).lower(key, images, targets).compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis().temp_size_in_bytes
  return lambda *args: compiled(key, *args), seconds, memory


def _timed(call, cpu):
  """Calls it, and appends the seconds of CPU time that it took on all cores."""
  start = time.process_time()
  result = jax.block_until_ready(call())
  cpu.append(time.process_time() - start)
  return result


def _timm(config):
  """timm's transforms of a PIL image with the config's settings."""
  try:
    import torch

    from benchmarks import torch_peer

    timm = torch_peer.import_timm()
  except ImportError as e:
    raise UserError(
      f"{e}; install it with: {sys.executable} -m pip install torch torchvision"
      " timm"
    ) from e
  torch.set_num_threads(1)
  settings = config.augment
  if (
    settings.randaugment and not randaugment.parse(settings.randaugment).smooth
  ):
    raise UserError(
      f"--against=timm: {settings.randaugment} is torchvision's policy"
    )
  transform = timm.data.create_transform(
    config.data.image_size,
    is_training=True,
    scale=settings.crop_scale,
    ratio=settings.crop_ratio,
    interpolation=settings.interpolation,
    hflip=0.5 if settings.flip else 0.0,
    auto_augment=settings.randaugment or None,
    re_prob=settings.erase_prob,
    re_mode=settings.erase_mode,
    mean=config.data.mean,
    std=config.data.std,
  )

  def call(photo):
    while True:
      # timm 1.0.31 draws Posterize with 0 bits for one image in 700, and
      # Pillow 13 refuses that.
      with contextlib.suppress(ValueError):
        return transform(photo)

  return call


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
