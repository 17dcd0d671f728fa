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
"""

import json
import os
from pathlib import Path

from absl import flags
import jax

from convmixer_jax import cli
from convmixer_jax import logger
from convmixer_jax import train
from convmixer_jax import UserError

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


def main() -> None:
  """Runs what the flags say; see --help."""
  config = cli.given(_CONFIG)
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
