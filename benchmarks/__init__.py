"""Benchmarks: what their commands share. Results name commit and machine."""

from collections.abc import Callable
from collections.abc import Mapping
import glob
import json
import os
from pathlib import Path
import platform
import sys
import time
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import tqdm

from convmixer_jax import cli
from convmixer_jax import files
from convmixer_jax import models
from convmixer_jax import runtime
from convmixer_jax.errors import UserError
from convmixer_jax.ops import native


def define_model(
  flag_values: cli.Flags,
) -> Callable[..., tuple[nn.Module, int, int]]:
  """Defines the flags of a model and its images.

  Returns:
    A function that builds the model; its keyword arguments are more attributes
    of the model. It returns the model, the batch size and the image size.
  """
  name = flag_values.string(
    "model",
    f"--model convmixer_768_32. One of {', '.join(models.VARIANTS)}.",
    "convmixer_256_8",
  )
  patch_size = flag_values.positive(
    "patch_size", "--patch_size 2. Default: the model's."
  )
  kernel_size = flag_values.positive(
    "kernel_size", "--kernel_size 5. Default: the model's."
  )
  image_size = flag_values.positive(
    "image_size", "In pixels: --image_size 32.", 224
  )
  num_classes = flag_values.positive("num_classes", "--num_classes 10.", 1000)
  batch = flag_values.positive("batch", "Batch size: --batch 64.", 64)
  dtype = flag_values.enum(
    "dtype",
    "Data type of the computation: --dtype bfloat16.",
    "float32",
    enum_values=["float32", "bfloat16"],
  )

  def make(**attributes):
    model = models.create_model(
      name.value,
      num_classes.value,
      patch_size=patch_size.value,
      kernel_size=kernel_size.value,
      dtype=jnp.dtype(dtype.value),
      **attributes,
    )
    try:
      model.check(image_size.value)
    except UserError as e:
      raise UserError(f"--image_size={image_size.value}: {e}") from e
    return model, batch.value, image_size.value

  return make


def define_repeats(
  flag_values: cli.Flags, default: int = 7
) -> flags.FlagHolder:
  """Defines --repeats."""
  text = f"How often each is timed: --repeats {default}."
  return flag_values.positive("repeats", text, default)


def define_json(flag_values: cli.Flags) -> flags.FlagHolder:
  """Defines --json."""
  text = "Print a JSON object instead of a table: --json."
  return flag_values.boolean("json", text)


def define_out(flag_values: cli.Flags) -> flags.FlagHolder:
  """Defines --out, the file of `save`."""
  return flag_values.string(
    "out",
    "A JSON file that is written as soon as there are results, and is complete"
    " when its field 'complete' is true: --out result.json.",
  )


def define_photos(flag_values: cli.Flags) -> Callable[[], list[Path]]:
  """Defines --photos; returns a function that finds the files."""
  pattern = flag_values.string(
    "photos",
    "JPEG files, as a quoted pattern: --photos '~/photos/*.jpg'. Default: the"
    " two photographs inside scikit-learn, 640 x 427.",
  )

  def find():
    if pattern.value is None:
      import sklearn.datasets

      folder = Path(sklearn.datasets.__file__).parent / "images"
      return sorted(folder.glob("*.jpg"))
    files = sorted(glob.glob(os.path.expanduser(pattern.value)))
    if not files:
      raise UserError(f"--photos={pattern.value}: no file matches")
    return [*map(Path, files)]

  return find


def save(
  record: Mapping[str, Any], path: str | None, complete: bool = True
) -> None:
  """Replaces the file at `path`, if that is not None."""
  if path is None:
    return
  try:
    text = json.dumps({**record, "complete": complete}, indent=2) + "\n"
    files.write_whole(Path(path), text)
  except OSError as e:
    raise UserError(f"--out={path}: {e.strerror}") from e


def saved(path: str | None, field: str) -> dict[str, Any]:
  """What `save` wrote earlier, if it has that field; else {}."""
  try:
    record = json.loads(Path(path or os.devnull).read_text("utf-8"))
  except (FileNotFoundError, json.JSONDecodeError):
    return {}
  except OSError as e:
    raise UserError(f"--out={path}: {e.strerror}") from e
  return record if isinstance(record, dict) and field in record else {}


def implementations_here() -> list[str]:
  """What `ops.depthwise_conv` accepts on this platform, without 'auto'."""
  here = jax.default_backend()
  platforms = {"auto": None, "native": "cpu", "shift": "cpu", "pallas": "tpu",
               "cuda": "gpu"}  # fmt: skip
  return [
    name for name in native.IMPLEMENTATIONS if here == platforms.get(name, here)
  ]


def title(model: nn.Module) -> str:
  """The model's sizes and dtype in one line."""
  return f"{models.describe(model)}, {jnp.dtype(model.dtype).name}"


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
  """Wall time of one call, the mean over `calls`; waits for the last result."""
  start = time.perf_counter()
  for _ in range(calls):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def by_turns(
  runs: Mapping[str, Callable[[], Any]],
  rounds: int,
  *,
  timer: Callable[[Callable[[], Any]], float] = seconds,
  warmup: int = 1,
  pause: float = 0.0,
  label: str = "measuring",
) -> dict[str, np.ndarray]:
  """Times several functions; each round runs every one of them once.

  A slow phase of the machine then affects all of them, so that the ratio of two
  results of one round is still meaningful.

  Args:
    runs: name -> a function that does the work once.
    rounds: number of rounds that count.
    timer: calls one of `runs` and returns its seconds; `operator.call` if they
      return their seconds themselves.
    warmup: number of rounds before these, which do not count.
    pause: seconds to sleep before each timing.
    label: of the progress bar.

  Returns:
    name -> seconds [rounds].
  """
  times = {name: [] for name in runs}
  for _ in tqdm.trange(warmup + rounds, desc=label, disable=None):
    for name, run in runs.items():
      time.sleep(pause)
      times[name].append(timer(run))
  return {name: np.array(values[warmup:]) for name, values in times.items()}


def digits(value: float) -> float:
  """Rounds to four significant digits."""
  return float(f"{value:.4g}")


def summary(values: npt.ArrayLike) -> dict[str, float]:
  """Median, minimum and maximum, to four digits."""
  return {
    "median": digits(np.median(values)),
    "least": digits(np.min(values)),
    "greatest": digits(np.max(values)),
  }


def provenance() -> dict[str, Any]:
  """Where a result comes from: command, commit, device and versions."""
  return {
    "command": " ".join(
      ["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]
    ),
    "commit": runtime.provenance()["commit"],
    "device": jax.devices()[0].device_kind,
    "cpu": _cpu(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def _cpu():
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = [line for line in file if line.startswith("model name")]
    return names[0].partition(":")[2].strip()
  except (OSError, IndexError):
    return platform.processor()
