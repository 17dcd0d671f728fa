"""What a compiled program moves: its memory traffic and its collectives.

Counted from the text of XLA's optimised HLO, in which one device's share of the
program stands. Loops count as often as they run, which XLA's own cost analysis
leaves out.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)
# Of these, nothing is read or written.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
}
# Of these, what their computations do is counted, and not what they take.
_CALLS = {"while", "conditional", "call", "async-start"}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation, and the attributes that follow it."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  def attribute(self, name: str) -> str | None:
    """The computation, or the number, that stands behind `name=`."""
    match = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
    return match and match[1]

  @property
  def op_name(self) -> str:
    """The path of the JAX operation that it comes from; may be empty."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that devices exchange.

  Attributes:
    kind: of `COLLECTIVES`.
    op_name: the path of the JAX operation that it comes from.
    bytes: of the array on one device: of the larger one of what goes in and
      what comes out.
    runs: how often in one run of the program.
    name: of the instruction; several arrays may travel in one.
    group_size: number of devices among which it is exchanged.
  """

  kind: str
  op_name: str
  bytes: int
  runs: int
  name: str
  group_size: int

  @property
  def sent_bytes(self) -> float:
    """What each device must send at least, in one run of it."""
    share = 1 - 1 / self.group_size if self.group_size else 1.0
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
  """A compiled program.

  Attributes:
    computations: name -> name -> instruction.
  """

  def __init__(self, text: str):
    """Reads what `jax.stages.Compiled.as_text` returns."""
    self.computations: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        current = self.computations[match[2]] = {}
        if match[1]:
          self._entry = match[2]
      elif match := _INSTRUCTION.match(line):
        is_root, name, shape, opcode, rest = match.groups()
        operands, attributes = _split(rest)
        if opcode in ("constant", "parameter"):  # Its value, or its number.
          operands, attributes = "", f"value={operands}"
        current[name] = Instruction(
          name,
          shape,
          opcode,
          tuple(_OPERAND.findall(operands)),
          attributes,
          bool(is_root),
        )

  def runs(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    """Yields every instruction that runs, its computation, and how often.

    What is inside a fusion is part of the fusion. Of the branches of a
    conditional, all are taken to run.
    """
    yield from self._runs(self._entry, 1)

  def _runs(self, name, times):
    computation = self.computations[name]
    for instruction in computation.values():
      yield instruction, computation, times
      if instruction.opcode == "while":
        body = instruction.attribute("body")
        yield from self._runs(body, times * self._trips(instruction))
      elif instruction.opcode in ("call", "async-start"):
        called = instruction.attribute("to_apply") or instruction.attribute(
          "calls"
        )
        if called:
          yield from self._runs(called, times)
      elif instruction.opcode == "conditional":
        match = re.search(
          r"branch_computations=\{([^}]*)\}", instruction.attributes
        )
        branches = (
          _OPERAND.findall(match[1])
          if match
          else [
            instruction.attribute(f"{which}_computation")
            for which in ("true", "false")
          ]
        )
        for branch in branches:
          yield from self._runs(branch, times)

  def _trips(self, loop: Instruction) -> int:
    """How often a loop runs: what XLA says, or what its condition compares."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if match:
      return int(match[1])
    condition = self.computations[loop.attribute("condition")]
    limits = [
      int(match[1])
      for i in condition.values()
      if i.opcode == "constant"
      and (match := re.match(r"value=(\d+)$", i.attributes))
    ]
    return max(limits, default=1)

  def bytes(self) -> int:
    """Bytes read and written in memory in one run.

    Every instruction reads its operands and writes its results; of a slice,
    only the part that is cut out or replaced. Arrays that a TPU keeps in the
    memories on its chip do not count.
    """
    return sum(
      times * self.bytes_of(instruction, computation)
      for instruction, computation, times in self.runs()
    )

  def bytes_of(
    self, instruction: Instruction, computation: dict[str, Instruction]
  ) -> int:
    """Those of one instruction of a computation."""
    opcode = instruction.opcode
    if opcode in _FREE | _CALLS or opcode.endswith("-done"):
      return 0
    read = sum(
      self._read(computation[name], instruction, n)
      for n, name in enumerate(instruction.operands)
    )
    written = self._written(instruction, computation)
    return read + sum(written[:1] if opcode == "copy-start" else written)

  def _read(self, operand, user, index):
    """Bytes of an operand that its user reads."""
    whole = _size(operand.shape)
    if user.opcode == "fusion":
      inner = self.computations[user.attribute("calls")]
      operand = next(
        i
        for i in inner.values()
        if i.attributes == f"value={index}" and i.opcode == "parameter"
      )
      return min(whole, self._read_in(operand, inner))
    if index == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
      return min(whole, _size(user.shape))
    if index == 0 and user.opcode == "dynamic-update-slice":
      return 0
    return whole

  def _read_in(self, operand, computation):
    """Bytes of an array that a computation reads."""
    total = 0
    for user in computation.values():
      for n, name in enumerate(user.operands):
        if name == operand.name and user.opcode in ("bitcast", "reshape"):
          total += self._read_in(user, computation)
        elif name == operand.name:
          total += self._read(operand, user, n)
    return total

  def _written(self, instruction, computation):
    """Bytes that it writes of each array that it returns."""
    sizes = [_size(match[0]) for match in _SHAPE.finditer(instruction.shape)]
    if instruction.opcode == "fusion":
      inner = self.computations[instruction.attribute("calls")]
      root = next(i for i in inner.values() if i.is_root)
      results = [root]
      if root.opcode == "tuple":
        results = [inner[name] for name in root.operands]
      parts = [sum(self._written(result, inner)) for result in results]
      return [min(pair) for pair in zip(sizes, parts)]
    if instruction.opcode == "dynamic-update-slice":
      return [min(sizes[0], _size(computation[instruction.operands[1]].shape))]
    if instruction.opcode == "bitcast" and instruction.operands:
      return self._written(computation[instruction.operands[0]], computation)
    return sizes

  def collectives(self) -> list[Collective]:
    """All that devices exchange in one run, an array each."""
    found = []
    for instruction, computation, times in self.runs():
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      inputs = [
        _size(computation[name].shape, everywhere=True)
        for name in instruction.operands
      ]
      outputs = [
        _size(match[0], everywhere=True)
        for match in _SHAPE.finditer(instruction.shape)
      ]
      if len(outputs) != len(inputs):  # -start returns inputs and outputs.
        outputs = outputs[len(inputs) : 2 * len(inputs)]
      # Arrays that were merged into one exchange are taken apart after it, by
      # instructions that keep the name of each.
      names, users = {}, []
      for user in computation.values():
        if instruction.name in user.operands:
          users.append(user)
          if user.opcode == "get-tuple-element":
            names[int(user.attribute("index") or 0)] = user.op_name
      # What the partitioner adds has no path: what it is needed for has.
      near = [user.op_name for user in [instruction, *users]]
      path = next((name for name in near if "/" in name), near[0])
      for n, (taken, given) in enumerate(zip(inputs, outputs)):
        found.append(
          Collective(
            kind,
            names.get(n) or path,
            max(taken, given),
            times,
            instruction.name,
            _group_size(instruction.attributes),
          )
        )
    return found

  def cycles(self) -> int | None:
    """The TPU compiler's own estimate for one run; None where it makes none."""
    total = 0
    for instruction, _, times in self.runs():
      match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
      total += times * int(match[1]) if match else 0
    return total or None


def _split(rest: str) -> tuple[str, str]:
  """'%a, %b), to_apply=%c' -> ('%a, %b', ', to_apply=%c')."""
  depth = 0
  for n, character in enumerate(rest):
    depth += (character in "({") - (character in ")}")
    if depth < 0:
      return rest[:n], rest[n + 1 :]
  return rest, ""


def _size(shape: str, everywhere: bool = False) -> int:
  """Bytes of 'f32[8,128]{1,0:T(8,128)}' or a tuple of such, in main memory."""
  total = 0
  for dtype, dims, layout in _SHAPE.findall(shape):
    if dtype in ("token", "opaque") or ("S(" in layout and not everywhere):
      continue
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
  return total


def _group_size(attributes: str) -> int:
  """Of replica_groups={{0,1}}, =[2,4]<=[8] or =mesh['a'=8] {'a':(4)2}."""
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(match[1].split(","))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(match[1])
  if match := re.search(
    r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    # 'a':(4)2 is a part of size 2 of the axis.
    axes = re.findall(r"(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return 0
