"""Several processes, one on each host: they meet, and they end together."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # Its key-value store.

from convmixer_jax.errors import UserError

LOST = 75  # Exit code, sysexits.h's EX_TEMPFAIL: to start all again may help.
_AGAIN = "start all processes again: they go on from the last checkpoint"


@contextlib.contextmanager
def session(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  timeout: int,
  settings: Mapping[str, Any],
) -> Iterator[None]:
  """The body runs when all processes have come, as one of them.

  Whatever ends one of them ends all: those that are left print one line and
  exit with `LOST` once the others have been silent for `timeout`. Process 0
  watches over the rest; if it goes, that takes no time.

  Args:
    coordinator: HOST:PORT of process 0; None: what TPU, Slurm or Kubernetes
      tell, and likewise for the next two.
    num_processes: how many there are.
    process_id: which this one is.
    timeout: in seconds, to wait for those that have not come or are silent.
    settings: must be the same in all processes; dotted name -> value.

  Raises:
    UserError: they cannot meet as they were told to.
  """
  port = 0
  if coordinator is not None:
    match = re.fullmatch(r".+:(\d{1,5})", coordinator)
    port = int(match[1]) if match else 2**16
    if port >= 2**16:
      raise UserError(f"--coordinator={coordinator}: must be HOST:PORT")
  if None not in (num_processes, process_id) and process_id >= num_processes:
    raise UserError(
      f"--process_id={process_id}: must be below"
      f" --num_processes={num_processes}"
    )
  if port and process_id == 0:
    try:  # jax would crash.
      socket.create_server(("", port)).close()
    except OSError as e:
      raise UserError(f"--coordinator={coordinator}: {e}") from e
  os.environ.setdefault("grpc_proxy", "")  # Proxies are for the world outside,
  jax.config.update("jax_check_proxy_envs", False)  # so need no warning.
  with _Watch(timeout) as watch:
    try:
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
      )
    except (ValueError, RuntimeError) as e:
      text = str(e).splitlines()[0]
      if "be defined" in text:
        text = (
          "no cluster that jax knows was found here; give --coordinator,"
          " --num_processes and --process_id"
        )
      raise UserError(f"--distributed: {text}") from e
    watch.met = True
    try:
      _compare(settings, timeout)
      yield
      jax.distributed.shutdown()
    except SystemExit:  # A signal; all processes stop at the same step.
      jax.distributed.shutdown()
      raise
    except BaseException as e:
      # The usual way out would wait for the others, who wait for this one.
      watch.leave(e)


class _Watch:
  """Turns the ways in which jax's coordination service ends us into one line.

  When another process is gone, or none comes, the service logs a fatal error
  with a stack trace and aborts, and no callback can prevent it. So what C++
  code prints goes through a pipe to a thread, which passes it on, but for what
  the service says: at its last words the thread speaks and exits instead.
  """

  met = False  # Whether all processes have come.

  def __init__(self, timeout: int):
    self._timeout = timeout
    self._speaks = threading.Lock()

  def __enter__(self):
    self._stderr = os.dup(2)
    read, write = os.pipe()
    sys.stderr.flush()
    os.dup2(write, 2)
    os.close(write)
    self._python_stderr = sys.stderr
    sys.stderr = open(os.dup(self._stderr), "w", buffering=1)
    faulthandler.enable(sys.stderr)
    # abort() waits in sleep(SIGABRT), six seconds, for the thread. No Python
    # here: a heap that is broken could not run it.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    self._thread = threading.Thread(
      target=self._listen, args=(read,), daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *exception):
    os.dup2(self._stderr, 2)
    self._thread.join(1)  # Longer only where a child has the pipe.
    sys.stderr.flush()
    sys.stderr = self._python_stderr
    faulthandler.enable(sys.stderr)

  def _listen(self, pipe):
    log_line = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] ")
    service = rb"coordination_service\w*|preemption_\w+|client|service"
    dropping, last_words = False, None
    with open(pipe, "rb") as lines:
      for line in lines:
        if last_words is not None:
          if line.startswith(b"***"):
            self._say(*self._reason(last_words.decode(errors="replace")))
          last_words += line
        elif b"the JAX distributed service detected fatal errors" in line:
          last_words = line.rpartition(b"absl::Status: ")[2]
        else:
          if match := log_line.match(line):
            dropping = re.fullmatch(service, match[1]) is not None
          if not dropping:
            os.write(self._stderr, line)

  def _reason(self, status: str) -> tuple[str, int]:
    """What the service's last words mean, and the exit code."""
    state = jax_distributed.global_state
    address, count = state.coordinator_address, state.num_processes
    text = " ".join(status.split())
    if not self.met:
      code, where = (
        LOST,
        f"--distributed: process {state.process_id} of {count}",
      )
      if "Unexpected task" in text or "ALREADY_EXISTS" in text:
        code, why = (
          2,
          (
            f"the coordinator at {address} does not expect it: --process_id is"
            " taken, or --num_processes differs there"
          ),
        )
      elif state.process_id and (reason := _unreachable(address)):
        why = (
          f"no coordinator, which is process 0, at {address} after"
          f" {self._timeout} s: {reason}"
        )
      elif "DEADLINE_EXCEEDED" in text:
        why = (
          f"not all {count} have come to {address} after {self._timeout} s; is"
          " each started, with a --process_id of its own?"
        )
      else:
        why = f"{address} does not answer as a coordinator does: {text}"
      return f"{where}: {why}", code
    if match := re.search(r"stopped sending heartbeats\):([\d, ]+)", text):
      gone = ", ".join(match[1].replace(",", " ").split())
      why = f"process {gone} of {count} is gone, silent for {self._timeout} s"
    elif "RPC" in text:  # To the coordinator, which does not answer.
      why = f"process 0 of {count}, the coordinator at {address}, is gone"
    else:
      why = f"--distributed: {text}"
    return f"{why}; {_AGAIN}", LOST

  def leave(self, e: BaseException):
    """Exits at once, with what a process alone would have said."""
    chain, cause = [], e
    while cause is not None and cause not in chain:
      chain.append(cause)
      cause = cause.__cause__ or cause.__context__
    lost = re.compile(r"gloo|nccl|coordination|barrier|heartbeat", re.I)
    for cause in reversed(chain):
      if not isinstance(cause, UserError) and lost.search(str(cause)):
        # The connection to another process is gone. The service knows whose,
        # as soon as it has been silent for long enough.
        time.sleep(self._timeout + 10)
        text = str(cause).splitlines()[0]
        self._say(f"lost another process: {text}; {_AGAIN}", LOST)
    if isinstance(e, UserError):
      self._say(str(e), 2)
    if isinstance(e, KeyboardInterrupt):
      self._say("interrupted", 128 + signal.SIGINT)
    traceback.print_exception(e)
    self._say(f"process {jax.process_index()} failed", 1)

  def _say(self, text: str, code: int):
    self._speaks.acquire()  # And never released.
    with contextlib.suppress(OSError, ValueError):  # A pipe that is closed.
      os.write(self._stderr, f"error: {text}\n".encode())
      sys.stdout.flush()
    if jax_distributed.global_state.process_id == 0:
      time.sleep(2)  # The others hear of it from us.
    os._exit(code)


