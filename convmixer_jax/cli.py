"""What the command lines share: flags, --help, one-line errors, a cache."""

from collections.abc import Callable
import contextlib
import ctypes
import difflib
import hashlib
import inspect
import os
import re
import signal
import sys
import textwrap
import threading
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

from convmixer_jax import config as config_lib
from convmixer_jax.errors import UserError
from convmixer_jax.ops import build

_LINGER = 10.0  # Seconds that a process may take to end.
_CACHE_BYTES = 2**30  # What was used longest ago goes first.


def define_config(flag_values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --config and a flag for each of its fields."""
  try:
    return config_flags.DEFINE_config_file(
      "config",
      None,
      "Config file, with a variant after a colon where it has some:"
      " --config configs/imagenet.py:768_32. Its fields are flags too:"
      " --config.batch_size=256 --config.augment.crop_scale='(0.5, 1.0)'.",
      flag_values=flag_values,
    )
  except flags.Error as e:  # It reads the files of absl's --flagfile here.
    print(f"error: {UserError(str(e))}", file=sys.stderr)
    sys.exit(2)


def define_weights(
  flag_values: flags.FlagValues,
) -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Defines --weights and --model; see `weights.load_model`."""
  weights = flags.DEFINE_string(
    "weights",
    None,
    "A PyTorch checkpoint, a safetensors file, hf-hub:OWNER/NAME, or a workdir:"
    " --weights runs/cifar10.",
    flag_values=flag_values,
  )
  model = flags.DEFINE_string(
    "model",
    None,
    "The variant that the weights of a file are of: --model convmixer_768_32."
    " Default: what the weights themselves tell.",
    flag_values=flag_values,
  )
  return weights, model


def given(flag: flags.FlagHolder) -> Any:
  """The flag's value, which must have been given."""
  if flag.value is None:
    raise UserError(f"--{flag.name}: must be given; see --help")
  return flag.value


def parse_flags(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
  """absl's parsing, with one line for each mistake instead of a traceback."""
  module = sys.modules["__main__"]
  if {"--help", "-help", "-h"} & set(argv):
    print(module.__doc__)
    show = lambda name, text: print(
      f"--{name}\n{textwrap.indent(textwrap.fill(text, 74), '    ')}"
    )
    for name in flag_values:
      show(name, flag_values[name].help)
    if "config" in flag_values:
      print("\nFields of a config, with their defaults:\n")
      for name, (default, rule, meaning) in config_lib.FIELDS.items():
        show(f"config.{name}={default!r}", f"{meaning} Accepts {rule.text}.")
    sys.exit(0)
  overrides, path = {}, None
  for arg, following in zip(argv[1:], [*argv[2:], ""]):
    if match := re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?$", arg, re.S):
      overrides[match[1]] = match[2]
    elif match := re.match(r"--?config(?:=(.*))?$", arg, re.S):
      path = following if match[1] is None else match[1]
  fields = config_lib.FIELDS
  for field, value in overrides.items():
    if field not in fields:
      near = difflib.get_close_matches(field, fields, 1, cutoff=0)[0]
      text = field if value is None else f"{field}={value}"
      raise UserError(f"--config.{text}: no such field; nearest is {near}")
  file = (path or "").partition(":")[0]
  if os.path.exists(file) and not os.path.isfile(file):  # A FIFO would wait.
    raise UserError(f"--config={path}: not a file")
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # What warns of a config fails below.
  try:
    rest = flag_values(argv)
    flags.FLAGS(argv[:1])  # absl's own, which grain reads, are not for users.
    if "config" in flag_values and path is not None:
      config = flag_values.config
      getattr(config, "get", None)  # Raises if the file did not load.
      if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise TypeError(f"get_config() gives a {kind}, not a ConfigDict")
      config_lib.flatten(config)
    return rest
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # A config file is a program: it may even exit.
    try:
      message = str(e).strip()
    except Exception:
      message = ""
    for field, value in overrides.items():
      if f"--config.{field}={value}:" in message:
        rule = fields[field].rule
        text = f"--config.{field}={value}: must be {rule.text}"
        raise UserError(text) from e
    # The last line says what is wrong; those before it are the traceback that
    # ml_collections puts into its message.
    text = (message.splitlines() or [""])[-1].strip()
    if not isinstance(e, flags.Error):
      text = f"--config={path}: {type(e).__name__}: {text}"
    elif (start := f"flag --config={path}: ") in message:
      text = f"--config={path}: {text.removeprefix(start)}"
    raise UserError(text) from e
  finally:
    logging.set_verbosity(verbosity)


def keep_pages() -> None:
  """Makes glibc's malloc keep the memory that is freed, until the end.

  XLA allocates its buffers on a CPU anew at every call, and malloc would give
  those that are large back to the system, which then has to zero and map every
  page again. Other systems are left as they are, and so is a malloc that the
  environment tunes already, by MALLOC_... variables (see `man mallopt`).
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  tuned = any(name.startswith("MALLOC_") for name in os.environ)
  if mallopt is not None and not tuned:
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    mallopt(m_mmap_max, 0)  # All from one heap,
    mallopt(m_arena_max, 1)
    mallopt(m_top_pad, 64 << 20)  # which grows in large steps
    mallopt(m_trim_threshold, -1)  # and never shrinks.


def keep_compiled() -> None:
  """Keeps compiled programs for the next start, in the user's cache folder.

  Unless JAX_COMPILATION_CACHE_DIR says where, or the folder cannot be written.
  What XLA compiles for a CPU depends on its features and on how many cores it
  may use, neither of which is in jax's keys: so each has a folder of its own.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if (cache := build.cache_folder()) is None:
    return
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # Not Linux.
    cores = os.cpu_count()
  kind = hashlib.sha256(build.cpu().encode()).hexdigest()[:8]
  folder = cache / "xla" / f"{kind}-{cores}"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def run(main: Callable[..., None], flag_values: flags.FlagValues) -> None:
  """Calls `main`: one line and exit code 2 for a user's mistake.

  Every command line has flags of its own, so that several of them can be
  imported together.

  Args:
    main: takes what on the command line is no flag, as separate arguments; one
      that takes none has it refused.
    flag_values: its flags.
  """
  logging.set_verbosity(logging.WARNING)
  # Reading a damaged checkpoint ends at the first array that is damaged. The
  # reads of the others then find the event loop of orbax closed.
  report = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: (
    None
    if "Event loop is closed" in str(unraisable.exc_value)
    else report(unraisable)
  )
  # Names of files and classes need not be text of the terminal's.
  sys.stdout.reconfigure(errors="backslashreplace")
  keep_pages()
  keep_compiled()
  takes_words = bool(inspect.signature(main).parameters)

  def call(argv):
    if argv[1:] and not takes_words:
      raise UserError(f"{argv[1]}: not a flag; see --help")
    main(*argv[1:])

  code = 1  # Of what is not caught here.
  try:
    app.run(call, flags_parser=lambda argv: parse_flags(argv, flag_values))
  except UserError as e:
    print(f"error: {e}", file=sys.stderr, flush=True)
    code = 2
  except KeyboardInterrupt:
    code = 128 + signal.SIGINT
  except SystemExit as e:
    code = e.code or 0
  finally:
    # Python waits for threads and locks, of which one may be stuck in a dead
    # file system, or held by a dead process.
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    timer = threading.Timer(_LINGER, os._exit, [code])
    timer.daemon = True
    timer.start()
  sys.exit(code)
