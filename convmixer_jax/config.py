"""Every field of a config: default, accepted values and meaning; checks."""

from collections.abc import Mapping
import difflib
import os
import runpy
import sys
import threading
from typing import Any
from typing import NamedTuple

import ml_collections

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax import rules
from convmixer_jax.errors import UserError
from convmixer_jax.models import stack


class Field(NamedTuple):
  """A field of a config: its default, accepted values and meaning."""

  default: Any
  rule: rules.Rule
  help: str


# Every config has exactly these fields. Those of `model` are the attributes of
# all families together; None is the variant's own value.
# fmt: off
FIELDS: dict[str, Field] = {
  "model.name": Field("convmixer_256_8", rules.TEXT,
    "A key of models.VARIANTS, or MODULE:VARIANT of your own."),
  "model.dim": Field(None, rules.optional(rules.integer(1, 2**16)),
    "Width of every block."),
  "model.depth": Field(None, rules.optional(rules.integer(1, 1000)),
    "Number of blocks."),
  "model.patch_size": Field(None, rules.optional(rules.integer(1, 1000)),
    "Side of a patch, and stride of the stem, in pixels."),
  "model.kernel_size": Field(None, rules.optional(rules.integer(1, 1000)),
    "Side of the depthwise kernels."),
  "model.depths": Field(None, rules.optional(rules.integers(1, 1000)),
    "Number of blocks in each stage of a ResNet."),
  "model.widths": Field(None, rules.optional(rules.integers(1, 2**16)),
    "Width of each stage of a ResNet."),
  "model.heads": Field(None, rules.optional(rules.integer(1, 2**16)),
    "Number of attention heads."),
  "model.expansion": Field(None, rules.optional(rules.integer(1, 100)),
    "Width inside a MobileNetV3's block, over dim."),
  "model.head_dim": Field(None, rules.optional(rules.integer(1, 2**16)),
    "Width of a MobileNetV3's layer before the last."),
  "model.layer_scale": Field(None, rules.optional(rules.number(0)),
    "What the factors of a ResMLP's branches start as."),
  "model.dropout": Field(None, rules.optional(rules.number(0, 0.99)),
    "Share of an MLP's activations that training drops."),
  "model.drop_path": Field(None, rules.optional(rules.number(0, 0.99)),
    "Probability with which training drops a block's branch of an image."),
  "model.activation": Field(None, rules.optional(rules.choice("gelu", "relu")),
    "Activation after every convolution."),
  "model.norm": Field(None, rules.optional(rules.choice("batch", "layer")),
    "BatchNorm, or LayerNorm over the channels of each location."),
  "model.depthwise_residual": Field(None, rules.optional(rules.BOOL),
    "Residual connection around the depthwise stage."),
  "model.pointwise_residual": Field(None, rules.optional(rules.BOOL),
    "Residual connection around the pointwise stage."),
  "model.pooled_stem": Field(None, rules.optional(rules.BOOL),
    "A stem of stride 1 and a mean over each patch, instead of patches."),
  "model.bn_group_size": Field(None, rules.optional(rules.integer(0)),
    "Images that share BatchNorm statistics (the paper: 64); 0: whole batch."),
  "model.scan": Field(None, rules.optional(rules.BOOL),
    "Run the blocks under one scan: compiles faster, equal up to rounding."),
  "model.remat": Field(None,
    rules.optional(rules.choice(*stack.REMAT_POLICIES)),
    "Recompute each block in the backward pass: less memory, more time."),
  "model.dtype": Field(None,
    rules.optional(rules.choice("float32", "bfloat16")),
    "Type of the computation. Parameters are float32."),
  "model.implementation": Field(None,
    rules.optional(
      rules.choice("auto", "xla", "shift", "banded", "pallas", "cuda")),
    "See ops.depthwise_conv; pallas is for TPUs, cuda for NVIDIA's GPUs."),
  "data.name": Field("cifar10", rules.TEXT,
    "A TFDS data set, or digits, or folder (DIR/SPLIT/CLASS/*.jpg)."),
  "data.dir": Field(None, rules.optional(rules.TEXT),
    "Root of the folder, or of TFDS's data (None: ~/tensorflow_datasets)."),
  "data.image_size": Field(32, rules.integer(1, 10_000),
    "Side of the model's images in pixels."),
  "data.train_split": Field("train", rules.TEXT,
    "Training images, as a TFDS slice: train[:98%]."),
  "data.eval_split": Field("test", rules.TEXT,
    "Images to score, as a TFDS slice: train[98%:]."),
  "data.mean": Field((0.5, 0.5, 0.5), rules.numbers(3, 0, 1),
    "Mean of each channel, for pixels from 0 to 1; it is subtracted."),
  "data.std": Field((0.5, 0.5, 0.5), rules.numbers(3, 1e-3, 1),
    "Standard deviation of each channel; pixels are divided by it."),
  "data.crop_pct": Field(1.0, rules.number(0.1, 1),
    "Evaluation, predict: side of the centre crop over the shorter side."),
  "data.num_workers": Field(0, rules.integer(0, 1000),
    "Processes that decode image files; 0 uses threads."),
  "data.max_unreadable": Field(0, rules.integer(0),
    "Unreadable image files that are tolerated; a warning names each."),
  "augment.flip": Field(True, rules.BOOL,
    "Mirror half of the images, left to right."),
  "augment.crop_scale": Field((1.0, 1.0), rules.interval(0.01, 1),
    "Area of the random crop, as a fraction of the image."),
  "augment.crop_ratio": Field((1.0, 1.0), rules.interval(0.01, 100),
    "Width over height of the random crop."),
  "augment.interpolation": Field("bilinear",
    rules.choice("bilinear", "bicubic", "random"),
    "How crops are resized; random draws one of the two for each image."),
  "augment.randaugment": Field("", rules.POLICY,
    "rand-m9-mstd0.5-inc1 (timm's), torchvision-n2-m12, or empty for none."),
  "augment.color_jitter": Field(0.0, rules.number(0, 1),
    "Largest change of brightness, contrast and saturation."),
  "augment.mixup_alpha": Field(0.0, rules.number(0),
    "Mixup's Beta(alpha, alpha); 0 is off."),
  "augment.cutmix_alpha": Field(0.0, rules.number(0),
    "CutMix's Beta(alpha, alpha); 0 is off."),
  "augment.cutmix_prob": Field(0.5, rules.number(0, 1),
    "Probability of CutMix instead of mixup where both are on."),
  "augment.mix_group_size": Field(0, rules.integer(0),
    "Images mixed among themselves with one draw; 0: the whole batch."),
  "augment.erase_prob": Field(0.0, rules.number(0, 1),
    "Probability that a rectangle of the image is erased."),
  "augment.erase_mode": Field("pixel", rules.choice("pixel", "const"),
    "Fill of the rectangle: noise for each pixel, or 0, the mean colour."),
  "augment.erase_area": Field((0.02, 1 / 3), rules.interval(0.001, 1),
    "Area of the rectangle, as a fraction of the image."),
  "augment.erase_aspect": Field((0.3, 1 / 0.3), rules.interval(0.01, 100),
    "Height over width of the rectangle."),
  "augment.label_smoothing": Field(0.0, rules.number(0, 0.999),
    "Share of the target that is spread over all classes."),
  "optim.learning_rate": Field(0.01, rules.number(0),
    "Peak learning rate, absolute: not scaled by the batch size."),
  "optim.schedule": Field("onecycle", rules.choice(*optim.SCHEDULES),
    "Learning rate over time; see optim.make_schedule. With 1 epoch, onecycle"
    " leaves out its peak."),
  "optim.warmup_epochs": Field(0.0, rules.number(0),
    "Epochs of linear warm-up; not for onecycle, which has its own."),
  "optim.weight_decay": Field(0.0, rules.number(0),
    "AdamW's decoupled decay, multiplied by the learning rate."),
  "optim.decay_all": Field(False, rules.BOOL,
    "Decay biases and norms too, not only kernels."),
  "optim.eps": Field(1e-8, rules.number(1e-12), "AdamW's eps."),
  "optim.betas": Field((0.9, 0.999), rules.numbers(2, 0, 0.999999),
    "AdamW's decay rates of the first and second moments."),
  "optim.clip_norm": Field(0.0, rules.number(0),
    "Largest norm of the gradient; 0 does not clip."),
  "ema_decay": Field(0.0, rules.number(0, 0.999999),
    "Evaluate a moving average of the weights with this decay; 0 is off."),
  "epochs": Field(100, rules.integer(1, 10**6),
    "Passes over the training images."),
  "batch_size": Field(64, rules.integer(1, 10**6),
    "Images per step, over all devices."),
  "accum_steps": Field(1, rules.integer(1),
    "Microbatches that a step is cut into, whose gradients are averaged."),
  "seed": Field(0, rules.integer(0),
    "Seed of the initial weights, the image order and augmentation."),
  "deterministic": Field(False, rules.BOOL,
    "Bit-exact on GPUs too, by XLA's flag; slower."),
  "log_every": Field(50, rules.integer(1),
    "Steps between two records of the loss."),
  "eval_every": Field(None, rules.optional(rules.integer(1)),
    "Steps between two evaluations; None is once an epoch."),
  "save_every": Field(None, rules.optional(rules.integer(1)),
    "Steps between two checkpoints; None is once an epoch."),
  "keep_best": Field("", rules.choice("top1", "loss", ""),
    "Keep the state of the best evaluation in WORKDIR/best, by this metric."),
  "init_from": Field(None, rules.optional(rules.TEXT),
    "Weights to start from: a workdir, a file, or hf-hub:OWNER/NAME."),
  "freeze": Field((), rules.NAMES,
    "Parameters that stay fixed, by prefix: ('stem', 'block_0/depthwise')."),
  "backbone_lr_scale": Field(1.0, rules.number(0),
    "Factor on the learning rate of all but the head."),
}
# fmt: on

