"""Plans a training run for hardware that you do not have.

  python -m convmixer_jax.plan --config configs/digits.py --topology cpu:8
  python -m convmixer_jax.plan --config configs/imagenet.py:1536_20 \\
      --config.batch_size=512 --topology v5e:2x4
  python -m convmixer_jax.plan --config configs/imagenet.py:768_32 \\
      --config.model.bn_group_size=0 --topology v5e:16x16 --find_batch --json
  python -m convmixer_jax.plan --config configs/imagenet.py:1536_20 \\
      --config.batch_size=512 --topology h100:8

Compiles the run's train step for the topology, with that platform's compiler,
and reports what the program needs: memory, FLOPs, memory traffic, and what the
devices exchange and why. Nothing is computed or allocated. TPU topologies need
libtpu: pip install "jax[tpu]". GPU topologies need JAX's plug-in for CUDA of
the same version as jax, and no GPU: pip install --no-deps jax-cuda12-pjrt==...
Times are lower bounds, not measurements: the step cannot be faster than its
arithmetic at the peak rate, its memory traffic at full bandwidth, or its
communication over all links.

The exit code is 0 if the run fits, and 1 if it does not.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shlex
import signal
import sys

import jax

from convmixer_jax import cli
from convmixer_jax import plan
from convmixer_jax import runtime
from convmixer_jax.data import sources
from convmixer_jax.errors import UserError
from convmixer_jax.plan import report
from convmixer_jax.plan import search
from convmixer_jax.plan import topology

_FLAGS = cli.Flags()
_CONFIG = _FLAGS.define_config()
_TOPOLOGY = _FLAGS.string(
  "topology",
  "Devices to plan for: --topology v5e:4x4, v4:2x2x4, v5p:2x2x2, v6e:2x4 (chips"
  " along each axis), h100:8, a100:8, h200:8, l4:4 (GPUs), or cpu:8. Default:"
  " the devices of this machine.",
)
_FIND_BATCH = _FLAGS.boolean(
  "find_batch",
  "Search for the largest batch size that fits, to the unit or within 2 %,"
  " starting from the config's: --find_batch. Compiles the step for each size"
  " that it tries and reports it on stderr.",
)
_NUM_IMAGES = _FLAGS.positive(
  "num_images",
  "Number of training images, if the data set is not available locally:"
  " --num_images 1281167.",
)
_NUM_CLASSES = _FLAGS.integer(
  "num_classes",
  "Number of classes, in the same case: --num_classes 1000.",
  lower_bound=2,
)
_JSON = _FLAGS.boolean("json", "Print a JSON object instead: --json.")


def main() -> None:
  """Prints the plan that the flags ask for; see --help."""
  config = cli.required(_CONFIG)
  # Python would notice Ctrl-C only when the compiler is done.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  devices = topology.open_topology(_TOPOLOGY.value)
  # A cached program may name operations of another version of the source.
  jax.config.update("jax_enable_compilation_cache", False)
  data = config.data
  split = sources.describe(
    data.name, data.dir, data.train_split, data.image_size
  )
  for field, flag in (("size", _NUM_IMAGES), ("num_classes", _NUM_CLASSES)):
    value = flag.value or getattr(split, field)
    if value is None:
      raise UserError(
        f"data.name={data.name}: not available locally; pass --{flag.name}"
      )
    split = dataclasses.replace(split, **{field: value})
  if _FIND_BATCH.value:
    log = lambda line: print(line, file=sys.stderr, flush=True)
    result = search.find_batch(config, devices, split, log)
  else:
    result = plan.plan(config, devices, split)
  command = shlex.join(["python", "-m", "convmixer_jax.plan", *sys.argv[1:]])
  result |= {"topology": _TOPOLOGY.value, "command": command}
  result |= runtime.provenance()
  if devices[0].platform == "tpu":
    version = devices[0].client.platform_version
    result["versions"]["libtpu"] = version.splitlines()[-1]
  for package in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      if devices[0].platform == "gpu":
        result["versions"][package] = importlib.metadata.version(package)
  print(json.dumps(result, indent=2) if _JSON.value else report.report(result))
  if not result["fits"]:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, _FLAGS, only_prints=True)
