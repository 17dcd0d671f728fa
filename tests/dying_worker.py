"""A program whose data worker is killed while it holds a lock of grain's.

  python -m tests.dying_worker FOLDER FLAG

FOLDER is of photographs; the file FLAG is made when the first batch came.
"""

import dataclasses
import gc
from multiprocessing import synchronize
import os
from pathlib import Path
import signal

from absl import flags
import numpy as np

from convmixer_jax import cli
from convmixer_jax.data import sources
from convmixer_jax.data import stream


@dataclasses.dataclass
class Dying:
  read: sources.Encoded
  flag: str

  def name(self, index):
    return self.read.name(index)

  def __call__(self, index):
    if os.path.exists(self.flag):
      for thing in gc.get_objects():
        if isinstance(thing, synchronize.Event):
          thing._cond.acquire()
      os.kill(os.getpid(), signal.SIGKILL)
    return self.read(index)


def main(folder, flag):
  source = sources.open_source("folder", folder, "train", 32)
  source = dataclasses.replace(source, read=Dying(source.read, flag))
  for _ in stream.train_batches(
    source,
    seed=0,
    batch_size=4,
    rows=np.arange(4),
    start=0,
    stop=10**6,
    image_size=32,
    num_workers=2,
    scale=(0.5, 1.0),
    ratio=(1.0, 1.0),
    interpolation="bilinear",
  ):
    print("a batch")
    Path(flag).touch()


if __name__ == "__main__":
  cli.run(main, flags.FlagValues())