# Fields that may change when a run resumes. They do not change its numbers
# (scan, remat and implementation: up to rounding).
FREE_FIELDS = (
  "model.scan",
  "model.remat",
  "model.implementation",
  "data.num_workers",
  "data.max_unreadable",
  "log_every",
  "eval_every",
  "save_every",
  "keep_best",
)


def defaults() -> ml_collections.ConfigDict:
  """A config with the default of every field."""
  nested = {}
  for name, field in FIELDS.items():
    section, _, leaf = name.rpartition(".")
    values = nested.setdefault(section, {}) if section else nested
    missing = ml_collections.config_dict.placeholder(field.rule.type)
    values[leaf] = missing if field.default is None else field.default
  return ml_collections.ConfigDict(nested)


def markdown() -> str:
  """docs/config.md, which `make docs` writes."""
  head = (
    "# Config fields\n\nEvery field is a flag: `--config.model.dim=512`. `make"
    " docs` writes this page from `convmixer_jax/config.py`.\n\n"
    "| field | accepts | default | meaning |\n|---|---|---|---|\n"
  )
  return head + "".join(
    f"| `{name}` | {rule.text} | `{default!r}` | {meaning} |\n"
    for name, (default, rule, meaning) in FIELDS.items()
  )


_LOADING = threading.RLock()  # sys.path belongs to all threads.


