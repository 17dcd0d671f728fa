"""What tests/test_fuzz_*.py share: abuse of command lines and of every loader.

Whatever is given, there is a valid result or one line that says what is wrong:
never another exception, a hang, a write outside the folder given, another
process, or a pickle that is called. FUZZ=20 tries twenty times as many
examples, other ones each time; without it they are the same in every run.
"""

import contextlib
import faulthandler
import functools
import os
import signal
import sys
import warnings

import hypothesis
from hypothesis import strategies as st

from convmixer_jax.errors import UserError

FUZZ = int(os.environ.get("FUZZ", "0"))
SECONDS = 200  # For one example; the slowest takes two on an idle machine.


def examples(count):
  """Settings for so many examples."""
  return hypothesis.settings(
    max_examples=count * max(FUZZ, 1),
    derandomize=not FUZZ,
    database=None,
    deadline=None,  # `abuse` has one, which also ends what hangs.
    suppress_health_check=list(hypothesis.HealthCheck),
  )


# --- What must not happen.

CHANGES = str.split("""
os.chmod os.chown os.link os.mkdir os.remove os.rename os.rmdir os.symlink
os.truncate shutil.rmtree""")
RUNS = str.split("""os.exec os.fork os.forkpty os.posix_spawn os.spawn os.system
subprocess.Popen socket.connect pickle.find_class""")


class Hang(BaseException):
  """Not an Exception, so that nothing on the way takes it for another."""


class Watch:
  """Hears of every file that is written and of every program that is run."""

  def __init__(self):
    self.roots = None  # Where writing is allowed; None: not watching.
    self.seen = []
    sys.addaudithook(self.hear)  # For ever: Python has no way to remove it.

  def hear(self, event, args):
    if self.roots is None:
      return
    if event == "open":
      path, mode, flags = args
      writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
      if (set(mode or "") & set("wax+") or flags & writes) and (
        isinstance(path, (str, bytes, os.PathLike))
      ):
        self.changed(event, path)
    elif event in CHANGES:
      self.changed(event, args[0])
    # A run asks git for its commit, and Python's `platform` asks uname, once.
    elif event in RUNS and args[0] not in ("git", "uname"):
      self.seen.append((event, args))

  def changed(self, event, path):
    path = os.path.realpath(os.fsdecode(path))
    if not path.startswith((*self.roots, "/dev/null")):
      self.seen.append((event, path))


@functools.cache
def watch():
  return Watch()


@contextlib.contextmanager
def guarded(folder):
  """Fails where something is written outside `folder`, runs or hangs."""

  def hang(signum, frame):
    raise Hang(f"longer than {SECONDS} s")

  previous = signal.signal(signal.SIGALRM, hang)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # If C hangs.
  cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
  watch().roots = (os.path.realpath(folder), cache)
  bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
    sys.dont_write_bytecode = bytecode
    seen, watch().seen, watch().roots = watch().seen, [], None
    assert not seen  # Here, for `function` may have raised too.


def abuse(function, *args, folder, names=()):
  """Returns the result of a call, or None where it is refused in one line."""
  try:
    with guarded(folder), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow's, of doubtful files.
      return function(*args)
  except UserError as e:
    text = str(e)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    for name in names:
      assert name in text
    return None


# --- What is given.


def make(kind, path):
  """Puts something at `path` that is no file."""
  if kind == "folder":
    path.mkdir()
  elif kind == "loop":
    path.symlink_to(path)
  elif kind == "fifo":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  elif kind == "empty":
    path.touch()
  else:
    assert kind == "absent"


@st.composite
def broken(draw, wholes):
  """A file: with bytes changed, cut short, and pieces repeated or put in."""
  data = bytearray(draw(st.sampled_from(wholes)))
  place = st.one_of(
    st.integers(0, min(len(data) - 1, 60)), st.integers(0, len(data) - 1)
  )
  for _ in range(draw(st.integers(0, 4))):
    at, kind = draw(place), draw(st.integers(0, 4))
    if kind == 0:
      data = data[:at]
      break
    if kind == 1:
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 2:
      data[at : at + 4] = draw(
        st.sampled_from([b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4)])
      )
    elif kind == 3:
      data[at:at] = data[: draw(place)]
    else:
      data[at:at] = draw(st.binary(max_size=9))
    if not data:
      break
  return bytes(data)
