"""Errors that a person reads: one line that says what, where and what to do."""

import os
import re


class UserError(ValueError):
  """A mistake in what the user gave: a flag, a config, a file, a workdir.

  Commands print the message without a traceback and exit with code 2. The
  message says what is wrong, where, and what to do. Characters that a terminal
  cannot print, line breaks included, are escaped.
  """

  def __init__(self, text: str):
    super().__init__(
      "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
      )
    )


class InUse(UserError):
  """Another process holds the lock of a workdir; `holder` says which."""

  def __init__(self, workdir: str | os.PathLike, holder: str):
    super().__init__(f"--workdir={os.fspath(workdir)}: in use by {holder}")
    self.holder = holder


def first_line(error: BaseException) -> str:
  """The first line of an exception's message, or else its type's name."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
  """The system's message for the error code in `error`, or else its first line.

  tensorstore's errors hold such a code in a long text.
  """
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else first_line(error)[:200]


def of_jax(error: BaseException) -> UserError | None:
  """A line for jax's error that memory ran out, or a platform is not here.

  None for any other exception.
  """
  if "RESOURCE_EXHAUSTED" in str(error):
    return UserError(
      "out of memory: take a smaller batch, or in training more"
      " --config.accum_steps, or --config.model.remat; `python -m"
      f" convmixer_jax.plan` says what fits ({first_line(error)})"
    )
  if "Unable to initialize backend" not in str(error):
    return None
  chosen = os.environ.get("JAX_PLATFORMS", "")
  return UserError(f"JAX_PLATFORMS={chosen}: {first_line(error)}")
