"""Packs what a GPU machine without internet lacks, and unpacks it there.

  python benchmarks/pack.py DIR                   needs internet and CIFAR-10
  python benchmarks/pack.py --unpack DIR INTO     needs neither

DIR gets manifest.json and two groups of files of at most 60 MB. packages.tar.NN
are wheels of what training needs beside jax, flax, optax, orbax and their like,
in the versions of requirements.txt. cifar10.tar.NN are the data as TFDS
prepared them. INTO gets site-3.12, for PYTHONPATH, with those packages that the
Python that unpacks them lacks; and tensorflow_datasets, for TFDS_DATA_DIR. The
parts may come a few at a time, each time with the manifest: --unpack keeps them
until a group is complete. Needs nothing but Python and pip.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
from pathlib import Path
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from typing import NoReturn

PART = 60_000_000  # Bytes.
# What convmixer_jax.main imports, and what that needs to be imported. Of these,
# --unpack installs only what is missing.
PACKAGES = [
  "absl-py", "array_record", "attrs", "certifi", "charset-normalizer", "clu",
  "dm-tree", "docstring_parser", "einops", "etils", "filelock", "flatbuffers",
  "fsspec", "googleapis-common-protos", "grain", "idna", "immutabledict",
  "importlib_resources", "ml_collections", "portpicker", "promise",
  "requests", "simple-parsing", "six", "tensorflow-datasets",
  "tensorflow-metadata", "termcolor", "toml", "tqdm", "urllib3", "wrapt",
  "zipp",
]  # fmt: skip
SOURCES = ("promise",)  # PyPI has no wheel of these, which are plain Python.
MANIFEST = "manifest.json"


class Parts(io.RawIOBase):
  """A stream that is written to files NAME.00, NAME.01 and so on."""

  def __init__(self, folder: Path, name: str):
    self._folder, self._name, self._file = folder, name, None
    self.parts = []

  def write(self, data) -> int:
    data = memoryview(data)
    length = len(data)
    while data:
      if self._file is None or self._file.tell() == PART:
        self.end()
        path = self._folder / f"{self._name}.{len(self.parts):02}"
        self._file = path.open("wb")
      room = PART - self._file.tell()
      self._file.write(data[:room])
      data = data[room:]
    return length

  def end(self) -> None:
    """Closes the last file and notes its checksum."""
    if self._file:
      self._file.close()
      path = Path(self._file.name)
      self.parts.append({"name": path.name, "sha256": checksum(path)})
      self._file = None


class Joined(io.RawIOBase):
  """Reads files one after another."""

  def __init__(self, paths: list[Path]):
    self._paths, self._file = [*paths], io.BytesIO()

  def readable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()
    super().close()

  def readinto(self, buffer) -> int:
    while not (count := self._file.readinto(buffer)):
      if not self._paths:
        return 0
      self._file.close()
      self._file = self._paths.pop(0).open("rb")
    return count


def checksum(path: Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def fail(text: str) -> NoReturn:
  """Prints one line and exits with code 2."""
  print(f"error: {text}", file=sys.stderr)
  sys.exit(2)


def normal(name: str) -> str:
  """A distribution's name as PyPI compares it."""
  return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> list[str]:
  """'name==version' of each of `PACKAGES`, from requirements.txt."""
  path = Path(__file__).parents[1] / "requirements.txt"
  lines = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text("utf-8"), re.M)
  versions = {normal(name): version for name, version in lines}
  return [f"{name}=={versions[normal(name)]}" for name in PACKAGES]


def pack(folder: Path, python: str, data: Path) -> None:
  """Writes the parts of both groups and the manifest."""
  if not [*data.glob("*/dataset_info.json")]:
    fail(f"--data={data}: TFDS has not prepared CIFAR-10 there")
  folder.mkdir(parents=True, exist_ok=True)
  for old in [*folder.glob("*.tar.*"), folder / MANIFEST]:
    old.unlink(missing_ok=True)
  wheels = folder / "wheels"
  shutil.rmtree(wheels, ignore_errors=True)
  fetch(wheels, python)
  groups = {
    "packages": [(p, p.name) for p in sorted(wheels.glob("*.whl"))],
    "cifar10": [(data, "tensorflow_datasets/cifar10")],
  }
  manifest = {"python": python, "machine": platform.machine(), "groups": {}}
  for group, files in groups.items():
    stream = Parts(folder, f"{group}.tar")
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20) as archive:
      for path, name in files:
        archive.add(path, name)
    stream.end()
    manifest["groups"][group] = stream.parts
    print(f"{group}: {', '.join(part['name'] for part in stream.parts)}")
  shutil.rmtree(wheels)
  text = json.dumps(manifest, indent=2) + "\n"
  (folder / MANIFEST).write_text(text, "utf-8")


