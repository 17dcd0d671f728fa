"""Memory traffic and collectives of a compiled program.

They are counted in the text of XLA's optimised HLO, which is the program of one
device. Loops count as often as they run; XLA's own cost analysis counts their
bodies once.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

_COLLECTIVE = re.compile(
  "(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  "|collective-broadcast|ragged-all-to-all)(-start)?"
)
# These run other computations, whose instructions are counted instead.
_CALLS = ("while", "conditional", "call", "async-start")
# These read and write nothing themselves.
_FREE = re.compile(
  "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id"
  "|replica-id|opt-barrier|.*-done|" + "|".join(_CALLS)
)

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
  r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$"
)
_CALLED = re.compile(
  r"\b(?:to_apply|calls|body|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)"
)
_REFERENCE = re.compile(r"%([\w.-]+)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(eq=False)
class Instruction:
  """'%name = shape opcode(arguments), attributes', as a node of the graph."""

  name: str
  shape: str
  opcode: str
  arguments: str  # Operands, or a constant's value, or a parameter's number.
  attributes: str
  operands: list["Instruction"]  # Whose results it reads.
  users: list[tuple["Instruction", int]]  # (i, n): its result is i's operand n.

  def find(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes."""
    match = re.search(pattern, self.attributes)
    return match and match[1]

  @property
  def op_name(self) -> str:
    """The path of the JAX operation that it comes from; may be empty."""
    return self.find(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that devices exchange."""

  kind: str  # The opcode, such as 'all-reduce'.
  op_name: str  # The path of the JAX operation that it comes from.
  bytes: int  # Of the input or the output on one device, whichever is larger.
  runs: int  # How often it is exchanged in one run of the program.
  name: str  # Of the instruction, which may exchange several arrays.
  group_size: int  # Number of devices that exchange it; 0 if unknown.

  @property
  def sent_bytes(self) -> float:
    """The least that each device must send in one exchange."""
    share = 1 - 1 / self.group_size if self.group_size else 1.0
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
  """A compiled program; its text is from `jax.stages.Compiled.as_text`."""

  def __init__(self, text: str):
    # By the name of a computation: its instructions, in the order of the text,
    # and the one that gives its result.
    self.computations: dict[str, list[Instruction]] = {}
    self.roots: dict[str, Instruction] = {}
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        is_entry, computation = match.groups()
        instructions = self.computations[computation] = []
        by_name = {}
        if is_entry:
          self._entry = computation
      elif match := _INSTRUCTION.match(line):
        is_root, name, shape, opcode, arguments, attributes = match.groups()
        # Operands stand before their users.
        operands = [by_name[key] for key in _REFERENCE.findall(arguments)]
        instruction = by_name[name] = Instruction(
          name, shape, opcode, arguments, attributes or "", operands, []
        )
        instructions.append(instruction)
        for n, operand in enumerate(operands):
          operand.users.append((instruction, n))
        if is_root:
          self.roots[computation] = instruction

  def instructions(
    self, computation: str | None = None, runs: int = 1
  ) -> Iterator[tuple[Instruction, int]]:
    """Yields every instruction that runs, and how often it does.

    A fusion counts as one. All branches of a conditional are assumed to run.
    """
    for instruction in self.computations[computation or self._entry]:
      yield instruction, runs
      if instruction.opcode in _CALLS:
        trips = self._trips(instruction) if instruction.opcode == "while" else 1
        for called in _CALLED.findall(instruction.attributes):
          for name in _REFERENCE.findall(called):
            yield from self.instructions(name, runs * trips)

  def _trips(self, loop):
    """How often a loop runs: XLA's number, or the limit in its condition."""
    if trips := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
      return int(trips)
    condition = self.computations[loop.find(r"\bcondition=%([\w.-]+)")]
    limits = [i.arguments for i in condition if i.opcode == "constant"]
    return max((int(x) for x in limits if x.isdecimal()), default=1)

  def bytes(self) -> int:
    """Bytes read and written in memory in one run.

    Every instruction reads its operands and writes its results; of a slice,
    only the part that is cut out or replaced. On-chip memory does not count.
    """
    return sum(runs * self._bytes(i) for i, runs in self.instructions())

  def _bytes(self, instruction):
    if _FREE.fullmatch(instruction.opcode):
      return 0
    count = len(instruction.operands)
    read = sum(self._read(instruction, n) for n in range(count))
    written = self._written(instruction)
    if instruction.opcode == "copy-start":  # Returns its operand, too.
      written = written[:1]
    elif _COLLECTIVE.fullmatch(instruction.opcode):
      written = _outputs(written, count)
    return read + sum(written)

  def _read(self, instruction, n):
    """Bytes that an instruction reads of its operand n."""
    whole = sum(_sizes(instruction.operands[n].shape))
    if instruction.opcode == "fusion":
      return min(whole, self._read_by_users(self._parameter(instruction, n)))
    if n == 0 and instruction.opcode in ("dynamic-slice", "slice", "gather"):
      return min(whole, sum(_sizes(instruction.shape)))
    if n == 0 and instruction.opcode == "dynamic-update-slice":
      return 0
    return whole

  def _parameter(self, fusion, n):
    """The instruction in a fusion that stands for its operand n."""
    fused = self.computations[fusion.find(r"\bcalls=%([\w.-]+)")]
    parameters = {i.arguments: i for i in fused if i.opcode == "parameter"}
    return parameters[str(n)]

  def _read_by_users(self, array):
    """Bytes that the users of an array in a fusion read of it."""
    return sum(
      self._read_by_users(user)
      if user.opcode in ("bitcast", "reshape")
      else self._read(user, n)
      for user, n in array.users
    )

  def _written(self, instruction):
    """Bytes that an instruction writes of each array that it returns."""
    sizes, operands = _sizes(instruction.shape), instruction.operands
    if instruction.opcode == "fusion":
      root = self.roots[instruction.find(r"\bcalls=%([\w.-]+)")]
      results = root.operands if root.opcode == "tuple" else [root]
      return list(map(min, sizes, (sum(self._written(r)) for r in results)))
    if instruction.opcode == "dynamic-update-slice":
      return [min(sizes[0], sum(_sizes(operands[1].shape)))]
    if instruction.opcode == "bitcast" and operands:
      return self._written(operands[0])
    return sizes

  def collectives(self) -> Iterator[Collective]:
    """Yields the arrays that devices exchange in one run."""
    for instruction, runs in self.instructions():
      match = _COLLECTIVE.fullmatch(instruction.opcode)
      if match is None:
        continue
      inputs = [sum(_sizes(x.shape, True)) for x in instruction.operands]
      outputs = _outputs(_sizes(instruction.shape, True), len(inputs))
      # If XLA merged several arrays into one exchange, the instructions that
      # take them apart after it keep the path of each.
      users = _users(instruction)
      paths = {
        int(user.find(r"\bindex=(\d+)")): _path(user)
        for user in users
        if user.opcode == "get-tuple-element"
      }
      # What the partitioner inserts has no path, but its users have.
      near = [i.op_name for i in (instruction, *users)]
      path = next((name for name in near if "/" in name), near[0])
      name, group_size = instruction.name, _group_size(instruction)
      for n, size in enumerate(map(max, inputs, outputs)):
        op_name, begin = paths.get(n) or path, 0
        slices = dict(self._slices(instruction))
        parts = self._joined(instruction.operands[n]) if slices else []
        for length, part in parts or [(0, size)]:
          cause = slices.get(begin) or op_name
          yield Collective(match[1], cause, part, runs, name, group_size)
          begin += length

  def _joined(self, array):
    """The length and bytes of each vector, if a fusion concatenates vectors.

    The compiler for GPUs joins arrays so before it exchanges them.
    """
    if array.opcode != "fusion":
      return []
    root = self.roots[array.find(r"\bcalls=%([\w.-]+)")]
    vectors = [_SHAPE.fullmatch(x.shape) for x in root.operands]
    if root.opcode != "concatenate" or not all(
      vector and vector[2].isdecimal() for vector in vectors
    ):
      return []
    return [(int(vector[2]), *_sizes(vector[0], True)) for vector in vectors]

  def _slices(self, array):
    """Yields where each slice of a vector begins, and the path of the slice."""
    for user, n in array.users:
      if user.opcode == "slice":
        begin = user.find(r"\bslice=\{\[(\d+):")
        yield int(begin), _path(user)
      elif user.opcode == "fusion":
        for begin, path in self._slices(self._parameter(user, n)):
          yield begin, path or _path(user)
      elif user.opcode.endswith("-done") or user.opcode == "bitcast":
        yield from self._slices(user)

  def cycles(self) -> int | None:
    """The TPU compiler's estimate for one run; None if the text has none."""
    estimates = (
      runs * int(i.find(r'"estimated_cycles":"(\d+)"') or 0)
      for i, runs in self.instructions()
    )
    return sum(estimates) or None


def _sizes(shape, on_chip=False):
  """Bytes in memory of each array in 'f32[8,128]{1,0:T(8,128)}' or a tuple.

  Those that a TPU keeps on its chip, whose layouts contain S(...), count as 0
  unless `on_chip`.
  """
  sizes = []
  for dtype, dims, layout in _SHAPE.findall(shape):
    bits = re.search(r"\d+", dtype.replace("pred", "u8"))  # A token has none.
    counted = bits and (on_chip or "S(" not in layout)
    count = math.prod(int(n) for n in dims.split(",") if n)
    sizes.append(count * int(bits[0]) // 8 if counted else 0)
  return sizes


def _outputs(results, count):
  """Those of a collective of `count` arrays; -start may return inputs first."""
  return results if len(results) == count else results[count : 2 * count]


def _users(collective):
  """The instructions that read its result; after -start, -done comes first."""
  users = [user for user, _ in collective.users]
  done = [user for user in users if user.opcode.endswith("-done")]
  return users + [user for end in done for user, _ in end.users]


def _path(instruction):
  """Its op_name, or that of a user if it has none."""
  near = [instruction, *(user for user, _ in instruction.users)]
  return next((i.op_name for i in near if "/" in i.op_name), "")


def _group_size(instruction):
  """Of replica_groups={{0,1},{2,3}}, =[2,4]<=[8] or =mesh['a'=8] {'a'}."""
  groups = instruction.find(r"\breplica_groups=(.*)") or ""
  if devices := re.match(r"\{\{([\d,]*)\}", groups):
    return len(devices[1].split(","))
  if shape := re.match(r"\[\d+,(\d+)\]", groups):
    return int(shape[1])
  # The order of the devices may stand between the mesh and its axes.
  if mesh := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # 'a':(4)2 is a part of size 2 of axis a.
    axes = re.findall(r"(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return 0
