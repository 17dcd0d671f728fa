"""Runs of several processes, one per host, that start and end together."""

from collections.abc import Callable
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

from convmixer_jax import errors
from convmixer_jax import runtime
from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError

LOST = 75  # Exit code, sysexits.h's EX_TEMPFAIL: a restart may help.
_RESTART = "restart all processes to resume from the last checkpoint"


@contextlib.contextmanager
def session(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  timeout: int,
  settings: Mapping[str, Any],
  operations: Callable[[], str],
) -> Iterator[None]:
  """Connects to the other processes, then runs the body.

  If one process ends early, the others print one line and exit with `LOST`.
  They notice at once if the coordinator, process 0, is gone. Any other process
  counts as lost when the coordinator has not heard from it for `timeout`
  seconds. The processes also wait that long for each other to connect.

  `coordinator` is the HOST:PORT of process 0. On TPU, Slurm and Kubernetes the
  first three arguments may be None. `settings` are values, by dotted name, that
  must be equal in all processes, and so must the result of `operations`, which
  is called once they are connected: programs with different operations exchange
  different arrays. Raises UserError if they are not, or the processes cannot
  connect.
  """
  port = 0
  if coordinator is not None:
    match = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if match is None or (port := int(match[1])) >= 2**16:
      raise UserError(f"--coordinator={coordinator}: must be HOST:PORT")
  if None not in (num_processes, process_id) and process_id >= num_processes:
    raise UserError(
      f"--process_id={process_id}: must be below"
      f" --num_processes={num_processes}"
    )
  if port and process_id == 0:
    try:  # jax would abort if the port is in use.
      socket.create_server(("", port)).close()
    except OSError as e:
      raise UserError(f"--coordinator={coordinator}: {e}") from e
  # The processes connect directly and ignore the environment's proxies, so that
  # jax need not warn of them.
  os.environ.setdefault("grpc_proxy", "")
  jax.config.update("jax_check_proxy_envs", False)
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
      text = first_line(e)
      if "be defined" in text:
        text = (
          "no cluster detected; pass --coordinator, --num_processes and"
          " --process_id"
        )
      raise UserError(f"--distributed: {text}") from e
    watch.connected = True
    try:
      _check_equal(settings, operations(), timeout)
      yield
      jax.distributed.shutdown()
    except SystemExit:  # After a signal, all processes stop at the same step.
      jax.distributed.shutdown()
      raise
    except BaseException as e:
      # A normal exit would wait for the others, which wait for this process.
      watch.exit_after(e)


