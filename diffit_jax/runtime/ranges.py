"""Lists as people write and read them: of whole numbers, and of names in a message."""

import re
from collections.abc import Sequence

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
