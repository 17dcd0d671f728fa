"""Segments handwritten digits with a linear head on ConvMixer's features.

  make train
  python -m examples.segmentation --weights runs/digits --out overlay.png

Every pixel of a canvas gets a class: one of the ten digits, or background. The
canvases are mosaics of scikit-learn's 1,797 digits of 8 x 8 pixels; the masks
are the digits' ink. The backbone is a trained classifier. It stays frozen, and
runs on canvases with sides four times those of its training images. One linear
layer is trained on the concatenated features of all blocks. The test canvases
consist of digits that the backbone has not seen (every fifth). Prints the loss,
and at the end the mean intersection over union.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from sklearn import datasets
import tqdm

from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import weights

_FLAGS = cli.Flags()
_WEIGHTS = _FLAGS.string(
  "weights", "Workdir of a run of configs/digits.py: --weights runs/digits."
)
_OUT = _FLAGS.string(
  "out", "PNG file to write: --out overlay.png.", "overlay.png"
)
_STEPS = _FLAGS.positive("steps", "Updates of the head: --steps 300.", 300)
BACKGROUND = 10
GRID = 4  # Digits along a side of a canvas.
COLORS = np.array(
  [(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
   (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60),
   (250, 190, 212), (0, 0, 0)], np.uint8,
)  # fmt: skip


def canvases(rng: np.random.Generator, count: int, held_out: bool):
  """Mosaics of digits and their masks.

  Args:
    rng: numpy generator.
    count: number of canvases, N.
    held_out: use the digits that the classifier has not seen, or the others.

  Returns:
    uint8 [N, S, S, 3] and int32 [N, S, S] in [0, 10]; S is 8 * GRID.
  """
  digits = datasets.load_digits()
  ids = np.arange(len(digits.target))
  ids = ids[(ids % 5 == 0) == held_out]
  chosen = rng.choice(ids, (count, GRID, GRID))
  ink = digits.images[chosen]  # [N, GRID, GRID, 8, 8] in [0, 16].
  masks = np.where(ink >= 8, digits.target[chosen][..., None, None], BACKGROUND)
  side = 8 * GRID
  join = lambda x: x.transpose(0, 1, 3, 2, 4).reshape(count, side, side)
  images = np.round(join(ink) * (255 / 16)).astype(np.uint8)
  return np.repeat(images[..., None], 3, axis=-1), join(masks).astype(np.int32)


def main() -> None:
  """Runs what the flags say; see --help."""
  model, variables, data = weights.load_model(cli.required(_WEIGHTS))
  normalize = augment.make_normalize(data["mean"], data["std"])
  head = nn.Dense(BACKGROUND + 1)

  @jax.jit
  def features(images):  # [N, S, S, 3] -> [N, S / patch, S / patch, F]
    after = lambda blocks: model.apply(
      variables,
      normalize(images),
      train=False,
      return_features=True,
      num_blocks=blocks,
    )
    return jnp.concatenate([after(i) for i in range(model.depth + 1)], -1)

  def logits(params, images):  # -> [N, S, S, 11]
    coarse = head.apply(params, features(images))
    shape = (*images.shape[:3], BACKGROUND + 1)
    return jax.image.resize(coarse, shape, "bilinear")

  tx = optax.adam(1e-2)

  @jax.jit
  def step(params, opt_state, images, masks):
    def loss_fn(params):
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, images), masks
      )
      return losses.mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  rng = np.random.default_rng(0)
  dim = jax.eval_shape(features, jnp.zeros((1, 32, 32, 3))).shape[-1]
  params = head.init(jax.random.key(0), jnp.zeros((1, 1, 1, dim)))
  opt_state = tx.init(params)
  losses = []
  for _ in tqdm.trange(_STEPS.value, unit="step", disable=None):
    images, masks = canvases(rng, 16, held_out=False)
    params, opt_state, loss = step(params, opt_state, images, masks)
    losses.append(float(loss))
    if len(losses) in (1, _STEPS.value) or len(losses) % 50 == 0:
      tqdm.tqdm.write(f"step {len(losses)}  loss {np.mean(losses[-20:]):.4f}")

  images, masks = canvases(np.random.default_rng(1), 64, held_out=True)
  found = np.asarray(jax.jit(logits)(params, images).argmax(-1))
  overlap = np.array(
    [
      np.sum((found == k) & (masks == k)) / np.sum((found == k) | (masks == k))
      for k in range(BACKGROUND + 1)
    ]
  )
  print(
    f"held out: {100 * np.mean(found == masks):.2f} % of pixels,"
    f" mean IoU {100 * overlap.mean():.2f} %"
  )
  overlay(images[:8], masks[:8], found[:8]).save(_OUT.value)
  print(f"{_OUT.value}: image, truth and prediction of 8 canvases")


def overlay(images, masks, found) -> Image.Image:
  """Three rows: images, true masks, and predicted masks over the images."""
  blend = lambda m: (0.35 * images + 0.65 * COLORS[m]).astype(np.uint8)
  framed = lambda x: np.pad(
    x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255
  )
  rows = [
    np.concatenate(framed(x), 1) for x in (images, blend(masks), blend(found))
  ]
  picture = Image.fromarray(np.concatenate(rows, 0))
  size = (4 * picture.width, 4 * picture.height)
  return picture.resize(size, Image.Resampling.NEAREST)


if __name__ == "__main__":
  cli.run(main, _FLAGS)
