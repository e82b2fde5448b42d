"""Lists of whole numbers as people write them."""

import re

from diffit_jax.errors import UserError


def parse_numbers(flag: str, text: str) -> list[int]:
    """`7`, `0-63` or `0-9,20-29` → the whole numbers it names, ends included; `flag` is named in the error."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"{flag} {text!r} is not a list of whole numbers: write 7, 0-63 or 0-9,20-29")
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers
