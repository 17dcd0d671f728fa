"""JPEG decoding with a random crop, beside TensorFlow and Pillow, on one core.

  python -m benchmarks.decode
  python -m benchmarks.decode --photos "~/photos/*.jpg" --json

Crops the same boxes of the same photographs and resizes them to 224 x 224, in
one process and one thread. Results are images per second.

  ours                  data.decode.train_image, which the data workers call
  pillow                open, crop, resize: torchvision's RandomResizedCrop
  tensorflow, pillow    decode_and_crop_jpeg, then Pillow's resize
  tensorflow antialias  decode_and_crop_jpeg, then resize(antialias=True)
  tensorflow            the same without antialiasing, which is less work
"""

import functools
import io
import json
import os
import sys

import numpy as np
from PIL import Image

import benchmarks
from convmixer_jax import cli
from convmixer_jax.data import decode
from convmixer_jax.errors import UserError

_FLAGS = cli.Flags()
_PHOTOS = benchmarks.define_photos(_FLAGS)
_REPEATS = benchmarks.define_repeats(_FLAGS)
_JSON = benchmarks.define_json(_FLAGS)
SIZE = 224
CROPS = 200  # In each timing.


def main() -> None:
  """Runs what the flags say; see --help."""
  os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  try:
    import tensorflow as tf
  except ImportError as e:
    raise UserError(
      f"{e}; install it with: {sys.executable} -m pip install tensorflow-cpu"
    ) from e
  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)
  photos = [path.read_bytes() for path in _PHOTOS()]
  law = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
  jobs = []  # Photo, seed, and the box that train_image draws with the seed.
  for seed in range(CROPS):
    data = photos[seed % len(photos)]
    size = Image.open(io.BytesIO(data)).size
    rng = np.random.default_rng(seed)
    jobs.append((data, seed, decode.random_box(*size, rng, **law)))

  def ours(data, seed, box):
    del box
    rng = np.random.default_rng(seed)
    return decode.train_image(data, SIZE, rng, interpolation="bilinear", **law)

  def pillow(data, seed, box):
    del seed
    image = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

  def tensorflow(antialias, resize=True):
    @tf.function(
      input_signature=[tf.TensorSpec((), tf.string), tf.TensorSpec(4, tf.int32)]
    )
    def crop(data, window):
      image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
      if not resize:
        return image
      image = tf.image.resize(image, (SIZE, SIZE), antialias=antialias)
      return tf.cast(image + 0.5, tf.uint8)

    def call(data, seed, box):
      del seed
      left, top, right, bottom = box
      window = np.array([top, left, bottom - top, right - left], np.int32)
      image = crop(data, window).numpy()
      if resize:
        return image
      image = Image.fromarray(image)
      return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    return call

  ways = {
    "ours": ours,
    "pillow": pillow,
    "tensorflow, pillow": tensorflow(False, resize=False),
    "tensorflow antialias": tensorflow(True),
    "tensorflow": tensorflow(False),
  }
  difference = np.abs(ours(*jobs[0]).astype(int) - pillow(*jobs[0])).mean()
  crop_all = lambda way: [way(*job) for job in jobs] and None
  times = benchmarks.by_turns(
    {k: functools.partial(crop_all, way) for k, way in ways.items()},
    _REPEATS.value,
  )
  result = {
    "images_per_second_per_core": {
      name: benchmarks.summary(CROPS / values) for name, values in times.items()
    },
    "ours_over": {
      name: round(float(np.median(values / times["ours"])), 2)
      for name, values in times.items()
      if name != "ours"
    },
    "mean_difference_from_pillow": round(float(difference), 3),
    "photos": len(photos),
    "versions": {"tensorflow": tf.__version__, "pillow": Image.__version__},
  }
  if _JSON.value:
    print(json.dumps(result | benchmarks.provenance(), indent=2))
    return
  for name, values in result["images_per_second_per_core"].items():
    ratio = result["ours_over"].get(name, 1.0)
    print(
      f"{name:22} {values['median']:7.0f} img/s"
      f"  ({values['least']:.0f} to {values['greatest']:.0f})"
      f"  ours / this {ratio:.2f}"
    )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
