"""Which values a field of a config accepts."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple


class Rule(NamedTuple):
  """Which values a field accepts."""

  text: str  # For people; follows "must be".
  accepts: Callable[[Any], bool]
  type: type  # Of a value that is not None.


_LARGEST = 1e30  # Neither infinity nor nan, in float32 too.


def integer(low: int, high: int = 2**32 - 1) -> Rule:
  """An integer; bools are none."""
  test = lambda v: (
    isinstance(v, int) and not isinstance(v, bool) and low <= v <= high
  )
  return Rule(f"an integer from {low} to {high}", test, int)


def number(low: float, high: float = _LARGEST) -> Rule:
  """An integer or a float; neither infinity nor NaN."""
  test = lambda v: (
    isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high
  )
  bounds = f"from {low} to {high}" if high < _LARGEST else f"of at least {low}"
  return Rule(f"a number {bounds}", test, float)


def numbers(count: int, low: float, high: float = _LARGEST) -> Rule:
  """A tuple or list of `count` numbers."""
  text, test, _ = number(low, high)
  return Rule(
    f"{count} values, each {text}",
    lambda v: (
      isinstance(v, (tuple, list)) and len(v) == count and all(map(test, v))
    ),
    tuple,
  )


def integers(low: int, high: int) -> Rule:
  """A tuple or list of at least one integer."""
  text, test, _ = integer(low, high)
  return Rule(
    f"values, each {text}",
    lambda v: isinstance(v, (tuple, list)) and bool(v) and all(map(test, v)),
    tuple,
  )


def interval(low: float, high: float = _LARGEST) -> Rule:
  """Two numbers, ascending."""
  text, test, kind = numbers(2, low, high)
  return Rule(f"{text}, ascending", lambda v: test(v) and v[0] <= v[1], kind)


def choice(*names: str) -> Rule:
  """One of these strings."""
  test = lambda v: isinstance(v, str) and v in names
  return Rule(f"one of {', '.join(n or 'empty' for n in names)}", test, str)


def optional(rule: Rule) -> Rule:
  """None, or what `rule` accepts."""
  text, test, kind = rule
  return Rule(f"{text}, or None", lambda v: v is None or test(v), kind)


TEXT = Rule("a string", lambda v: isinstance(v, str) and bool(v), str)
BOOL = Rule("true or false", lambda v: isinstance(v, bool), bool)
POLICY = Rule("a policy, or empty", lambda v: isinstance(v, str), str)
NAMES = Rule(
  "a tuple of strings",
  lambda v: isinstance(v, (tuple, list)) and all(isinstance(x, str) for x in v),
  tuple,
)
