"""The paper's experiments: sweeps as data, a runner, tables."""

import convmixer_jax as convmixer_jax  # First: it prepares for Ctrl-C.
