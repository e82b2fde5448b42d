"""Lists as people write and read them: of whole numbers, of settings to compare, and of names in a
message."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffit_jax.errors import UserError

MOST = 10_000_000


def parse_numbers(flag: str, text: str) -> list[int]:
    """`7`, `0-63` or `0-9,20-29` → the whole numbers it names, ends included; `flag` is named in
    the error."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(
                f"{flag} {text!r} is not a list of whole numbers: write 7, 0-63 or 0-9,20-29"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if len(numbers) + last - first >= MOST:
            raise UserError(
                f"{flag} {text!r} names more than {MOST:,} numbers: ask for fewer at a time"
            )
        numbers.extend(range(first, last + 1))
    return numbers


def parse_ranges(flag: str, text: str) -> list[list[int]]:
    """`0-9,20-29` → the numbers of each range; `flag` is named in the error."""
    return [parse_numbers(flag, part) for part in text.split(",")]


class SweepKey(NamedTuple):
    """A setting that `parse_sweep` knows.

    Attributes:
      read: from a value as it is written; a ValueError means that it cannot be.
      wanted: what its values must be, for the error.
      bare: whether its name may stand alone, for the values that the command chooses.
      nested: whether values have "=" in them.
    """

    read: Callable[[str], Any]
    wanted: str = "it must be a number"
    bare: bool = False
    nested: bool = False


def parse_sweep(text: str, known: Mapping[str, SweepKey]) -> dict[str, list[Any]]:
    """`guidance.scale=1,1.5,2,ema_length=0.05,0.1` → values by name: the one syntax of `--sweep`.

    Args:
      text: of the flag.
      known: settings by name.

    Returns:
      Values of each setting in their order; none for a name that stands alone.

    Raises:
      UserError: an unknown name, or a value that cannot be.
    """
    found: dict[str, list[Any]] = {}
    current = ""
    for part in map(str.strip, text.split(",")):
        name, separator, value = part.partition("=")
        named = name in known and bool(separator or known[name].bare)
        if not named and (not current or (separator and not known[current].nested)):
            raise UserError(
                f"--sweep has {name!r}: write KEY=VALUE,VALUE,… with some of {', '.join(known)}"
            )
        current, value = (name, value.strip()) if named else (current, part)
        values = found.setdefault(current, [])
        if named and not separator:
            continue
        try:
            values.append(known[current].read(value))
        except ValueError as error:
            wanted = known[current].wanted
            raise UserError(f"--sweep has {current}={value}: {wanted}") from error
        if isinstance(values[-1], float) and not math.isfinite(values[-1]):
            raise UserError(f"--sweep has {current}={value}: it must be a finite number")
    return found


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of a sweep, the last setting changing the fastest."""
    return [dict(zip(sweep, each, strict=True)) for each in itertools.product(*sweep.values())]


def in_short(numbers: Sequence[int]) -> str:
    """The inverse of `parse_numbers`: 0, 1, 2, 3, 7 → `0-3,7`."""
    parts, index = [], 0
    while index < len(numbers):
        last = index
        while last + 1 < len(numbers) and numbers[last + 1] == numbers[last] + 1:
            last += 1
        parts.append(str(numbers[index]) if last == index else f"{numbers[index]}-{numbers[last]}")
        index = last + 1
    return ",".join(parts)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """A list for a message: the first few, and how many more there are."""
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
