"""What the commands share: flags, --help and one-line errors."""

from collections.abc import Callable
import contextlib
import errno
import functools
import inspect
import math
import os
import re
import signal
import sys
import textwrap
import threading
from typing import Any
import warnings

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from convmixer_jax import config as config_lib
from convmixer_jax import errors
from convmixer_jax import files
from convmixer_jax import runtime
from convmixer_jax import workdir as workdir_lib
from convmixer_jax.errors import UserError


class _ConfigParser(flags.ArgumentParser):
  """Loads a config file, or the config.json of a run."""

  def parse(self, path):
    own = path.endswith(".json")
    load = workdir_lib.load_config if own else config_lib.load_file
    return load(path).lock()


class _OrNone(flags.ArgumentParser):
  """Reads what another parser reads, and None, which some fields accept."""

  def __init__(self, parser):
    self._parser = parser

  def parse(self, argument):
    return None if argument == "None" else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


for _type, _parser in {
  int: flags.IntegerParser(),
  float: flags.FloatParser(),
  bool: flags.BooleanParser(),
  str: flags.ArgumentParser(),
  tuple: tuple_parser.TupleParser(),
}.items():
  config_flags.register_flag_parser_for_type(_type, _OrNone(_parser))


class _FiniteParser(flags.FloatParser):
  """absl compares with its bounds, which nan and inf may pass."""

  def is_outside_bounds(self, val):
    return not math.isfinite(val) or super().is_outside_bounds(val)


