"""What a config must hold: every field, its values, and how fields fit."""

from collections.abc import Callable
from collections.abc import Mapping
import runpy
from typing import Any

import ml_collections

from convmixer_jax import augment
from convmixer_jax import models
from convmixer_jax import optim
from convmixer_jax.errors import UserError
from convmixer_jax.models import convmixer
from convmixer_jax.models import stack

Rule = tuple[str, Callable[[Any], bool]]  # (what is accepted, test)

_LARGEST = 1e30  # Neither infinity nor nan, in float32 too.


def _integer(low: int, high: int = 2**32 - 1) -> Rule:
  test = lambda v: (
    isinstance(v, int) and not isinstance(v, bool) and low <= v <= high
  )
  return f"an integer of at least {low}, at most {high}", test


def _number(low: float, high: float = _LARGEST) -> Rule:
  test = lambda v: (
    isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high
  )
  if high == _LARGEST:
    return f"a number of at least {low}", test
  return f"a number from {low} to {high}", test


def _numbers(count: int, low: float, high: float = _LARGEST) -> Rule:
  text, test = _number(low, high)
  return (
    f"{count} values, each {text}",
    lambda v: (
      isinstance(v, (tuple, list)) and len(v) == count and all(map(test, v))
    ),
  )


def _ascending(rule: Rule) -> Rule:
  text, test = rule
  return f"{text}, ascending", lambda v: test(v) and list(v) == sorted(v)


def _choice(*names: str) -> Rule:
  test = lambda v: isinstance(v, str) and v in names
  return f"one of {', '.join(names)}", test


def _optional(rule: Rule) -> Rule:
  text, test = rule
  return f"{text}, or None", lambda v: v is None or test(v)


_TEXT: Rule = ("a string", lambda v: isinstance(v, str) and bool(v))
_BOOL: Rule = ("true or false", lambda v: isinstance(v, bool))
_NAMES: Rule = (
  "a tuple of strings",
  lambda v: isinstance(v, (tuple, list)) and all(isinstance(x, str) for x in v),
)

# Every config has exactly these.
FIELDS: dict[str, Rule] = {
  "model.name": _TEXT,
  "model.dim": _optional(_integer(1, 2**16)),
  "model.depth": _optional(_integer(1, 1000)),
  "model.patch_size": _optional(_integer(1, 1000)),
  "model.kernel_size": _optional(_integer(1, 1000)),
  "model.activation": _optional(_choice("gelu", "relu")),
  "model.norm": _optional(_choice(*convmixer.NORMS)),
  "model.depthwise_residual": _optional(_BOOL),
  "model.pointwise_residual": _optional(_BOOL),
  "model.bn_group_size": _optional(_integer(0)),
  "model.scan": _optional(_BOOL),
  "model.remat": _optional(_choice(*stack.REMAT_POLICIES)),
  "model.dtype": _optional(_choice("float32", "bfloat16")),
  "data.name": _TEXT,
  "data.dir": _optional(_TEXT),
  "data.image_size": _integer(1, 10_000),
  "data.train_split": _TEXT,
  "data.eval_split": _TEXT,
  "data.mean": _numbers(3, 0, 1),
  "data.std": _numbers(3, 1e-3, 1),
  "data.crop_pct": _number(0.1, 1),
  "data.num_workers": _integer(0, 1000),
  "data.max_unreadable": _integer(0),
  "augment.flip": _BOOL,
  "augment.crop_scale": _ascending(_numbers(2, 0.01, 1)),
  "augment.crop_ratio": _ascending(_numbers(2, 0.01, 100)),
  "augment.interpolation": _choice("bilinear", "bicubic", "random"),
  "augment.randaugment": ("a policy, or empty", lambda v: isinstance(v, str)),
  "augment.color_jitter": _number(0, 1),
  "augment.mixup_alpha": _number(0),
  "augment.cutmix_alpha": _number(0),
  "augment.cutmix_prob": _number(0, 1),
  "augment.mix_group_size": _integer(0),
  "augment.erase_prob": _number(0, 1),
  "augment.erase_mode": _choice("pixel", "const"),
  "augment.erase_area": _ascending(_numbers(2, 0.001, 1)),
  "augment.erase_aspect": _ascending(_numbers(2, 0.01, 100)),
  "augment.label_smoothing": _number(0, 0.999),
  "optim.learning_rate": _number(0),
  "optim.schedule": _choice(*optim.SCHEDULES),
  "optim.warmup_epochs": _number(0),
  "optim.weight_decay": _number(0),
  "optim.decay_all": _BOOL,
  "optim.eps": _number(1e-12),
  "optim.betas": _numbers(2, 0, 0.999999),
  "optim.clip_norm": _number(0),
  "ema_decay": _number(0, 0.999999),
  "epochs": _integer(1, 10**6),
  "batch_size": _integer(1, 10**6),
  "accum_steps": _integer(1),
  "seed": _integer(0),  # At most 2**32 - 1: jax drops higher bits.
  "deterministic": _BOOL,
  "log_every": _integer(1),
  "eval_every": _integer(1),
  "save_every": _integer(1),
  "init_from": _optional(_TEXT),
  "freeze": _NAMES,
  "backbone_lr_scale": _number(0),
}

