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
from typing import Any

from absl import flags

from convmixer_jax import cli
from convmixer_jax.data import sources
from tests import common


@dataclasses.dataclass
class Dying:
  """Reads, until the file `flag` is there."""

  read: Any
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
  for _ in common.decode_for_ever(source, num_workers=2):
    print("a batch")
    Path(flag).touch()


# Not under `if __name__ == "__main__"`: workers do not import this module.
cli.run(main, flags.FlagValues())
