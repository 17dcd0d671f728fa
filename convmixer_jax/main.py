"""Trains and evaluates.

  python -m convmixer_jax.main --config configs/digits.py
  python -m convmixer_jax.main --config configs/cifar10.py \\
      --workdir runs/p4 --config.model.patch_size=4 --config.seed=1
  python -m convmixer_jax.main --config configs/imagenet.py:768_32 \\
      --config.data.name=folder --config.data.dir=/data/imagenet
  python -m convmixer_jax.main --config configs/cifar10.py --mode eval

Any field of a config is a flag: --config.epochs=9 --config.model.depth=4.
Running the same command again goes on where the workdir was left.
"""

import difflib
import json
import os
from pathlib import Path
import re
import signal
import sys
import textwrap

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from convmixer_jax import config as config_lib
from convmixer_jax import logger
from convmixer_jax import train
from convmixer_jax import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with a variant after a colon where it has some:"
  " --config configs/imagenet.py:768_32. Its fields are flags too:"
  " --config.batch_size=256 --config.augment.crop_scale='(0.5, 1.0)'.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where checkpoints, metrics and logs go, and where a run goes on from:"
  " --workdir runs/mine. Default: runs/ and the config's name.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval"],
  "--mode train trains, and evaluates on the way; --mode eval scores the"
  " workdir's newest checkpoint and prints a line and a JSON object.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Run as one of several processes, one on each host, all started with the"
  " same command: --distributed. TPU pods, Slurm and Kubernetes are found"
  " out; elsewhere give the next three flags too.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "With --distributed: address of process 0, --coordinator 10.0.0.1:1234.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "With --distributed: how many there are, --num_processes 4.",
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "With --distributed: which this one is, --process_id 0.",
  lower_bound=0,
)


def main(argv: list[str]) -> None:
  """Runs what the flags say; see --help."""
  if len(argv) > 1:
    raise UserError(f"{argv[1]}: not a flag; see --help")
  config = _CONFIG.value
  if config is None:
    raise UserError("--config: must be given, as in --config configs/digits.py")
  workdir = os.path.expanduser(_WORKDIR.value or _default_workdir())
  where = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and where != (None, None, None):
    raise UserError(
      "--coordinator, --num_processes, --process_id: need --distributed"
    )
  if _DISTRIBUTED.value:
    try:
      jax.distributed.initialize(*where)
    except (ValueError, RuntimeError) as e:
      raise UserError(f"--distributed: {str(e).splitlines()[0]}") from e
  if _MODE.value == "train":
    train.train_and_evaluate(config, workdir)
    return
  metrics = train.evaluate_checkpoint(config, workdir)
  if jax.process_index() == 0:
    print(f"step {metrics['step']}  {logger.eval_line(metrics)}")
    print(json.dumps(metrics))


def _default_workdir() -> str:
  """configs/imagenet.py:768_32 -> runs/imagenet_768_32."""
  path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
  return os.path.join(
    "runs", "_".join(filter(None, [Path(path).stem, variant]))
  )


def _parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing, with one line for each mistake instead of a traceback."""
  if {"--help", "-help", "-h"} & set(argv):
    print(__doc__)
    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]):
      text = textwrap.fill(flag.help, 74)
      print(f"--{flag.name}\n{textwrap.indent(text, '    ')}")
    sys.exit(0)
  overrides = {}
  for arg in argv[1:]:
    if match := re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?$", arg):
      overrides[match[1]] = match[2]
  fields = config_lib.FIELDS
  for field, value in overrides.items():
    if field not in fields:
      near = difflib.get_close_matches(field, fields, 1, cutoff=0)[0]
      given = field if value is None else f"{field}={value}"
      raise UserError(f"--config.{given}: no such field; nearest is {near}")
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      config_lib.flatten(_CONFIG.value)  # Raises if the file did not load.
    return rest
  except Exception as e:  # Whatever a config file may raise.
    for field, value in overrides.items():
      if f"--config.{field}={value}:" in str(e):
        text = f"--config.{field}={value}: must be {fields[field][0]}"
        raise UserError(text) from e
    # The last line says what is wrong; those before it are the traceback that
    # ml_collections puts into its message.
    raise UserError(str(e).strip().splitlines()[-1].strip()) from e


def run() -> None:
  """The command line: one line and exit code 2 for a user's mistake."""
  logging.set_verbosity(logging.WARNING)
  try:
    app.run(main, flags_parser=_parse_flags)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
  run()
