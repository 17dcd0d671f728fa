"""Draws training images as the model gets them, with their mixed labels.

  python -m convmixer_jax.preview --config configs/cifar10.py --out sheet.png
  python -m convmixer_jax.preview --config configs/imagenet.py \\
      --out sheet.png --step 2002 --num 36 --config.data.dir=/data

The images are the first of the batch on which a run with the same config trains
at that step, with the same crops and the same noise. Without --step it is the
first step, or with mixup or cutmix the first one whose mixing is visible: the
weight that a step draws may leave all images as they are.
"""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
import tqdm

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import files
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sheet
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_OUT = _FLAGS.string(
  "out", "File to write; its suffix is the format: --out sheet.png."
)
_STEP = _FLAGS.integer(
  "step",
  "Updates done before that batch: --step 1000. Default: 0, or the first step"
  " whose mixing is visible.",
  lower_bound=0,
)
_NUM = _FLAGS.positive("num", "Number of images: --num 36.", 64)


def main() -> None:
  """Runs what the flags say; see --help."""
  config, out = cli.required(_CONFIG), cli.required(_OUT)
  num, step = _NUM.value, _STEP.value
  draw, names = open_run(config)
  if step is None:
    mixes = config.augment.mixup_alpha or config.augment.cutmix_alpha
    step = _visible_step(draw, num) if mixes and len(names) > 1 else 0
  images, targets = draw(step)
  picture = sheet.draw(images[:num], targets[:num], names, f"step {step}")
  path = files.path(out)
  try:
    with files.output(path.parent, create=False) as folder:
      picture.save(folder / path.name)
  except (OSError, ValueError) as e:
    raise UserError(f"--out={out}: {e}") from e
  print(f"{out}: {min(num, len(images))} images of step {step}")


def _visible_step(draw, num):
  """The first step that mixes a quarter of its `num` images by 1 to 4 or more.

  0 if none of the first 30 steps does.
  """
  text = "looking for a step whose mixing is visible"
  for step in tqdm.tqdm(range(30), text, leave=False, disable=None):
    second = np.sort(draw(step)[1][:num], axis=1)[:, -2]
    if (second >= 0.2).mean() >= 0.25:
      return step
  return 0


def open_run(
  config: ml_collections.ConfigDict,
) -> tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], Sequence[str]]:
  """Opens the training images of a run.

  Returns:
    A function that draws the augmented batch on which the run trains after that
    many updates: float [B, S, S, 3], as the model gets them but scaled back to
    [0, 255], and float [B, K] probabilities; and the K names of the classes.
  """
  config_lib.check(config, num_devices=1)
  data = config.data
  source = sources.open_source(
    data.name, data.dir, data.train_split, data.image_size
  )
  recipe = recipe_lib.build(config, source, jax.devices()[:1])

  def draw(step):
    batch = next(recipe.train_batches(step, step + 1))
    return recipe.training_images(batch, step)

  return draw, source.class_names


if __name__ == "__main__":
  cli.run(main, _FLAGS)
