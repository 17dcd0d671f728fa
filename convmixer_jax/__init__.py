"""ConvMixer ("Patches Are All You Need?") in JAX and Flax linen."""

import os

__version__ = "0.1.0"

# Orbax would read buckets by TensorFlow where it is installed, and decides
# that when it is imported. See `buckets`.
os.environ.setdefault("EPATH_USE_TF", "false")
