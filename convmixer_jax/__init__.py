"""ConvMixer ("Patches Are All You Need?") in JAX and Flax linen."""

__version__ = "0.1.0"
