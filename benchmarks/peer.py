"""PyTorch's side of a measurement: `torch_peer.py` in a process of its own."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np

from convmixer_jax import cli
from convmixer_jax.errors import UserError

WAYS = ("contiguous", "channels_last", "contiguous compiled",
        "channels_last compiled")  # fmt: skip


def define_against(flag_values: cli.Flags) -> flags.FlagHolder:
  """Defines --against, the argument of `start`."""
  return flag_values.enum(
    "against",
    "--against torch also times PyTorch on the same arrays, in the same"
    " rounds. --against available does so only if PyTorch is installed and can"
    " use this device.",
    enum_values=["torch", "available"],
  )


def share_gpu(against: str | None) -> None:
  """Call this before jax starts the GPU, if PyTorch is to use it too.

  Otherwise jax would reserve three quarters of it.
  """
  if against:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def start(against: str | None) -> "Peer | None":
  """Starts PyTorch if --against says so.

  Raises:
    UserError: --against=torch, and PyTorch cannot be measured here.
  """
  if against is None:
    return None
  try:
    return Peer()
  except UserError as e:
    if against == "torch":
      raise
    print(f"PyTorch is not measured: {e}", file=sys.stderr)
    return None


def pause(peer: "Peer | None") -> float:
  """Seconds to wait before each timing.

  On a CPU the threads of the other side spin for a while after their work.
  """
  return 0.3 if peer and jax.default_backend() == "cpu" else 0.0


class Peer:
  """Does work in PyTorch on arrays that it is given. A context manager."""

  def __init__(self):
    platform = jax.default_backend()
    device = {"cpu": "cpu", "gpu": "cuda"}.get(platform)
    if device is None:
      raise UserError(f"--against=torch: PyTorch does not run on {platform}")
    if importlib.util.find_spec("torch") is None:
      raise UserError("--against=torch: PyTorch is not installed here")
    self._process = subprocess.Popen(
      # By path: as a module it would import this package, and with it jax.
      [sys.executable, "-P", Path(__file__).with_name("torch_peer.py")],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      self.facts = self._read()
      if (found := self.facts.pop("device")) != device:
        raise UserError(
          f"--against=torch: this PyTorch runs on {found}, jax on {platform}"
        )
      self._folder = tempfile.TemporaryDirectory()
    except BaseException:
      self._process.kill()
      raise

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *exception) -> None:
    self._process.kill()
    self._process.wait()
    self._folder.cleanup()

  def load(
    self, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None
  ) -> None:
    """Says what the next work is; `torch_peer.main` describes the settings.

    Arrays of None are those of the work before.
    """
    folder = Path(self._folder.name)
    (folder / "work.json").write_text(json.dumps(settings), "utf-8")
    if arrays is not None:
      np.savez(folder / "work.npz", **arrays)
    self._ask(load=str(folder), arrays=arrays is not None)

  def make(self, way: str) -> tuple[dict[str, str], Sequence[np.ndarray]]:
    """Compiles one of `WAYS` and does the work once.

    Returns:
      {'precision': ...} and the results, or {'error': why it failed} and ().
    """
    answer = self._ask(make=way)
    if "error" in answer:
      return answer, ()
    results = np.load(Path(self._folder.name) / "results.npz")
    return answer, [*results.values()]

  def seconds(self, way: str, calls: int = 1) -> float:
    """Seconds of one call, the mean over `calls`."""
    return self._ask(time=way, calls=calls)["seconds"]

  def _ask(self, **request):
    with contextlib.suppress(BrokenPipeError):  # There will be no answer.
      print(json.dumps(request), file=self._process.stdin, flush=True)
    return self._read()

  def _read(self):
    if line := self._process.stdout.readline():
      return json.loads(line)
    raise UserError(
      "--against=torch: PyTorch's process failed; see its messages above"
    )
