import re
import shlex

from absl import flags
from ml_collections import config_flags
import pytest

from convmixer_jax import config as config_lib
from tests import common

README = (common.ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m convmixer_jax\.main (.*)$", README, re.M)


def test_there_are_commands():
  assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
  """Flags known, overrides of the right type, and a config that may run."""
  values = flags.FlagValues()
  argv = ["main", *shlex.split(command)]
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv
  )
  text = (common.ROOT / "convmixer_jax" / "main.py").read_text()
  for name in re.findall(r'\bflags\.DEFINE_\w+\(\s*"(\w+)"', text):
    flags.DEFINE_string(name, None, "", flag_values=values)
  # A flag without a value, as README has --distributed.
  argv = [a + "=true" if a == "--distributed" else a for a in argv]
  assert values(argv) == ["main"]
  config_lib.check(config.value, num_devices=8)


def test_make_targets_exist():
  makefile = (common.ROOT / "Makefile").read_text()
  for target in re.findall(r"^make (\S+)|`make ([\w.-]+)`", README, re.M):
    name = "".join(target)
    assert re.search(rf"^{re.escape(name)}:", makefile, re.M), name


def test_files_that_are_named_exist():
  for name in re.findall(
    r"\]\(([\w./-]+)\)|`((?:convmixer_jax|tests|configs|experiments)/[\w./-]*)`",
    README,
  ):
    path = "".join(name)
    assert (common.ROOT / path).exists(), path
