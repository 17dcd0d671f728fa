"""Scores weights on ImageNet's test sets, beside the published accuracies.

  python -m experiments.test_sets --weights hf-hub:timm/convmixer_768_32.in1k
  python -m experiments.test_sets --weights runs/imagenet --data_dir /data \\
      --sets imagenet_a,imagenet_v2/matched-frequency

Prints a markdown table with a row for each set that TFDS has prepared in
--data_dir; those that are not there are listed on standard error. Published
values are those of the ConvMixer with the same sizes, in test_sets.csv. How
each set is scored is in convmixer_jax/data/test_sets.py.
"""

import csv
from pathlib import Path
import sys

import jax
import tensorflow_datasets as tfds

from convmixer_jax import classes
from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import evaluate
from convmixer_jax import models
from convmixer_jax import recipe as recipe_lib
from convmixer_jax import sharding
from convmixer_jax import weights
from convmixer_jax.data import sources
from convmixer_jax.data import test_sets
from convmixer_jax.errors import UserError
from convmixer_jax.step import TrainState

with Path(__file__).with_suffix(".csv").open(encoding="utf-8") as _file:
  _PUBLISHED = [*csv.DictReader(_file)]
_SETS = [*dict.fromkeys(row["tfds_name"] for row in _PUBLISHED)]

_FLAGS = cli.Flags()
_WEIGHTS, _MODEL = _FLAGS.define_weights()
_DATA_DIR = _FLAGS.string(
  "data_dir",
  "TFDS's data directory: --data_dir /data. Default: $TFDS_DATA_DIR or"
  " ~/tensorflow_datasets.",
)
_SETS_FLAG = _FLAGS.words(
  "sets", f"Sets to score, as TFDS names them: --sets {','.join(_SETS)}.", _SETS
)
_BATCH_SIZE = _FLAGS.positive("batch_size", "Batch size: --batch_size 32.", 64)
_NUM_WORKERS = _FLAGS.integer(
  "num_workers",
  "Decoding processes: --num_workers 16. Default: threads.",
  0,
  lower_bound=0,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  if unknown := [x for x in _SETS_FLAG.value if x not in _SETS]:
    raise UserError(f"--sets={unknown[0]}: unknown; known are {_SETS}")
  where = cli.required(_WEIGHTS)
  model, variables, data = weights.load_model(where, _MODEL.value)
  if model.num_classes != 1000:
    raise UserError(
      f"--weights={where}: has {model.num_classes} classes; these sets are for"
      " models of ImageNet's 1000"
    )
  config = config_lib.defaults()
  config.batch_size = _BATCH_SIZE.value
  config.data.num_workers = _NUM_WORKERS.value
  for field in ("image_size", "crop_pct", "mean", "std"):
    config.data[field] = data[field]
  mesh = sharding.make_mesh()
  variables = jax.device_put(variables, sharding.replicated(mesh))
  state = TrainState(step=None, opt_state=(), **variables)
  prepared, folder = [], _DATA_DIR.value or "TFDS's directory"
  for name in _SETS_FLAG.value:
    if tfds.builder(name, data_dir=_DATA_DIR.value).is_prepared():
      prepared.append(name)
    else:
      print(f"left out: {name}: not prepared in {folder}", file=sys.stderr)
  if not prepared:
    raise UserError(f"--data_dir: none of the sets is prepared in {folder}")
  print("| set | images | top-1 | top-5 | published top-1 |")
  print("|---|---:|---:|---:|---:|", flush=True)
  for name in prepared:
    split = test_sets.TEST_SETS[name.partition("/")[0]].split
    source = sources.open_source(
      name, _DATA_DIR.value, split, config.data.image_size
    )
    classes.check(where, source.class_names, trains=False)
    recipe = recipe_lib.Recipe(
      config, source, mesh, model, variables, None, None
    )
    score = evaluate.make_evaluate(recipe, source, state)(state)
    print(
      f"| {name} | {score['count']} | {score['top1']:.2f} |"
      f" {score['top5']:.2f} | {_published(name, model)} |",
      flush=True,
    )


def _published(name, model):
  """The published top-1 of the ConvMixer of these sizes, or ''."""
  fields = ("dim", "depth", "patch_size", "kernel_size")
  sizes = lambda model: [getattr(model, field, None) for field in fields]
  for row in _PUBLISHED:
    theirs = models.create_model(row["model"])
    if row["tfds_name"] == name and sizes(theirs) == sizes(model):
      return f"{float(row['value']):.2f}"
  return ""


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
