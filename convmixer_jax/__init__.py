"""ConvMixer ("Patches Are All You Need?") in JAX and Flax linen."""

import os
import re
import signal
import sys

__version__ = "0.1.0"

# Orbax would read buckets by TensorFlow where it is installed, and decides
# that when it is imported. See `buckets`.
os.environ.setdefault("EPATH_USE_TF", "false")

# While a command's modules are imported, Ctrl-C just ends it, without Python's
# traceback. `cli.run` puts Python's handler back.
_COMMAND = r"[^\0]*(\0-[^\0]*)*\0-m\0(convmixer_jax|experiments)\."
if (
  re.match(_COMMAND, "\0".join(sys.orig_argv))
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, signal.SIG_DFL)
