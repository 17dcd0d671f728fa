"""Pictures of a trained model: its filters, what it sees, and where it errs.

  python -m experiments.pictures --workdir runs/cifar10
  python -m experiments.pictures --workdir runs/cifar10 --blocks 0,7 \\
      --out pictures --data_dir /data/tfds
  python -m experiments.pictures --workdir runs/cifar10 --against runs/p4

Written as PNG: the patch embedding's filters and the depthwise kernels of some
blocks, as in the paper and in Keras's example; how the kernels spread about
their centre; the effective receptive field after some blocks (Luo et al.,
2016); linear CKA between the layers of two models, or of one with itself
(Kornblith et al., 2019; by minibatches as in Nguyen et al., 2021); the
confusion matrix; and the most confident mistakes. Images are those that the run
was scored on.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
from matplotlib import figure
import numpy as np
import tqdm

from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import logger
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run whose newest checkpoint is looked at: --workdir runs/cifar10.",
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "The folder to write into: --out pictures. Default: pictures in the workdir.",
  flag_values=_FLAGS,
)
_AGAINST = flags.DEFINE_string(
  "against",
  None,
  "Another workdir, or a file of weights, for CKA: --against runs/p4. Default:"
  " the model itself.",
  flag_values=_FLAGS,
)
_BLOCKS = flags.DEFINE_list(
  "blocks",
  None,
  "Whose kernels are drawn, counted from 0: --blocks 0,3,7. Default: the first,"
  " the middle and the last.",
  flag_values=_FLAGS,
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  512,
  "Held-out images for receptive fields and CKA: --num_images 1024.",
  lower_bound=4,
  flag_values=_FLAGS,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  128,
  "Images at a time: --batch_size 32.",
  lower_bound=4,
  flag_values=_FLAGS,
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Where the data are, if no longer where the run had them: --data_dir /data.",
  flag_values=_FLAGS,
)

MOST_FILTERS = 256  # On a picture.
MOST_DEPTHS = 9
MISTAKES = 25


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model, its variables, and the mean and std of its images."""

  model: nn.Module
  variables: Mapping[str, Any]
  mean: Sequence[float]
  std: Sequence[float]

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 -> what the model takes."""
    return augment.make_normalize(self.mean, self.std)(images)

  def logits(self, variables, images: jax.Array) -> jax.Array:
    """uint8 [B, S, S, 3] -> [B, K]."""
    return self.model.apply(variables, self.normalize(images), train=False)

  def features(self, variables, x: jax.Array, num_blocks: int) -> jax.Array:
    """Normalised [B, S, S, 3] -> float32 [B, S / p, S / p, dim]."""
    maps = self.model.apply(
      variables, x, train=False, return_features=True, num_blocks=num_blocks
    )
    return maps.astype(jnp.float32)


def main() -> None:
  """Runs what the flags say; see --help."""
  workdir = cli.required(_WORKDIR)
  config = workdir_lib.load_config(workdir)
  trained, names = _load(workdir)
  blocks = _blocks(trained.model.depth, _BLOCKS.value)
  data = config.data
  source = sources.open_source(
    data.name, _DATA_DIR.value or data.dir, data.eval_split, data.image_size
  )
  if len(source.class_names) != trained.model.num_classes:
    raise UserError(
      f"--workdir={workdir}: has {trained.model.num_classes} classes; its data"
      f" now have {len(source.class_names)}"
    )
  against = _load(_AGAINST.value)[0] if _AGAINST.value else trained
  if against.model.patch_size > data.image_size:
    raise UserError(
      f"--against={_AGAINST.value}: has patches of {against.model.patch_size},"
      f" larger than the images of {data.image_size}"
    )
  out = Path(_OUT.value or Path(workdir) / "pictures").expanduser()
  for name, about, drawn in _pictures(
    trained, against, config, source, names or source.class_names, blocks
  ):
    try:
      out.mkdir(parents=True, exist_ok=True)
      drawn.savefig(out / name, dpi=150)
    except OSError as e:
      raise UserError(f"--out={out}: {e.strerror or e}") from e
    print(f"{out / name}: {about}", flush=True)


def _load(where):
  if Path(where).expanduser().is_dir():
    workdir_lib.load_config(where)
  model, variables, data = weights.load_model(where)
  variables = jax.device_put(variables)
  trained = Trained(model, variables, data["mean"], data["std"])
  return trained, data["class_names"]


def _blocks(depth, given):
  if given is None:
    return sorted({0, (depth - 1) // 2, depth - 1})
  try:
    blocks = sorted({int(block) for block in given})
  except ValueError:
    blocks = []
  if not blocks or not 0 <= blocks[0] <= blocks[-1] < depth:
    text = ",".join(given)
    raise UserError(f"--blocks={text}: must be numbers from 0 to {depth - 1}")
  return blocks


def _pictures(
  trained, against, config, source, names, blocks
) -> Iterator[tuple[str, str, figure.Figure]]:
  """File name, what is on it, and the picture, each as it is done."""
  model, params = trained.model, trained.variables["params"]
  p, k = model.patch_size, model.kernel_size
  stem = np.asarray(params["stem"]["kernel"], np.float32)
  shown = f"{min(model.dim, MOST_FILTERS)} of {model.dim}"
  about = f"{shown} patch embeddings of {p} x {p}, gray is 0"
  yield "stem.png", about, _tiled(colors(stem), about)
  for block in blocks:
    kernels = depthwise_kernels(params, block)
    about = f"block {block}: {shown} kernels of {k} x {k}, white is 0"
    yield f"block_{block}.png", about, _tiled(shades(kernels), about)
  about = "spread of the depthwise kernels about their centre"
  every = [depthwise_kernels(params, i) for i in range(model.depth)]
  yield "spread.png", about, _draw_spread(every)

  batches = _first_images(config.data, source)
  count = f"{len(batches) * len(batches[0])} held-out images"
  depths = np.linspace(0, model.depth, min(model.depth + 1, MOST_DEPTHS))
  fields = {
    int(depth): receptive_field(trained, batches, int(depth))
    for depth in tqdm.tqdm(depths.round(), "receptive fields", disable=None)
  }
  about = f"effective receptive field, mean of {count}"
  yield "receptive_field.png", about, _draw_fields(fields, p, about)
  other = "the model itself" if against is trained else _AGAINST.value
  about = f"linear CKA with {other}, {count}"
  yield "cka.png", about, _draw_cka(cka(trained, against, batches), other)

  held_out = logger.progress(
    _held_out(config.data, source), math.ceil(len(source) / _BATCH_SIZE.value)
  )
  counts, mistakes = score(trained, held_out, MISTAKES)
  top1 = 100 * np.trace(counts) / counts.sum()
  about = f"{counts.sum()} images, top-1 {top1:.2f} %"
  yield "confusion.png", about, _draw_confusion(counts, names, about)
  about = f"the {len(mistakes)} most confident mistakes"
  yield "mistakes.png", about, _draw_mistakes(mistakes, names)


def _held_out(data, source):
  """The split that the run was scored on, as `stream.eval_batches` has it."""
  return stream.eval_batches(
    source,
    batch_size=_BATCH_SIZE.value,
    rows=np.arange(_BATCH_SIZE.value),
    image_size=data.image_size,
    crop_pct=data.crop_pct,
    num_workers=data.num_workers,
    max_unreadable=data.max_unreadable,
  )


def _first_images(data, source):
  """uint8 [N / B, B, S, S, 3]: as many whole batches as there are."""
  images = []
  with contextlib.closing(_held_out(data, source)) as held_out:
    for batch in held_out:
      images.append(batch["image"][batch["mask"]])
      if sum(map(len, images)) >= _NUM_IMAGES.value:
        break
  images = np.concatenate(images)[: _NUM_IMAGES.value]
  size = min(len(images), _BATCH_SIZE.value)
  if size < 4:
    raise UserError(f"data.eval_split={data.eval_split}: has below 4 images")
  images = images[: len(images) // size * size]
  return images.reshape(-1, size, *images.shape[1:])


# --- Kernels.


def depthwise_kernels(params: Mapping[str, Any], block: int) -> np.ndarray:
  """float32 [k, k, dim]."""
  kernels = params[f"block_{block}"]["depthwise"]["kernel"]
  return np.asarray(kernels, np.float32)[:, :, 0]


def colors(kernels: np.ndarray) -> np.ndarray:
  """[p, p, 3, N] -> [N, p, p, 3] in [0, 1]: each by itself, 0 is gray."""
  kernels = np.moveaxis(kernels, -1, 0)
  largest = np.abs(kernels).max((1, 2, 3), keepdims=True)
  return 0.5 + 0.5 * kernels / np.maximum(largest, 1e-30)


def shades(kernels: np.ndarray) -> np.ndarray:
  """[k, k, N] -> [N, k, k, 3]: red above 0, blue below, each by itself."""
  kernels = np.moveaxis(kernels, -1, 0)
  largest = np.abs(kernels).max((1, 2), keepdims=True)
  scaled = 0.5 + 0.5 * kernels / np.maximum(largest, 1e-30)
  return matplotlib.colormaps["RdBu_r"](scaled)[..., :3]


def spread(kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How far from the centre a block's weights lie.

  Args:
    kernels: [k, k, N]. The centre is the tap on the output's own location: of
      an even kernel the one above and to the left.

  Returns:
    [D], the distances that taps have; [D], the mean of |w| at each; and [N],
    each kernel's root mean square distance, weighted by w^2. In patches.
  """
  k = len(kernels)
  steps = np.arange(k) - (k - 1) // 2
  distance = np.hypot(*np.meshgrid(steps, steps))
  distances, index = np.unique(distance.round(6), return_inverse=True)
  size = np.abs(kernels).mean(-1)
  sums = np.bincount(index.ravel(), size.ravel())
  means = sums / np.bincount(index.ravel())
  energy = np.square(kernels, dtype=np.float64)
  second = np.tensordot(distance**2, energy, 2)
  return (
    distances,
    means,
    np.sqrt(second / np.maximum(energy.sum((0, 1)), 1e-30)),
  )


