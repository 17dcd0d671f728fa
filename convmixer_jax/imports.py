"""Imports what a command line or a config names: code of the user's own."""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
import types

from convmixer_jax.errors import first_line
from convmixer_jax.errors import UserError


def load(name: str) -> tuple[types.ModuleType, str]:
  """Imports the module of 'module:attribute' or 'path/to/file.py:attribute'.

  A file may import those beside it. Returns the module, and the text after the
  last colon. Raises UserError if there is no such module or file, or it raises
  an exception, which it names with the line of the user's code.
  """
  source, _, attribute = name.rpartition(":")
  try:
    if source.endswith(".py"):
      return _run_file(_path(source)), attribute
    return importlib.import_module(source), attribute
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # A module is a program: it may even exit.
    text = f"{type(e).__name__}: {first_line(e)}"
    missing = e.name if isinstance(e, ModuleNotFoundError) else None
    if missing and f"{source}.".startswith(f"{missing}."):
      text = (
        f"no module {missing} here; run the command in its folder, or add that"
        " to PYTHONPATH"
      )
    elif isinstance(e, FileNotFoundError) and e.filename == _path(source):
      text = "no such file; run the command in the folder of its relative path"
    elif frames := _frames(e):
      text += f" ({frames[-1].filename}, line {frames[-1].lineno})"
    raise UserError(f"{name}: {text}") from e


def _path(source):
  return os.path.realpath(os.path.expanduser(source))


def _run_file(path):
  """The module of a file, which runs once."""
  if path in sys.modules:
    return sys.modules[path]
  spec = importlib.util.spec_from_file_location(path, path)
  sys.modules[path] = module = importlib.util.module_from_spec(spec)
  folder = os.path.dirname(path)
  sys.path.insert(0, folder)
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[path]
    raise
  finally:
    sys.path.remove(folder)
  return module


def _frames(error):
  """The frames of the user's code: neither Python's, a library's nor ours."""
  paths = sysconfig.get_paths()
  others = (os.path.dirname(__file__), paths["stdlib"], paths["purelib"])
  others = ("<", *(os.path.join(folder, "") for folder in others))
  frames = traceback.extract_tb(error.__traceback__)
  return [frame for frame in frames if not frame.filename.startswith(others)]