def fetch(wheels: Path, python: str) -> None:
  """Downloads the wheels for a Python and this kind of machine."""
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  is_source = lambda pin: pin.partition("==")[0] in SOURCES
  machine = platform.machine()
  kinds = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17")
  commands = [
    [
      *pip, "download", "--quiet", "--no-deps", "--only-binary=:all:",
      f"--python-version={python}", "--implementation=cp",
      *(f"--platform={kind}_{machine}" for kind in kinds),
      f"--platform=manylinux2014_{machine}", f"--dest={wheels}",
      *(pin for pin in pins() if not is_source(pin)),
    ],
    [*pip, "wheel", "--quiet", "--no-deps", f"--wheel-dir={wheels}",
     *filter(is_source, pins())],
  ]  # fmt: skip
  for command in commands:
    if subprocess.run(command, check=False).returncode:
      fail("pip failed; see its messages above")


def unpack(folder: Path, into: Path) -> None:
  """Verifies the parts in a folder, and extracts the groups that are complete.

  Keeps the others in INTO/incoming.
  """
  try:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
  except (OSError, ValueError) as e:
    fail(f"--unpack={folder}: {MANIFEST}: {e}")
  here = ".".join(platform.python_version_tuple()[:2])
  if (here, platform.machine()) != (manifest["python"], manifest["machine"]):
    fail(
      f"--unpack={folder}: packed for Python {manifest['python']} on"
      f" {manifest['machine']}; this is {here} on {platform.machine()}"
    )
  for group, parts in manifest["groups"].items():
    done = into / f"{group}.done"
    if done.exists() and json.loads(done.read_text("utf-8")) == parts:
      print(f"{group}: is unpacked")
      continue
    incoming = into / "incoming"
    given = [p for p in parts if (folder / p["name"]).exists()]
    for part in given:
      if checksum(folder / part["name"]) != part["sha256"]:
        fail(f"{folder / part['name']}: damaged; its checksum is another")
    kept = [
      p
      for p in parts
      if p not in given
      and (incoming / p["name"]).exists()
      and checksum(incoming / p["name"]) == p["sha256"]
    ]
    if len(given) + len(kept) < len(parts):
      incoming.mkdir(parents=True, exist_ok=True)
      for part in given:
        shutil.copyfile(folder / part["name"], incoming / part["name"])
      missing = [p["name"] for p in parts if p not in given and p not in kept]
      print(f"{group}: incomplete: {', '.join(missing)} not here yet")
      continue
    paths = [(incoming if p in kept else folder) / p["name"] for p in parts]
    target = incoming / group if group == "packages" else into
    target.mkdir(parents=True, exist_ok=True)
    with (
      io.BufferedReader(Joined(paths), 1 << 20) as stream,
      tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
      # Python 3.11 has filters from 3.11.4 on.
      safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
      archive.extractall(target, **safe)
    if group == "packages":
      install(target, into / f"site-{here}")
    for part in kept:
      (incoming / part["name"]).unlink()
    done.write_text(json.dumps(parts), "utf-8")
    print(f"{group}: unpacked into {into}")


def install(wheels: Path, site: Path) -> None:
  """Installs those wheels whose packages this Python lacks."""
  have = {
    normal(d.metadata["Name"]) for d in importlib.metadata.distributions()
  }
  missing = [
    path
    for path in sorted(wheels.glob("*.whl"))
    if normal(path.name.partition("-")[0]) not in have
  ]
  shutil.rmtree(site, ignore_errors=True)
  site.mkdir(parents=True)
  if missing:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command += ["install", "--quiet", "--no-index", "--no-deps"]
    command += [f"--target={site}", *map(str, missing)]
    if subprocess.run(command, check=False).returncode:
      fail("pip failed; see its messages above")
  shutil.rmtree(wheels)
  names = ", ".join(path.name.partition("-")[0] for path in missing)
  print(f"packages: installed {names or 'none; all are here'}")


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    fail(f"{message}; see --help")


def main() -> None:
  """Runs what the flags say; see --help."""
  parser = _Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", metavar="DIR", type=Path)
  parser.add_argument("into", metavar="INTO", type=Path, nargs="?")
  parser.add_argument("--unpack", action="store_true", help="unpack DIR")
  parser.add_argument(
    "--python", default="3.12", help="version that will unpack it; %(default)s"
  )
  parser.add_argument(
    "--data",
    type=Path,
    default=Path("~/tensorflow_datasets/cifar10").expanduser(),
    help="where TFDS prepared CIFAR-10; %(default)s",
  )
  args = parser.parse_args()
  if args.unpack != (args.into is not None):
    fail("--unpack DIR INTO takes two folders, and packing one; see --help")
  if args.unpack:
    unpack(args.folder, args.into)
  else:
    pack(args.folder, args.python, args.data)


if __name__ == "__main__":
  main()
