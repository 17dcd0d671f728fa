"""Runs all rows of the speed table with `benchmarks.throughput`.

  python -m benchmarks.table --out benchmarks/results/throughput.json

Takes an hour on two CPU cores. Prints each row when it is measured, and
writes the file after each row. Rows that the file already has are skipped.
"""

import json
from pathlib import Path
import subprocess
import sys

from convmixer_jax import cli
from convmixer_jax.errors import UserError

_SMALL = ("--model convmixer_256_8 --patch_size 2 --kernel_size 5"
          " --image_size 32 --num_classes 10 --batch 64")  # fmt: skip
_LARGE = "--model convmixer_1536_20"
_MIDDLE = "--model convmixer_768_32"
ROWS = [
  f"{_SMALL} --mode train",
  f"{_SMALL} --mode infer",
  f"{_MIDDLE} --batch 8 --mode infer",
  f"{_LARGE} --batch 4 --mode infer",
  f"{_LARGE} --batch 4 --mode train",
  # These take only a few milliseconds each, hence more repeats.
  *[
    f"{model} --mode {mode} --repeats 21"
    for mode in ("depthwise", "depthwise_grad")
    for model in (_SMALL, f"{_MIDDLE} --batch 16", f"{_LARGE} --batch 8")
  ],
  *[
    f"--model {model} --batch 4 --mode {mode} --repeats 5"
    for model in (
      "mixer_b16_224",
      "gmlp_s16_224",
      "resmlp_24_224",
      "deit_small_patch16_224",
      "resnet50",
    )
    for mode in ("train", "infer")
  ],
  # Their ratios are the closest to 1.
  f"{_SMALL} --mode pointwise --repeats 101",
  f"{_MIDDLE} --batch 8 --mode pointwise --repeats 101",
  f"{_LARGE} --batch 4 --mode pointwise --repeats 101",
]

_FLAGS = cli.Flags()
_OUT = _FLAGS.string("out", "The JSON file to write: --out throughput.json.")


def main() -> None:
  """Runs what the flags say; see --help."""
  out = Path(cli.required(_OUT))
  records = json.loads(out.read_text("utf-8")) if out.exists() else {}
  print("| work | images/s | PyTorch, its faster way | ratio | spread |")
  print("|---|---|---|---|---|", flush=True)
  for row in ROWS:
    if row not in records:
      command = [sys.executable, "-m", "benchmarks.throughput", *row.split()]
      done = subprocess.run(
        [*command, "--against", "torch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
      )
      if done.returncode:
        raise UserError(f"{row}: failed; see its messages above")
      records[row] = json.loads(done.stdout)
      out.write_text(json.dumps(records, indent=2) + "\n", "utf-8")
    print(_markdown(records[row]), flush=True)


def _markdown(record):
  ours, theirs = (
    record["rows"][way]["images_per_second"]
    for way in ("ours", record["faster_way"])
  )
  spread = record["ratio_of_each_repeat"]
  return (
    f"| {record['mode']}, {record['model']}, batch {record['batch']} |"
    f" {ours:.4g} | {theirs:.4g}, {record['faster_way']} |"
    f" {record['ratio']:.2f} |"
    f" {spread['least']:.2f} to {spread['greatest']:.2f} |"
  )


if __name__ == "__main__":
  cli.run(main, _FLAGS)
