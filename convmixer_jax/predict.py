"""Classifies photographs.

  python -m convmixer_jax.predict --weights convmixer_768_32.safetensors a.jpg
  python -m convmixer_jax.predict --top 3 photos/ \\
      --weights hf-hub:timm/convmixer_1536_20.in1k
  find photos -name '*.png' | python -m convmixer_jax.predict \\
      --weights runs/cifar10 --json -

Arguments are image files, folders, or - for a list on standard input, one path
a line. All formats of Pillow are read. An image is resized and cropped as in an
evaluation; the orientation in a JPEG's EXIF data is ignored, as in training. A
file that is not an image gives an error line; the others are classified, and
the exit code is 2.
"""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import json
import os
from pathlib import Path
import sys

import jax
import numpy as np
import tqdm

from convmixer_jax import augment
from convmixer_jax import cli
from convmixer_jax import weights
from convmixer_jax.data import decode
from convmixer_jax.data import folder
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_WEIGHTS, _MODEL = _FLAGS.define_weights()
_TOP = _FLAGS.positive("top", "Number of classes to print: --top 3.", 5)
_BATCH_SIZE = _FLAGS.positive(
  "batch_size", "Images per batch: --batch_size 64.", 32
)
_JSON = _FLAGS.boolean(
  "json", "Print a JSON object for each image, one a line: --json."
)


def main(*arguments: str) -> None:
  """Runs what the flags say; see --help."""
  files = image_files(arguments)
  model, variables, data = weights.load_model(
    cli.required(_WEIGHTS), _MODEL.value
  )
  normalize = augment.make_normalize(data["mean"], data["std"])

  @jax.jit
  def probabilities(variables, images):
    logits = model.apply(variables, normalize(images), train=False)
    return jax.nn.softmax(logits)

  names = data["class_names"] or [str(k) for k in range(model.num_classes)]
  batch_size = min(_BATCH_SIZE.value, len(files))
  variables = jax.device_put(variables)
  failed = False
  quiet = not sys.stderr.isatty() or len(files) < 10
  with tqdm.tqdm(total=len(files), unit="img", disable=quiet) as bar:
    batches = decoded(files, batch_size, data["image_size"], data["crop_pct"])
    for paths, images, errors in batches:
      padding = [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)]
      rows = probabilities(variables, np.pad(images, padding))
      for path, row, error in zip(paths, np.asarray(rows), errors):
        if error:
          failed = True
          text = UserError(f"{path}: {error}")
          tqdm.tqdm.write(f"error: {text}", file=sys.stderr)
        else:
          tqdm.tqdm.write(_format(path, row, names), file=sys.stdout)
      bar.update(len(paths))
  if failed:
    sys.exit(2)


def _format(path, row, names):
  best = np.argsort(-row)[: _TOP.value]
  if _JSON.value:
    predictions = [
      {"class": int(k), "name": names[k], "probability": float(row[k])}
      for k in best
    ]
    return json.dumps({"image": path, "predictions": predictions})
  lines = [f"  {100 * row[k]:6.2f} %  {names[k]}" for k in best]
  return "\n".join([path, *lines])


def image_files(arguments: Sequence[str]) -> list[str]:
  """Replaces folders by their images, sorted, and - by standard input's lines.

  Raises UserError if there are no images.
  """
  files = []
  for argument in arguments:
    if argument == "-":
      files += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    elif os.path.isdir(argument):
      files += sorted(folder.images(Path(argument)))
    else:
      files.append(argument)
  if not files:
    raise UserError("no images given; pass files, folders or -")
  return files


def decoded(
  files: Sequence[str], batch_size: int, size: int, crop_pct: float
) -> Iterator[tuple[Sequence[str], np.ndarray, list[str]]]:
  """Decodes in threads, ahead of the consumer.

  Yields up to `batch_size` paths, their images uint8 [B, size, size, 3], and an
  error for each file, or ''.
  """

  def load(path):
    try:
      return decode.eval_image(decode.read_file(path), size, crop_pct), ""
    except Exception as e:  # Pillow may raise anything for a damaged file.
      reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
      return np.zeros((size, size, 3), np.uint8), f"cannot be decoded: {reason}"

  def collect(chunk, pending):
    images, errors = zip(*pending)
    return chunk, np.stack(images), list(errors)

  ahead = collections.deque()
  with futures.ThreadPoolExecutor() as pool:
    for i in range(0, len(files), batch_size):
      chunk = files[i : i + batch_size]
      ahead.append((chunk, pool.map(load, chunk)))
      if len(ahead) > 2:
        yield collect(*ahead.popleft())
    while ahead:
      yield collect(*ahead.popleft())


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