class Flags(flags.FlagValues):
  """The flags of one command.

  Each command has its own, so that several can be imported together. A method
  takes the flag's name, its help, its default (otherwise None or False), and
  absl's further options: `integer("step", "...", 0, lower_bound=0)`.
  """

  def _add(self, define, name, text, default=None, **options):
    return define(name, default, help=text, flag_values=self, **options)

  string = functools.partialmethod(_add, flags.DEFINE_string)
  words = functools.partialmethod(_add, flags.DEFINE_list)
  integer = functools.partialmethod(_add, flags.DEFINE_integer)
  positive = functools.partialmethod(_add, flags.DEFINE_integer, lower_bound=1)
  boolean = functools.partialmethod(_add, flags.DEFINE_boolean, default=False)
  enum = functools.partialmethod(_add, flags.DEFINE_enum)

  def number(self, name, text, default=None, **bounds):
    """A finite number."""
    parser = _FiniteParser(**bounds)
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, default, text, self, serializer)

  def define_config(self) -> flags.FlagHolder:
    """Defines --config and a flag for each of its fields."""
    text = (
      "Config file, and optionally a colon and the name of a variant, or the"
      " config.json of a run: --config configs/imagenet.py:768_32. Its fields"
      " are flags too: --config.batch_size=256"
      " --config.augment.crop_scale='(0.5, 1.0)'."
    )
    try:
      holder = config_flags.DEFINE_config_file("config", None, text, self)
      self["config"].parser = _ConfigParser()
      return holder
    except flags.Error as e:  # It reads the files of absl's --flagfile here.
      print(f"error: {UserError(str(e))}", file=sys.stderr)
      sys.exit(2)

  def define_weights(self) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines --weights and --model, the arguments of `weights.load_model`."""
    return self.string(
      "weights",
      "A PyTorch checkpoint, a safetensors file, hf-hub:OWNER/NAME, or a"
      " workdir: --weights runs/cifar10.",
    ), self.string(
      "model",
      "The variant whose weights the file holds: --model convmixer_768_32."
      " Default: the variant that fits the weights.",
    )


def required(flag: flags.FlagHolder) -> Any:
  """The value of a flag; raises UserError if it is not set, or empty."""
  if flag.value is None or flag.value == "":
    raise UserError(f"--{flag.name}: is required; see --help")
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
      near = config_lib.nearest(field)
      text = field if value is None else f"{field}={value}"
      raise UserError(f"--config.{text}: no such field; nearest is {near}")
  file = os.path.expanduser((path or "").partition(":")[0])
  elsewhere = path is None or files.is_url(path)
  if not elsewhere and not os.path.isfile(file):  # A FIFO would wait.
    text = "not a file" if os.path.exists(file) else "no such file"
    raise UserError(f"--config={path}: {text}")
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Bad configs fail below.
  try:
    rest = flag_values(argv)
    flags.FLAGS(argv[:1])  # Parses absl's own flags, which grain reads.
    if "config" in flag_values and path is not None:
      getattr(flag_values.config, "get", None)  # Raises if it did not load.
    return rest
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # A config file is a program: it may even exit.
    try:
      message = str(e).strip()
    except Exception:
      message = ""
    unknown = "Unknown command line flag 'config." in message
    if overrides and unknown and "config" in flag_values:
      raise UserError(
        f"--config.{min(overrides)}: needs a --config before it; a run's own is"
        " WORKDIR/config.json"
      ) from e
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


def guard_output(only_prints: bool) -> None:
  """Makes output that nobody reads no error: `| head`, or a closed terminal.

  A command that `only_prints` then ends quietly. The others go on, and what
  they print is dropped.
  """

  def failed(e):
    if e.errno not in (errno.EPIPE, errno.EIO):
      raise UserError(f"standard output: {e.strerror}") from e
    if only_prints:
      sys.exit(128 + signal.SIGPIPE)

  nowhere = lambda: os.fdopen(
    os.open(os.devnull, os.O_WRONLY), "w", closefd=False
  )
  stdout, stderr = sys.stdout or nowhere(), sys.stderr or nowhere()  # >&-
  # One of its own: `distributed` filters what libraries print to number 1.
  sys.stdout = runtime.open_output(os.dup(stdout.fileno()), stdout, failed)
  sys.stderr = runtime.open_output(stderr.fileno(), stderr)


def run(
  main: Callable[..., None],
  flag_values: flags.FlagValues,
  *,
  only_prints: bool = False,
) -> None:
  """Runs a command; a UserError prints one line and exits with code 2.

  `main` gets the arguments that are not flags. If it takes no arguments, they
  are an error. For `only_prints` see `guard_output`.
  """
  # See convmixer_jax/__init__.py.
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  logging.set_verbosity(logging.WARNING)
  # Reading a checkpoint stops at the first damaged array. orbax leaves reads of
  # the others: coroutines, which find their event loop closed, and of which
  # Python warns when it deletes them.
  report = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: (
    inspect.iscoroutine(unraisable.object)
    or "Event loop is closed" in str(unraisable.exc_value)
    or report(unraisable)
  )
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  # absl replaces the handlers that write to sys.stderr, so it comes first.
  logging.use_absl_handler()
  guard_output(only_prints)
  if sys.stdin is not None:
    sys.stdin.reconfigure(errors="surrogateescape")
  runtime.keep_pages()
  runtime.keep_compiled()

  def call(argv):
    if argv[1:] and not inspect.signature(main).parameters:
      raise UserError(f"{argv[1]}: not a flag; see --help")
    main(*argv[1:])
    sys.stdout.flush()

  code = 1  # For exceptions that are not caught here.
  try:
    app.run(call, flags_parser=lambda argv: parse_flags(argv, flag_values))
  except (UserError, RuntimeError) as e:
    if not isinstance(known := errors.of_jax(e) or e, UserError):
      raise
    print(f"error: {known}", file=sys.stderr, flush=True)
    code = 2
  except KeyboardInterrupt:
    code = 128 + signal.SIGINT
  except SystemExit as e:
    code = e.code or 0
  finally:
    # At exit Python waits for threads and locks. A dead file system or a dead
    # process may block one of them forever, so it gets 10 seconds.
    with contextlib.suppress(UserError, SystemExit):
      sys.stdout.flush()
    timer = threading.Timer(10, os._exit, [code])
    timer.daemon = True
    timer.start()
  sys.exit(code)
