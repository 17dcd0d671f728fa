"""Eight CPU devices for every test, and one compilation cache for all."""

import os
import tempfile

flag = "--xla_force_host_platform_device_count=8"
cache = tempfile.TemporaryDirectory(prefix="convmixer_jax_test_cache")
os.environ.update(
  XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
  JAX_PLATFORMS="cpu",
  JAX_COMPILATION_CACHE_DIR=cache.name,
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
  TF_CPP_MIN_LOG_LEVEL="3",
  TF_ENABLE_ONEDNN_OPTS="0",
)