def load_file(name: str) -> ml_collections.ConfigDict:
  """Runs a config file's `get_config`: 'configs/imagenet.py:768_32'.

  After the colon is a variant, if it has some. It may import files beside it,
  and returns a ConfigDict or a nested dict: fields that it lacks have their
  defaults. Raises UserError for an unknown field or an invalid value, TypeError
  for another result, and whatever the file raises.
  """
  path, *variant = os.path.expanduser(name).split(":", 1)
  with _LOADING:
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
      given = runpy.run_path(path)["get_config"](*variant)
    finally:
      del sys.path[0]
  if not isinstance(given, (dict, ml_collections.ConfigDict)):
    kind = type(given).__name__
    raise TypeError(f"get_config() gives a {kind}, neither dict nor ConfigDict")
  values = flatten(given)
  check_values(values, "")
  return complete(values)


def complete(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A config with these values, flat and valid, and defaults for the rest."""
  config = defaults()
  config.update_from_flattened_dict(
    {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  )
  return config


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """{'model.dim': 256, ...}, in the order of the config."""
  flat = {}
  for name in config:
    value = config[name]
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def check_values(values: Mapping[str, Any], where: str) -> None:
  """Checks each value by itself.

  Args:
    values: flat, some or all of `FIELDS`.
    where: prefix of the message, which says where they are from.

  Raises:
    UserError: naming the field, its value and what is accepted.
  """
  for name, value in values.items():
    if name not in FIELDS:
      text = f"no such field; nearest is {nearest(name)}"
      raise UserError(f"{where}{name}={_shown(value)}: {text}")
    rule = FIELDS[name].rule
    if not rule.accepts(value):
      raise UserError(f"{where}{name}={_shown(value)}: must be {rule.text}")


def nearest(name: str) -> str:
  """The field whose name is most like `name`."""
  return difflib.get_close_matches(name, FIELDS, 1, cutoff=0)[0]


def _shown(value):
  try:
    return repr(value)
  except Exception:  # For example, an integer of thousands of digits.
    return f"<{type(value).__name__}>"


def check(config: ml_collections.ConfigDict, num_devices: int | None) -> None:
  """Checks that a run with this config can start.

  Args:
    config: of a run.
    num_devices: over all processes; the batch size must be a multiple. None: to
      evaluate, which pads batches.

  Raises:
    UserError: naming the field, its value and what is accepted.
  """
  values = flatten(config)
  for name in FIELDS:
    if name not in values:
      raise UserError(
        f"config.{name}: missing; must be {FIELDS[name].rule.text}"
      )
  check_values(values, "config.")

  models.create_model(**config.model).check(config.data.image_size)
  if config.augment.randaugment:
    augment.parse(config.augment.randaugment)

  def require(condition, name, text):
    if not condition:
      raise UserError(f"config.{name}={values[name]}: {text}")

  warmup, epochs = config.optim.warmup_epochs, config.epochs
  require(
    not warmup or config.optim.schedule != "onecycle",
    "optim.warmup_epochs",
    "must be 0: schedule=onecycle has its own",
  )
  require(
    warmup < epochs, "optim.warmup_epochs", f"must be below epochs={epochs}"
  )
  if num_devices is None:
    return
  batch, accum = config.batch_size, config.accum_steps
  require(
    batch % num_devices == 0,
    "batch_size",
    f"must be a multiple of the {num_devices} devices",
  )
  divides = f"must divide batch_size={batch}"
  require(batch % accum == 0, "accum_steps", divides)
  require(
    batch // accum % (config.model.bn_group_size or 1) == 0,
    "model.bn_group_size",
    f"must divide the {batch // accum} images of batch_size / accum_steps",
  )
  mixed = config.augment.mix_group_size or 1
  require(batch % mixed == 0, "augment.mix_group_size", divides)
