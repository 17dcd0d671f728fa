"""ConvMixer ("Patches Are All You Need?") in JAX and Flax linen."""

__version__ = "0.1.0"


class UserError(ValueError):
  """A mistake of the user's: one line that names what is wrong and what to do.

  Command-line entry points print it without a traceback and exit with 2. What
  does not print, and would break the line, is escaped.
  """

  def __init__(self, text: str):
    super().__init__(
      "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
      )
    )
