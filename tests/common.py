"""What several test files need."""

import contextlib
import io
import json
import os
from pathlib import Path
import runpy
import subprocess
import sys
from unittest import mock

import jax
import ml_collections
import numpy as np

from convmixer_jax import cli
from convmixer_jax import config as config_lib
from convmixer_jax import interop
from convmixer_jax import models
from convmixer_jax import ops
from convmixer_jax import optim
from convmixer_jax.data import stream
from convmixer_jax.errors import UserError

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


def assert_close(ours, golden, tolerance, name=""):
  """max|a - b| / max|b|, the measure of every golden test."""
  ours, golden = np.asarray(ours), np.asarray(golden)
  assert ours.shape == golden.shape, name
  error = relative_error(ours, golden)
  assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def relative_error(ours, golden):
  ours, golden = np.asarray(ours), np.asarray(golden)
  return np.abs(ours - golden).max() / max(np.abs(golden).max(), 1e-30)


def tree_error(ours, golden):
  """The worst leaf's relative error; both trees have the same names."""
  errors = jax.tree.map(relative_error, ours, golden)
  return max(jax.tree.leaves(errors))


def golden(name):
  return dict(np.load(DATA / f"{name}.npz"))


def variables(golden_file, prefix):
  """The tensors under `prefix`/ as our variables."""
  names = [k for k in golden_file if k.startswith(f"{prefix}/")]
  return interop.from_torch(
    {k.removeprefix(f"{prefix}/"): golden_file[k] for k in names}
  )


def nhwc(images):
  return np.moveaxis(images, -3, -1)


def digits_config(**overrides) -> ml_collections.ConfigDict:
  """configs/digits.py with a model of negligible cost, 46 steps an epoch."""
  config = load_config("configs/digits.py")
  small = {"model.dim": 8, "model.depth": 1, "batch_size": 32, "epochs": 1}
  rarely = {"log_every": 10, "eval_every": 100, "save_every": 100}
  config.update_from_flattened_dict({**small, **rarely, **overrides})
  return config


def flags(path, overrides):
  """main's: a config, and 'model.dim=8 epochs=1' as flags of its fields."""
  return [f"--config={path}", *(f"--config.{x}" for x in overrides.split())]


def augment_config(**overrides):
  """A config's `augment` with everything off but `overrides`."""
  config = load_config("configs/digits.py").augment.to_dict()
  del config["label_smoothing"]
  config |= {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
  assert overrides.keys() <= config.keys()
  return config | overrides


def adamw(
  params,
  schedule=lambda count: 0.1,
  freeze=(),
  backbone_lr_scale=1.0,
  **settings,
):
  """The recipe's optimiser, with neither decay nor clipping by default."""
  config = {
    "weight_decay": 0.0,
    "decay_all": False,
    "eps": 1e-3,
    "betas": (0.9, 0.999),
    "clip_norm": 0.0,
  }
  return optim.make_optimizer(
    schedule,
    params,
    config | settings,
    freeze=freeze,
    backbone_lr_scale=backbone_lr_scale,
  )


def load_config(path) -> ml_collections.ConfigDict:
  return config_lib.load_file(str(ROOT / path)).lock()


def finished_run(folder, cell, seed, top1, evals=3):
  """Writes what a run of a sweep's cell leaves; returns its workdir.

  Its last evaluation has `top1`: neither the best nor the worst, nor the mean.
  """
  workdir = folder / cell.name / f"seed{seed}"
  workdir.mkdir(parents=True)
  config = cell.resolve(seed)
  (workdir / "config.json").write_text(config.to_json())
  start = {
    "started": "2026-01-01T00:00:00+00:00",
    "commit": "0123abc",
    "python": "3.11.7",
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "device": "cpu",
    "num_devices": 1,
    "cpu_count": 2,
    "status": "finished",
    "last_step": 10 * evals,
    "ended": "2026-01-01T00:12:30+00:00",
  }
  (workdir / "run.json").write_text(json.dumps({"starts": [start]}))
  records = []
  for n in range(1, evals + 1):
    both = {"step": 10 * n, "loss": 2.3 - 0.1 * n + 0.02 * seed}
    # The last one is neither the best nor the worst.
    score = top1 + (0, -50, 2)[(evals - n) % 3]
    score = {"top1": score, "top5": 100.0, "count": 360}
    rate = 100 + seed if n > 1 else 10  # Of a cold start.
    records += [
      both | {"kind": "train", "images_per_second": rate},
      both | {"kind": "eval"} | score,
    ]
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (workdir / "metrics.jsonl").write_text(lines)
  return workdir


def run_main(
  *args, devices=1, module="convmixer_jax.main", environment=None, **popen
):
  """Starts `python -m convmixer_jax.main` as a user would."""
  environment = environment or {}
  env = os.environ | environment
  path = str(ROOT), environment.get("PYTHONPATH", "")
  env |= {
    "PYTHONPATH": os.pathsep.join(filter(None, path)),
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
  }
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      module,
      *(x if isinstance(x, bytes) else str(x) for x in args),
    ],
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **{"cwd": ROOT, **popen},
  )


def run_python(code, *args, environment=None):
  """Runs `python -c CODE ARGS` in a new process, which must exit with 0."""
  process = subprocess.run(
    [sys.executable, "-c", code, *args],
    cwd=ROOT,
    env=os.environ | (environment or {}),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return process


def call(module, *args, stdin=""):
  """`python -m MODULE` in this process: (exit code, output, errors).

  Without what `cli.run` does for the whole process, and without the seconds in
  which a new process imports everything.
  """
  path = ROOT / module.replace(".", "/")
  path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  argv = [str(path), *map(str, args)]
  code, out, err = 0, io.StringIO(), io.StringIO()

  def run(main, flag_values, only_prints=False):
    main(*cli.parse_flags(argv, flag_values)[1:])

  with (
    contextlib.chdir(ROOT),
    mock.patch.object(cli, "run", run),
    mock.patch.multiple(sys, argv=argv, stdin=io.StringIO(stdin)),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    try:
      runpy.run_path(str(path), run_name="__main__")
    except UserError as e:
      code = 2
      print(f"error: {e}", file=err)
    except SystemExit as e:
      code = e.code or 0
  return code, out.getvalue(), err.getvalue()


def decode_for_ever(photos, num_workers=1, **settings):
  """Batches of 4 images of 32 x 32 pixels, by processes."""
  return stream.train_batches(
    photos, seed=0, batch_size=4, rows=np.arange(4), start=0, stop=10**6,
    image_size=32, num_workers=num_workers, scale=(0.5, 1.0), ratio=(1.0, 1.0),
    interpolation="bilinear", **settings,
  )  # fmt: skip


def cifar10_absent():
  """Why CIFAR-10 cannot be used; '' if TFDS has prepared it."""
  import tensorflow_datasets as tfds

  builder = tfds.builder("cifar10")
  if not builder.is_prepared():
    return f"NO CIFAR-10 in {builder.data_path}"
  return ""


def add(bias):
  """A convolution that only adds its bias."""
  return ops.Convolution(lambda x, *_, **__: x, bias, bias)


def tiny_model(**overrides):
  fields = {"dim": 8, "depth": 2, "patch_size": 2, "kernel_size": 3}
  return models.ConvMixer(**{**fields, "num_classes": 10, **overrides})
