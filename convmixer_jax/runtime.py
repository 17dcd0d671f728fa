"""The process: its memory, its cache of compiled programs, its versions."""

import ctypes
import hashlib
import importlib.metadata
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

from convmixer_jax.ops import native

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_CACHE_BYTES = 2**30  # The least recently used programs are removed first.


def keep_pages() -> None:
  """Makes glibc's malloc keep freed memory in the process.

  On a CPU, XLA allocates its buffers at every call. By default malloc returns
  large ones to the system, which must then map and zero every page again.
  Does nothing without glibc, or if a MALLOC_... variable is set (see `man
  mallopt`).
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  tuned = any(name.startswith("MALLOC_") for name in os.environ)
  if mallopt is not None and not tuned:
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    mallopt(m_mmap_max, 0)  # Use one heap only,
    mallopt(m_arena_max, 1)
    mallopt(m_top_pad, 64 << 20)  # which grows in large steps
    mallopt(m_trim_threshold, -1)  # and never shrinks.


def keep_compiled() -> None:
  """Keeps compiled programs in ~/.cache/convmixer_jax for the next start.

  JAX_COMPILATION_CACHE_DIR overrides the folder. Nothing is kept if it cannot
  be written. XLA's programs for a CPU depend on its features and on the number
  of cores. jax's cache keys contain neither, so each pair has its own folder.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if (cache := native.cache_folder()) is None:
    return
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # Not Linux.
    cores = os.cpu_count()
  kind = hashlib.sha256(native.cpu().encode()).hexdigest()[:8]
  folder = cache / "xla" / f"{kind}-{cores}"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def provenance() -> dict[str, Any]:
  """What produced a result: commit, Python, versions of `PACKAGES`."""
  git = lambda *args: subprocess.run(
    ["git", *args],
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  try:
    commit = git("rev-parse", "HEAD")
    # Results that are being written are not a change of the code.
    results = ":(top,exclude,glob)*/results/**"
    if git("status", "--porcelain", "--untracked-files=no", "--", results):
      commit += "+changes"
  except (OSError, subprocess.CalledProcessError):
    commit = None
  return {
    "commit": commit,
    "python": platform.python_version(),
    "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
  }