# --- What the model computes.


def receptive_field(
  trained: Trained, batches: Iterable[np.ndarray], num_blocks: int
) -> np.ndarray:
  """The effective receptive field of the location in the middle.

  The mean over images of |d f / d x|, where f is the sum of that location's
  features and x a normalised pixel, summed over the three colors.

  Args:
    trained: the model.
    batches: uint8 [B, S, S, 3] each.
    num_blocks: after how many blocks.

  Returns:
    [S, S].
  """

  @jax.jit
  def gradient(variables, images):
    def middle(x):
      maps = trained.features(variables, x, num_blocks)
      return maps[:, maps.shape[1] // 2, maps.shape[2] // 2].sum()

    return jnp.abs(jax.grad(middle)(trained.normalize(images))).sum(-1).mean(0)

  fields = [gradient(trained.variables, images) for images in batches]
  return np.mean(np.asarray(fields, np.float64), 0)


def reach(field: np.ndarray, patch_size: int, share: float) -> float:
  """Side in pixels of the smallest square that holds a share of a field.

  Args:
    field: [S, S], from `receptive_field`.
    patch_size: of the model. The square lies about the middle patch's centre.
    share: in (0, 1].
  """
  side = len(field)
  center = side // patch_size // 2 * patch_size + (patch_size - 1) / 2
  offset = np.abs(np.arange(side) - center)
  distance = np.maximum(offset[:, None], offset).ravel()
  order = np.argsort(distance)
  held = np.cumsum(field.ravel()[order])
  index = np.searchsorted(held, share * held[-1] * (1 - 1e-9))
  return 2 * distance[order][index] + 1


def unbiased_hsic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Song et al.'s estimator: Gram matrices [M, n, n], [N, n, n] -> [M, N]."""
  n = a.shape[-1]
  a, b = a * (1 - np.eye(n)), b * (1 - np.eye(n))
  rows_a, rows_b = a.sum(-1), b.sum(-1)
  trace = np.tensordot(a, b, [(1, 2), (1, 2)])
  total = np.outer(rows_a.sum(-1), rows_b.sum(-1)) / ((n - 1) * (n - 2))
  return (trace + total - 2 / (n - 2) * rows_a @ rows_b.T) / (n * (n - 3))


def cka(a: Trained, b: Trained, batches: Sequence[np.ndarray]) -> np.ndarray:
  """Linear CKA between the stems and blocks of two models, by minibatches.

  As in Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same
  Things?", 2021: unbiased HSIC of each batch, averaged before the quotient.

  Args:
    a: a model.
    b: another, or the same.
    batches: uint8 [B, S, S, 3] each, B from 4 on.

  Returns:
    [a's depth + 1, b's depth + 1]; nan for features that do not vary.
  """
  grams_a, grams_b = _make_grams(a), _make_grams(b)
  between = own_a = own_b = 0.0
  for images in tqdm.tqdm(batches, "CKA", disable=None):
    of_a = np.asarray(grams_a(a.variables, images), np.float64)
    of_b = np.asarray(grams_b(b.variables, images), np.float64)
    between += unbiased_hsic(of_a, of_b)
    own_a += np.diag(unbiased_hsic(of_a, of_a))
    own_b += np.diag(unbiased_hsic(of_b, of_b))
  with np.errstate(invalid="ignore"):
    return between / np.sqrt(np.outer(own_a, own_b))


def _make_grams(trained):
  """Returns (variables, images) -> [depth + 1, B, B], of centred features.

  Centring changes no HSIC, and spares float32 the common part.
  """

  @jax.jit
  def grams(variables, images):
    x = trained.normalize(images)
    rows = (
      trained.features(variables, x, n).reshape(len(x), -1)
      for n in range(trained.model.depth + 1)
    )
    rows = (row - row.mean(0) for row in rows)
    return jnp.stack([jnp.matmul(r, r.T, precision="highest") for r in rows])

  return grams


@dataclasses.dataclass(frozen=True)
class Mistake:
  """An image, uint8 [S, S, 3], what it is, and what it was taken for."""

  image: np.ndarray
  label: int
  predicted: int
  probability: float


def score(
  trained: Trained, batches: Iterable[Mapping[str, np.ndarray]], keep: int
) -> tuple[np.ndarray, list[Mistake]]:
  """Classifies all images.

  Args:
    trained: the model.
    batches: from `stream.eval_batches`.
    keep: how many mistakes to return.

  Returns:
    Counts [K, K], rows true and columns predicted; and the mistakes of the
    greatest probability, greatest first.
  """
  classes = trained.model.num_classes
  counts = np.zeros((classes, classes), np.int64)
  mistakes: list[Mistake] = []
  classify = jax.jit(
    lambda variables, images: jax.nn.softmax(trained.logits(variables, images))
  )
  for batch in batches:
    rows = np.asarray(classify(trained.variables, batch["image"]))
    labels, predicted = batch["label"], rows.argmax(-1)
    mask = batch["mask"]
    np.add.at(counts, (labels[mask], predicted[mask]), 1)
    mistakes += [
      Mistake(batch["image"][i], labels[i], predicted[i], rows[i].max())
      for i in np.flatnonzero(mask & (labels != predicted))
    ]
    mistakes = sorted(mistakes, key=lambda m: -m.probability)[:keep]
  return counts, mistakes


# --- Drawing.


def _figure(width, height, title=None):
  drawn = figure.Figure((width, height), layout="constrained")
  if title:
    drawn.suptitle(title, fontsize="medium")
  return drawn


def _tiled(images, title):
  """[N, h, w, 3] side by side, with white between; at most MOST_FILTERS."""
  images = images[:MOST_FILTERS]
  columns = math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  gap = max(1, round(images.shape[1] / 8))
  framed = np.pad(
    images,
    [(0, rows * columns - len(images)), (0, gap), (0, gap), (0, 0)],
    constant_values=1,
  )
  _, h, w, _ = framed.shape
  framed = framed.reshape(rows, columns, h, w, 3).swapaxes(1, 2)
  drawn = _figure(6.4, 6.4 * rows / columns + 0.4, title)
  ax = drawn.add_subplot()
  ax.imshow(framed.reshape(rows * h, columns * w, 3)[:-gap, :-gap])
  ax.axis("off")
  return drawn


def _draw_spread(every):
  drawn = _figure(9, 3.6)
  left, right = drawn.subplots(1, 2)
  found = [spread(kernels) for kernels in every]
  shade = matplotlib.colormaps["viridis"]
  for i, (distances, means, _) in enumerate(found):
    color = shade(i / max(1, len(found) - 1))
    left.plot(distances, means, ".-", color=color, label=f"block {i}")
  step = math.ceil(len(found) / 8)
  handles, labels = left.get_legend_handles_labels()
  left.legend(handles[::step], labels[::step], fontsize="small")
  left.set(xlabel="distance from the centre, patches", ylabel="mean |w|")
  right.boxplot(
    [rms for *_, rms in found], positions=range(len(found)), whis=(5, 95),
    showfliers=False,
  )  # fmt: skip
  *_, flat = spread(np.ones((*every[0].shape[:2], 1)))
  right.axhline(flat[0], ls="--", color="0.5")
  right.text(-0.45, flat[0], "flat", va="bottom")
  right.set(xlabel="block", ylabel="RMS distance of $w^2$, patches")
  return drawn


def _draw_fields(fields, patch_size, title):
  columns = math.ceil(math.sqrt(len(fields) + 1))
  rows = math.ceil((len(fields) + 1) / columns)
  drawn = _figure(2.4 * columns, 2.6 * rows + 0.3, title)
  axes = drawn.subplots(rows, columns, squeeze=False).ravel()
  for ax, (depth, field) in zip(axes, fields.items()):
    # The root shows the faint outskirts.
    ax.imshow(np.sqrt(field / max(field.max(), 1e-30)), "magma")
    ax.set_title(f"blocks: {depth}" if depth else "stem", fontsize="small")
    ax.set(xticks=[], yticks=[])
  for ax in axes[len(fields) + 1 :]:
    ax.axis("off")
  ax = axes[len(fields)]
  for share in (0.5, 0.95):
    sides = [reach(field, patch_size, share) for field in fields.values()]
    ax.plot(list(fields), sides, ".-", label=f"{100 * share:.0f} % of it")
  ax.set_ylim(0, len(field) + 1)
  ax.set_title("side of the square with", fontsize="small")
  ax.set(xlabel="blocks", ylabel="pixels")
  ax.legend(fontsize="small")
  return drawn


def _draw_cka(values, other):
  drawn = _figure(5.2, 4.6, "Linear CKA; 0 is the stem")
  ax = drawn.add_subplot()
  image = ax.imshow(values, "magma", vmin=0, vmax=1, origin="lower")
  drawn.colorbar(image)
  ax.set_xlabel(f"blocks of {other}", parse_math=False)
  ax.set_ylabel("blocks of the model")
  return drawn


def _draw_confusion(counts, names, title):
  classes = len(counts)
  side = min(12.0, 3 + 0.42 * classes)
  drawn = _figure(side + 0.6, side, title)
  ax = drawn.add_subplot()
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  image = ax.imshow(shares, "Blues", vmin=0, vmax=1)
  drawn.colorbar(image, label="share of the true class", shrink=0.8)
  ax.set(xlabel="predicted", ylabel="true")
  if classes <= 50:
    names = [_short(name) for name in names]
    ax.set_xticks(range(classes), names, rotation=90, parse_math=False)
    ax.set_yticks(range(classes), names, parse_math=False)
  if classes <= 20:
    for (i, j), count in np.ndenumerate(counts):
      color = "white" if shares[i, j] > 0.5 else "black"
      text = {"ha": "center", "va": "center", "fontsize": "small"}
      ax.text(j, i, str(count) if count else "", color=color, **text)
  return drawn


def _short(name):
  """Of ImageNet's synonyms the first."""
  return name.partition(",")[0][:24]


def _draw_mistakes(mistakes, names):
  columns = 5
  rows = max(1, math.ceil(len(mistakes) / columns))
  drawn = _figure(2.2 * columns, 2.6 * rows)
  axes = drawn.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes:
    ax.axis("off")
  for ax, m in zip(axes, mistakes):
    ax.imshow(m.image)
    text = f"{_short(names[m.predicted])} ({100 * m.probability:.0f} %)"
    text += f"\ntrue: {_short(names[m.label])}"
    ax.set_title(text, fontsize="small", parse_math=False)
  return drawn


if __name__ == "__main__":
  cli.run(main, _FLAGS)