def _unreachable(address: str) -> str | None:
  """Why nobody answers there."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError as e:
    return e.strerror or str(e)
  return None


def _compare(settings: Mapping[str, Any], timeout: int) -> None:
  """Refuses settings that are not those of process 0, in all processes."""
  state = jax_distributed.global_state
  client = state.client
  assert client is not None
  settings = {"--num_processes": state.num_processes, **settings}
  text = json.dumps(settings, default=str)
  digest = hashlib.sha256(text.encode()).hexdigest()
  me = str(state.process_id)
  client.key_value_set(f"convmixer_jax/settings/{me}", text)
  client.key_value_set(f"convmixer_jax/digests/{me}", digest)
  client.wait_at_barrier("convmixer_jax_settings", 1000 * timeout)
  for key, other in sorted(client.key_value_dir_get("convmixer_jax/digests/")):
    if other != digest:
      them = key.rpartition("/")[2]
      theirs = json.loads(
        client.blocking_key_value_get(
          f"convmixer_jax/settings/{them}", 1000 * timeout
        )
      )
      ours = json.loads(text)
      different = [
        f"{name} is {theirs.get(name)} in process {them} and"
        f" {ours.get(name)} in process {me}"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
      ]
      raise UserError(f"--distributed: {'; '.join(different)}")
