"""Pictures of a trained model: filters, receptive fields, CKA and mistakes.

  python -m experiments.pictures --workdir runs/cifar10
  python -m experiments.pictures --workdir runs/cifar10 --blocks 0,7 \\
      --out pictures --data_dir /data/tfds
  python -m experiments.pictures --workdir runs/cifar10 --against runs/p4

Writes PNG files: the filters of the patch embedding; of models that have them,
the depthwise kernels of some blocks, as in the paper, and the distance of their
weights from the centre;
the effective receptive field after some blocks (Luo et al., 2016); linear CKA
between the layers of two models, or of one model with itself (Kornblith et al.,
2019; by minibatches as in Nguyen et al., 2021); the confusion matrix; and the
most confident mistakes. Images are those of the run's evaluation split.
"""

from collections.abc import Iterator
import contextlib
import math

import jax
import matplotlib
from matplotlib import figure
import numpy as np
import tqdm

from convmixer_jax import classes
from convmixer_jax import cli
from convmixer_jax import files
from convmixer_jax import logger
from convmixer_jax import models
from convmixer_jax import weights
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.data import sources
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError
from experiments import measures

_FLAGS = cli.Flags()
_WORKDIR = _FLAGS.string(
  "workdir", "Run whose newest checkpoint is used: --workdir runs/p4."
)
_OUT = _FLAGS.string(
  "out", "Folder to write to: --out pictures. Default: in the workdir."
)
_AGAINST = _FLAGS.string(
  "against",
  "For CKA, another workdir or a file of weights: --against runs/p4. Default:"
  " the model itself.",
)
_BLOCKS = _FLAGS.words(
  "blocks",
  "Blocks to draw, from 0: --blocks 0,3,7. Default: first, middle and last.",
)
_NUM_IMAGES = _FLAGS.integer(
  "num_images",
  "Images for fields and CKA: --num_images 99.",
  512,
  lower_bound=4,
)
_BATCH_SIZE = _FLAGS.integer(
  "batch_size", "Batch size: --batch_size 32.", 128, lower_bound=4
)
_DATA_DIR = _FLAGS.string(
  "data_dir", "Data directory, if it has moved: --data_dir /data."
)

MOST_FILTERS = 256  # On one picture.
MOST_DEPTHS = 9  # Receptive fields on one picture.
MISTAKES = 25


def main() -> None:
  """Runs what the flags say; see --help."""
  workdir = cli.required(_WORKDIR)
  config = workdir_lib.load_config(workdir)
  data = config.data
  trained, names = _load(workdir, data.image_size)
  blocks = _blocks(trained.depth, _BLOCKS.value)
  source = sources.open_source(
    data.name, _DATA_DIR.value or data.dir, data.eval_split, data.image_size
  )
  if len(source.class_names) != trained.model.num_classes:
    raise UserError(
      f"--workdir={workdir}: the model has {trained.model.num_classes} classes,"
      f" the data {len(source.class_names)}"
    )
  classes.check(workdir, source.class_names, trains=False)
  against = trained
  if _AGAINST.value:
    against, _ = _load(_AGAINST.value, data.image_size)
  out = files.path(_OUT.value or files.path(workdir) / "pictures")
  for name, about, drawn in _pictures(
    trained, against, config, source, names or source.class_names, blocks
  ):
    try:
      with files.output(out) as folder:
        drawn.savefig(folder / name, dpi=150)
    except OSError as e:
      raise UserError(f"--out={out}: {e.strerror or e}") from e
    print(f"{out / name}: {about}", flush=True)


def _load(where, image_size):
  """A model for images of this size, and the names of its classes."""
  if files.is_folder(where):
    workdir_lib.load_config(where)  # Checks it.
  model, variables, data = weights.load_model(where)
  try:
    model.check(image_size)
  except UserError as e:
    raise UserError(f"{where}: {e}") from e
  shapes = models.variable_shapes(model, image_size)
  variables = jax.device_put(weights.match(variables, shapes, where))
  trained = measures.Trained(model, variables, data["mean"], data["std"])
  return trained, data["class_names"]