# Those that leave the numbers of a run as they are, scan and remat but for
# rounding: a resumed run may differ.
FREE_FIELDS = (
  "model.scan",
  "model.remat",
  "data.num_workers",
  "data.max_unreadable",
  "log_every",
  "eval_every",
  "save_every",
)


def load_file(name: str) -> ml_collections.ConfigDict:
  """Runs a config file's `get_config`: 'configs/imagenet.py:768_32'.

  Args:
    name: path of the file, with a variant after a colon where it has some.
  """
  path, *variant = name.split(":")
  return runpy.run_path(path)["get_config"](*variant)


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
  """Refuses values that no config may have.

  Args:
    values: flat, some or all of `FIELDS`.
    where: they are from, for the message.

  Raises:
    UserError: naming the field, its value and what is accepted.
  """
  for name, value in values.items():
    if name not in FIELDS:
      raise UserError(f"{where}{name}={_shown(value)}: no such field")
    text, test = FIELDS[name]
    if not test(value):
      raise UserError(f"{where}{name}={_shown(value)}: must be {text}")


def _shown(value):
  try:
    return repr(value)
  except Exception:  # An integer of thousands of digits, for one.
    return f"<{type(value).__name__}>"


def check(config: ml_collections.ConfigDict, num_devices: int | None) -> None:
  """Refuses a config that cannot train, before anything is written.

  Args:
    config: of a run.
    num_devices: over all processes, to divide batches among; None: to evaluate,
      which pads them.

  Raises:
    UserError: naming the field, its value and what is accepted.
  """
  values = flatten(config)
  for name in FIELDS:
    if name not in values:
      raise UserError(f"config.{name}: missing; must be {FIELDS[name][0]}")
  check_values(values, "config.")

  model = models.create_model(**config.model)
  if model.patch_size > config.data.image_size:
    raise UserError(
      f"config.model.patch_size={model.patch_size}: larger than"
      f" data.image_size={config.data.image_size}"
    )
  if config.augment.randaugment:
    augment.parse(config.augment.randaugment)
  warmup = config.optim.warmup_epochs
  if warmup and config.optim.schedule == "onecycle":
    raise UserError(
      f"config.optim.warmup_epochs={warmup}: schedule=onecycle has its own"
    )
  if warmup >= config.epochs:
    raise UserError(
      f"config.optim.warmup_epochs={warmup}: must be below"
      f" epochs={config.epochs}"
    )
  if num_devices is None:
    return
  batch, accum = config.batch_size, config.accum_steps
  group = config.model.bn_group_size or 1
  if batch % num_devices:
    raise UserError(
      f"config.batch_size={batch}: must be a multiple of the {num_devices}"
      " devices"
    )
  if batch % accum:
    raise UserError(
      f"config.accum_steps={accum}: must divide batch_size={batch}"
    )
  if batch // accum % group:
    raise UserError(
      f"config.model.bn_group_size={group}: must divide the {batch // accum}"
      " images of batch_size / accum_steps"
    )
  mixed = config.augment.mix_group_size or 1
  if batch % mixed:
    raise UserError(
      f"config.augment.mix_group_size={mixed}: must divide batch_size={batch}"
    )
