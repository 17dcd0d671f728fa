"""Writers of a run's records beside metrics.jsonl: TensorBoard, W&B."""

from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import datetime
import importlib
import importlib.util
import io
import json
import os
from pathlib import Path
import platform
import sys
import time
from typing import Any

import numpy as np
from PIL import Image

from convmixer_jax import files
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError


class TensorBoard:
  """Writes the records of metrics.jsonl as TensorBoard events.

  All go into one file, which replaces those of earlier starts and begins with
  their records. Confusion matrices of at most MOST_DRAWN classes become heat
  maps, but only those of this start, because metrics.jsonl has none. Raises
  ImportError if tensorboard is not installed.
  """

  MOST_DRAWN = 100

  def __init__(
    self,
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    workdir: files.AnyPath,
  ):
    """Writes to `folder`, whose files go to `workdir`; it may be the same."""
    from tensorboard.compat.proto import event_pb2  # Without tensorflow.
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.summary.writer import record_writer

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    now, host = int(time.time()), platform.node()
    prefix = "events.out.tfevents."
    path = folder / f"{prefix}{now:010}.{host}.{os.getpid()}"
    earlier = [
      file
      for file in workdir.iterdir()
      if file.name.startswith(prefix) and file.name != path.name
    ]
    self._writer = record_writer.RecordWriter(path.open("wb"))
    self._add(time.time(), file_version="brain.Event:2")
    # Tells a running TensorBoard to forget the earlier files.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(time.time(), step=0, session_log=start)
    # A record of an edited file may hold anything.
    invalid = (ValueError, TypeError, LookupError, OverflowError)
    for record in records:
      with contextlib.suppress(*invalid):
        self.write(record)
    for file in earlier:
      file.unlink(missing_ok=True)

  def write(
    self, record: Mapping[str, Any], confusion: np.ndarray | None = None
  ) -> None:
    """Writes the numbers of a record of metrics.jsonl, and the heat map."""
    scalars = {**record}
    step, kind = scalars.pop("step"), scalars.pop("kind")
    seconds = datetime.datetime.fromisoformat(scalars.pop("time")).timestamp()
    values = [
      self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
      for name, value in scalars.items()
    ]
    if confusion is not None and len(confusion) <= self.MOST_DRAWN:
      values.append(self._image(f"{kind}/confusion", _heat_map(confusion)))
    self._add(seconds, step=step, summary=self._summary(value=values))

  def write_sheet(self, path: files.AnyPath) -> None:
    """Writes a PNG file as images of step 0."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
      value = self._image("train/images", image)
    self._add(time.time(), step=0, summary=self._summary(value=[value]))

  def _image(self, tag, image):
    file = io.BytesIO()
    image.save(file, "png")
    width, height = image.size
    png = self._summary.Image(
      width=width,
      height=height,
      colorspace=3,  # RGB.
      encoded_image_string=file.getvalue(),
    )
    return self._summary.Value(tag=tag, image=png)

  def _add(self, seconds, **fields):
    event = self._event(wall_time=seconds, **fields)
    self._writer.write(event.SerializeToString())
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()


def _heat_map(confusion):
  """Shares of each true class, a row, from white to dark blue."""
  shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
  side = max(1, 400 // len(shares))  # Of a cell, in pixels.
  shares = shares.repeat(side, 0).repeat(side, 1)[..., None]
  pixels = 255 - shares * (255 - np.array([8, 48, 107]))
  return Image.fromarray(pixels.round().astype(np.uint8))


class Wandb:
  """A run of Weights & Biases, which continues over restarts by its id.

  It stops no training: what fails after `start` is one warning.
  """

  def __init__(self, project: str):
    """Raises UserError if the package wandb is not installed."""
    self._project, self._run = project, None
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # A folder of its logs, perhaps.
      raise UserError(
        f"--wandb={project}: needs the package wandb; install it with:"
        f" {sys.executable} -m pip install wandb"
      )

  def start(
    self, name: str, folder: Path, run_id: str, config_json: str
  ) -> None:
    """Begins or continues the run `run_id`; its own files go into `folder`.

    Raises UserError if wandb is not set up: no login, or an invalid project.
    """
    try:
      wandb = importlib.import_module("wandb")  # It need not be installed.
    except Exception as e:  # It may not fit the packages beside it.
      return self._fail(e)
    config = json.loads(config_json)
    try:
      self._run = wandb.init(
        project=self._project,
        id=run_id,
        resume="allow",
        name=name,
        tags=[config[part]["name"] for part in ("model", "data")],
        dir=folder,
        config=config,
        # Seconds for which an end waits for a network that is down.
        settings=wandb.Settings(console="off", finish_timeout=30),
      )
      # Steps that a resumed run repeats are not out of order.
      self._run.define_metric("*", step_metric="step")
    except wandb.errors.UsageError as e:
      raise UserError(
        f"--wandb={self._project}: {first_line(e)} WANDB_MODE=offline needs"
        " none of it"
      ) from e
    except Exception as e:
      self._fail(e)

  def write(self, record: Mapping[str, Any]) -> None:
    """Sends a record of metrics.jsonl, without waiting for the network."""
    if self._run is None:
      return
    step, kind = record["step"], record["kind"]
    left_out = ("step", "kind", "time")
    values = {f"{kind}/{k}": v for k, v in record.items() if k not in left_out}
    try:
      self._run.log(values | {"step": step})
    except Exception as e:
      self._fail(e)

  def finish(self, status: str) -> None:
    """Ends the run; it has failed unless `status` is 'finished'."""
    if self._run is None:
      return
    try:
      self._run.finish(exit_code=int(status != "finished"))
    except Exception as e:
      self._fail(e)

  def _fail(self, error):
    self._run = None
    print(
      f"warning: --wandb={self._project}: {first_line(error)}; training goes on"
      " without it, and all other files are written",
      file=sys.stderr,
    )