def _blocks(depth, given):
  if given is None:
    return sorted({0, (depth - 1) // 2, depth - 1})
  if not given or not {str(i) for i in range(depth)} >= set(given):
    text = ",".join(given)
    raise UserError(f"--blocks={text}: must be numbers from 0 to {depth - 1}")
  return sorted(map(int, given))


def _pictures(
  trained, against, config, source, names, blocks
) -> Iterator[tuple[str, str, figure.Figure]]:
  """File name, description and picture, one after the other."""
  params, depth = trained.variables["params"], trained.depth
  stem = np.asarray(params["stem"]["kernel"], np.float32)
  about = f"{_size(stem)} filters of the stem, gray is 0"
  yield "stem.png", about, _tiled(scaled(stem), about)
  if "depthwise" in params.get("block_0", {}):
    every = [measures.depthwise_kernels(params, i) for i in range(depth)]
    for block in blocks:
      about = f"block {block}: {_size(every[block])} kernels, white is 0"
      yield f"block_{block}.png", about, _tiled(shades(every[block]), about)
    about = "distance of the depthwise weights from the centre"
    yield "spread.png", about, _draw_spread(every)

  batches = _first_images(config.data, source)
  count = f"{len(batches) * len(batches[0])} held-out images"
  depths = sorted({round(n) for n in np.linspace(0, depth, MOST_DEPTHS)})
  fields = {
    n: measures.receptive_field(trained, batches, n)
    for n in tqdm.tqdm(depths, "receptive fields", disable=None)
  }
  about = f"effective receptive field, mean of {count}"
  centers = {n: trained.center(config.data.image_size, n) for n in fields}
  yield "receptive_field.png", about, _draw_fields(fields, centers, about)
  other = "the model itself" if against is trained else _AGAINST.value
  about = f"linear CKA with {other}, {count}"
  values = measures.cka(trained, against, batches)
  yield "cka.png", about, _draw_cka(values, other)

  held_out = logger.progress(
    _held_out(config.data, source), math.ceil(len(source) / _BATCH_SIZE.value)
  )
  counts, mistakes = measures.score(trained, held_out, MISTAKES)
  top1 = 100 * np.trace(counts) / counts.sum()
  about = f"{counts.sum()} images, top-1 {top1:.2f} %"
  yield "confusion.png", about, _draw_confusion(counts, names, about)
  about = f"the {len(mistakes)} most confident mistakes"
  yield "mistakes.png", about, _draw_mistakes(mistakes, names)


def _size(kernels):
  """[k, k, ..., N] -> '256 of N k x k', for captions."""
  side, count = len(kernels), kernels.shape[-1]
  return f"{min(count, MOST_FILTERS)} of {count} {side} x {side}"


def _held_out(data, source):
  """Batches of the run's evaluation split; see `stream.eval_batches`."""
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
  """uint8 [N / B, B, S, S, 3]: the whole batches among the first images."""
  images = []
  with contextlib.closing(_held_out(data, source)) as held_out:
    for batch in held_out:
      images.append(batch["image"][batch["mask"]])
      if sum(map(len, images)) >= _NUM_IMAGES.value:
        break
  images = np.concatenate(images)[: _NUM_IMAGES.value]
  size = min(len(images), _BATCH_SIZE.value)
  if size < 4:
    raise UserError(f"data.eval_split={data.eval_split}: under 4 images")
  images = images[: len(images) // size * size]
  return images.reshape(-1, size, *images.shape[1:])


# --- Drawing.


def shades(kernels: np.ndarray) -> np.ndarray:
  """[k, k, N] -> [N, k, k, 3]: red is positive, blue is negative."""
  return matplotlib.colormaps["RdBu_r"](scaled(kernels))[..., :3]


def scaled(kernels: np.ndarray) -> np.ndarray:
  """[..., N] -> [N, ...] in [0, 1], each kernel scaled alone; 0 becomes 0.5."""
  kernels = np.moveaxis(kernels, -1, 0)
  axes = tuple(range(1, kernels.ndim))
  largest = np.abs(kernels).max(axes, keepdims=True)
  return 0.5 + 0.5 * kernels / np.maximum(largest, 1e-30)


def _figure(width, height, title=None):
  drawn = figure.Figure((width, height), layout="constrained")
  if title:
    drawn.suptitle(title, fontsize="medium")
  return drawn


def _tiled(images, title):
  """[N, h, w, 3] in a grid with white gaps; at most MOST_FILTERS."""
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
  found = [measures.spread(kernels) for kernels in every]
  shade = matplotlib.colormaps["viridis"]
  for i, (distances, means, _) in enumerate(found):
    color = shade(i / max(1, len(found) - 1))
    left.plot(distances, means, ".-", color=color, label=f"block {i}")
  some = left.lines[:: math.ceil(len(found) / 8)]
  left.legend(handles=some, fontsize="small")
  left.set(xlabel="distance from the centre, patches", ylabel="mean |w|")
  right.boxplot(
    [rms for *_, rms in found], positions=range(len(found)), whis=(5, 95),
    showfliers=False,
  )  # fmt: skip
  *_, flat = measures.spread(np.ones((*every[0].shape[:2], 1)))
  right.axhline(flat[0], ls="--", color="0.5")
  right.text(-0.45, flat[0], "flat", va="bottom")
  right.set(xlabel="block", ylabel="RMS distance of $w^2$, patches")
  return drawn


def _draw_fields(fields, centers, title):
  columns = math.ceil(math.sqrt(len(fields) + 1))
  rows = math.ceil((len(fields) + 1) / columns)
  drawn = _figure(2.4 * columns, 2.6 * rows + 0.3, title)
  axes = drawn.subplots(rows, columns, squeeze=False).ravel()
  for ax, (depth, field) in zip(axes, fields.items()):
    # The root makes the faint outer part visible.
    ax.imshow(np.sqrt(field / max(field.max(), 1e-30)), "magma")
    ax.set_title(f"blocks: {depth}" if depth else "stem", fontsize="small")
    ax.set(xticks=[], yticks=[])
  for ax in axes[len(fields) + 1 :]:
    ax.axis("off")
  ax = axes[len(fields)]
  largest = len(field)  # A square about a centre off the middle may be larger.
  for share in (0.5, 0.95):
    sides = [measures.reach(f, centers[n], share) for n, f in fields.items()]
    ax.plot(list(fields), sides, ".-", label=f"{100 * share:.0f} % of it")
    largest = max(largest, *sides)
  ax.set_ylim(0, 1.05 * largest)
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
  """The first of ImageNet's synonyms, without what matplotlib cannot draw."""
  name = name.encode(errors="backslashreplace").decode()
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