class _Watch:
  """Replaces the crashes of jax's coordination service by one-line errors.

  If another process is lost or never connects, the service logs a fatal error
  with a stack trace and calls abort(). No callback can prevent that. Therefore
  stderr becomes a pipe. A thread reads it, drops the service's log lines and
  passes on all others. When it reads the fatal error, it prints one line and
  exits while abort() is delayed. Python's own sys.stderr bypasses the pipe.
  So does sys.stdout, if it has a file descriptor of its own: then stdout goes
  through the pipe too, without Gloo's lines about connections.
  """

  connected = False  # Whether all processes have connected.

  def __init__(self, timeout: int):
    self._timeout = timeout
    self._exiting = threading.Lock()

  def __enter__(self):
    self._stdout, self._stderr = os.dup(1), os.dup(2)  # The original ones.
    read, write = os.pipe()
    sys.stderr.flush()
    os.dup2(write, 2)
    if sys.stdout.fileno() != 1:
      os.dup2(write, 1)
    os.close(write)
    self._python_stderr = sys.stderr
    sys.stderr = runtime.open_output(os.dup(self._stderr), sys.stderr)
    faulthandler.enable(sys.stderr)
    # abort() raises SIGABRT, whose number is 6, and calls its handler: sleep(6)
    # gives the thread the time to exit. The handler is not in Python, which
    # could not run if the heap is corrupt.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    self._thread = threading.Thread(
      target=self._filter, args=(read,), daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *exception):
    os.dup2(self._stdout, 1)
    os.dup2(self._stderr, 2)
    self._thread.join(1)  # A child process may hold the pipe open.
    sys.stderr.flush()
    sys.stderr = self._python_stderr
    faulthandler.enable(sys.stderr)

  def _filter(self, pipe):
    """Passes stderr on, without the service's lines; exits at its last ones."""
    log_line = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] ")
    service = rb"coordination_service\w*|preemption_\w+|client|service"
    gloo = re.compile(rb"\[Gloo\] Rank \d+ is connected to ")
    dropping, fatal = False, None
    with open(pipe, "rb") as lines:
      for line in lines:
        if fatal is not None:  # Its status may have several lines.
          if line.startswith(b"***"):  # The stack trace.
            self._exit(*self._explain(fatal.decode(errors="replace")))
          fatal += line
        elif b"the JAX distributed service detected fatal errors" in line:
          fatal = line.rpartition(b"absl::Status: ")[2]
        else:
          # Lines without a header continue the log line before them.
          if match := log_line.match(line):
            dropping = re.fullmatch(service, match[1]) is not None
          if not dropping and not gloo.match(line):
            with contextlib.suppress(OSError):  # The reader may be gone.
              os.write(self._stderr, line)

  def _explain(self, status: str) -> tuple[str, int]:
    """A line for the status of the fatal error, and the exit code."""
    state = jax_distributed.global_state
    address, count = state.coordinator_address, state.num_processes
    text = " ".join(status.split())
    if not self.connected:
      code = LOST
      if "Unexpected task" in text or "ALREADY_EXISTS" in text:
        code = 2
        why = (
          f"rejected by the coordinator at {address}: --process_id is in use,"
          " or --num_processes differs there"
        )
      elif state.process_id and (reason := _unreachable(address)):
        why = (
          f"cannot reach the coordinator, process 0, at {address} after"
          f" {self._timeout} s: {reason}"
        )
      elif "DEADLINE_EXCEEDED" in text:
        why = (
          f"not all {count} processes connected to {address} after"
          f" {self._timeout} s; start each one, with its own --process_id"
        )
      else:
        why = f"unexpected answer from the coordinator at {address}: {text}"
      process = f"process {state.process_id} of {count}"
      return f"--distributed: {process}: {why}", code
    if match := re.search(r"stopped sending heartbeats\):([\d, ]+)", text):
      lost = ", ".join(match[1].replace(",", " ").split())
      # The last heartbeat may be half of the timeout older than the loss.
      why = (
        f"lost process {lost} of {count}: its heartbeats stopped"
        f" (--timeout={self._timeout})"
      )
    elif "RPC" in text:  # A call to the coordinator failed.
      why = f"lost process 0 of {count}, the coordinator at {address}"
    else:
      why = f"--distributed: {text}"
    return f"{why}; {_RESTART}", LOST

  def exit_after(self, e: BaseException):
    """Exits at once with the output that a single process would have given."""
    chain, cause = [], e
    while cause is not None and cause not in chain:
      chain.append(cause)
      cause = cause.__cause__ or cause.__context__
    lost = re.compile(r"gloo|nccl|coordination|barrier|heartbeat", re.I)
    for cause in reversed(chain):
      if not isinstance(cause, UserError) and lost.search(str(cause)):
        # The connection to another process broke. After the timeout the service
        # knows to which one, and `_filter` exits. This is for when it does not.
        time.sleep(self._timeout + 10)
        text = first_line(cause)
        self._exit(f"lost another process: {text}; {_RESTART}", LOST)
    if isinstance(known := errors.of_jax(e) or e, UserError):
      self._exit(str(known), 2)
    if isinstance(e, KeyboardInterrupt):
      self._exit("interrupted", 128 + signal.SIGINT)
    traceback.print_exception(e)
    self._exit(f"process {jax.process_index()} failed", 1)

  def _exit(self, text: str, code: int):
    self._exiting.acquire()  # Never released: only the first line is printed.
    with contextlib.suppress(OSError, ValueError):  # The reader may be gone.
      os.write(self._stderr, f"error: {text}\n".encode(errors="replace"))
      sys.stdout.flush()
    if jax_distributed.global_state.process_id == 0:
      time.sleep(2)  # The coordinator first tells the others why.
    os._exit(code)


def _unreachable(address: str) -> str | None:
  """Why no connection to HOST:PORT is possible; None if one is."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError as e:
    return e.strerror or str(e)
  return None


def _check_equal(settings, operations, timeout):
  """Raises UserError in every process unless all have the same arguments."""
  state = jax_distributed.global_state
  client = state.client
  assert client is not None
  settings = {"--num_processes": state.num_processes, **settings}
  text = json.dumps([operations, settings], default=str)
  _, ours = json.loads(text)  # As the other processes read it.
  # Equal settings have the same key, so that a large cluster reads little.
  key = f"convmixer_jax/settings/{hashlib.sha256(text.encode()).hexdigest()}"
  entry = json.dumps([state.process_id, operations, ours])
  client.key_value_set(key, entry, allow_overwrite=True)
  # Another process may still compile its operations; if it ends, the service
  # notices.
  client.wait_at_barrier("convmixer_jax_settings", 1000 * (timeout + 600))
  for _, other in client.key_value_dir_get("convmixer_jax/settings/"):
    them, their_operations, theirs = json.loads(other)
    if their_operations != operations:
      raise UserError(
        "--distributed: the processes would compute with different operations:"
        f" {their_operations} in process {them} and {operations} in process"
        f" {state.process_id}; native needs a C++ compiler on every host"
      )
    different = [
      f"{name} is {theirs.get(name)} in process {them} and"
      f" {ours.get(name)} in process {state.process_id}"
      for name in theirs | ours
      if theirs.get(name) != ours.get(name)
    ]
    if different:
      raise UserError(f"--distributed: {'; '.join(different)}")
