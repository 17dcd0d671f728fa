import re
import runpy
import shlex

import pytest

from convmixer_jax import config as config_lib
from tests import common

README = (common.ROOT / "README.md").read_text()
COMMANDS = re.findall(
  r"^python -m ((?:convmixer_jax|benchmarks|examples|experiments)\.\w+)(.*)$",
  README,
  re.M,
)


def test_there_are_commands():
  assert len(COMMANDS) >= 15


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_commands_parse(module, command, monkeypatch):
  """Flags known, overrides of the right type, and a config that may run."""
  argv = [module, *shlex.split(command)]
  monkeypatch.setattr("sys.argv", argv)  # Overrides are looked for there.
  path = (common.ROOT / module.replace(".", "/")).with_suffix(".py")
  flag_values = runpy.run_path(str(path))["_FLAGS"]
  rest = flag_values(argv)[1:]
  takes_names = (".predict", ".run", ".slurm", ".tables", ".report")
  assert bool(rest) == module.endswith(takes_names)
  if "config" in flag_values:
    config_lib.check(flag_values.config, num_devices=8)


def test_make_targets_exist():
  makefile = (common.ROOT / "Makefile").read_text()
  for target in re.findall(r"^make (\S+)|`make ([\w.-]+)`", README, re.M):
    name = "".join(target)
    assert re.search(rf"^{re.escape(name)}:", makefile, re.M), name


def test_files_that_are_named_exist():
  for name in re.findall(
    r"\]\(([\w./-]+)\)|`((?:convmixer_jax|tests|configs|experiments|benchmarks|examples)/[\w./-]*)`",
    README,
  ):
    path = "".join(name)
    assert (common.ROOT / path).exists(), path
