"""Trains and evaluates.

  python -m convmixer_jax.main --config configs/digits.py
  python -m convmixer_jax.main --config configs/cifar10.py \\
      --workdir runs/p4 --config.model.patch_size=4 --config.seed=1
  python -m convmixer_jax.main --config configs/imagenet.py:768_32 \\
      --config.data.name=folder --config.data.dir=/data/imagenet
  python -m convmixer_jax.main --config configs/cifar10.py --mode eval
  python -m convmixer_jax.main --config configs/imagenet.py --mode eval \\
      --workdir runs/published --config.init_from=convmixer_1536_20.safetensors

Any field of a config is a flag: --config.epochs=9 --config.model.depth=4.
Running the same command again goes on where the workdir was left.

Exit codes: 0 finished; 1 failed, with a traceback; 2 a mistake in what was
given; 75 (--distributed) another process is gone or never came; 128 + the
signal's number (143 for SIGTERM) stopped, and the state is saved.
"""

import contextlib
import json
import os
from pathlib import Path

from absl import flags
import jax

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import distributed
from convmixer_jax import logger
from convmixer_jax import train
from convmixer_jax.errors import UserError

_FLAGS = flags.FlagValues()
_CONFIG = cli.define_config(_FLAGS)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where checkpoints, metrics and logs go, and where a run goes on from:"
  " --workdir runs/mine. Default: runs/ and the config's name.",
  flag_values=_FLAGS,
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval"],
  "--mode train trains, and evaluates on the way; --mode eval scores the"
  " workdir's newest checkpoint, or where it has none --config.init_from, and"
  " prints a line and a JSON object.",
  flag_values=_FLAGS,
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Run as one of several processes, one on each host, all started with the"
  " same command: --distributed. TPU pods, Slurm and Kubernetes are found"
  " out; elsewhere give the next three flags too.",
  flag_values=_FLAGS,
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "With --distributed: address of process 0, --coordinator 10.0.0.1:1234.",
  flag_values=_FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "With --distributed: how many there are, --num_processes 4.",
  lower_bound=1,
  flag_values=_FLAGS,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "With --distributed: which this one is, --process_id 0.",
  lower_bound=0,
  flag_values=_FLAGS,
)
_ACCEPT_CHANGES = flags.DEFINE_bool(
  "accept_changes",
  False,
  "Go on in a workdir that holds a run of another config; what changed is"
  " recorded in its run.json: --accept_changes.",
  flag_values=_FLAGS,
)
_TIMEOUT = flags.DEFINE_integer(
  "timeout",
  60,
  "With --distributed: seconds after which processes that have not come, or"
  " are silent, are given up, and all end: --timeout 300. Default: 60.",
  lower_bound=1,
  flag_values=_FLAGS,
)


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.required(_CONFIG)
  workdir = os.path.expanduser(_WORKDIR.value or _default_workdir())
  where = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and where != (None, None, None):
    raise UserError(
      "--coordinator, --num_processes, --process_id: need --distributed"
    )
  with contextlib.ExitStack() as stack:
    if _DISTRIBUTED.value:
      settings = {
        "--workdir": os.path.abspath(workdir),
        "--mode": _MODE.value,
        "--accept_changes": _ACCEPT_CHANGES.value,
      }
      settings |= {
        f"config.{name}": value
        for name, value in config_lib.flatten(config).items()
      }
      stack.enter_context(
        distributed.session(*where, timeout=_TIMEOUT.value, settings=settings)
      )
    _run(config, workdir)


def _run(config, workdir):
  if _MODE.value == "train":
    train.train_and_evaluate(
      config, workdir, accept_changes=_ACCEPT_CHANGES.value
    )
    return
  metrics = train.evaluate_checkpoint(config, workdir)
  if jax.process_index() == 0:
    step = metrics["step"]
    source = config.init_from if step is None else f"step {step}"
    print(f"{source}  {logger.eval_line(metrics)}")
    print(json.dumps(metrics))


def _default_workdir() -> str:
  """configs/imagenet.py:768_32 -> runs/imagenet_768_32."""
  path, _, variant = _FLAGS["config"].config_filename.partition(":")
  return os.path.join(
    "runs", "_".join(filter(None, [Path(path).stem, variant]))
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
