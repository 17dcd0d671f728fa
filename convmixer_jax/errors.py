"""Errors that a person reads: one line that says what, where and what to do."""


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


def first_line(error: BaseException) -> str:
  """The first line of an exception's message, or else its type's name."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
