"""Text from and to a person: progress, and lists of numbers, settings to sweep and names."""

import contextlib
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from diffit_jax.errors import UserError

SILENCE_S = 10.0  # after which somebody wonders what is happening


class Progress:
    """Progress through `total` units. Use it as a context manager.

    On a terminal it is a bar with rate and ETA. Elsewhere it is a plain line with the same, at most
    every `every_s` seconds, and only if nothing is said by `say` (which prints a line in both
    cases); before the first unit every ten seconds. With `shown` False nothing is printed: of
    several processes one speaks.

    The time left goes by the rate after the first units, for which programs are compiled, without
    what is `beside` the work.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "step",
        every_s: float = 30.0,
        shown: bool = True,
    ):
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit,
            dynamic_ncols=True,
            smoothing=0,  # as the lines: the mean rate
            disable=None if shown else True,
        )
        self._shown = shown
        self._what, self._total, self._done, self._unit, self._every_s = (
            what,
            total,
            done,
            unit,
            every_s,
        )
        self._last_line = time.monotonic()
        self._start: float | None = None  # after the first units
        self._first, self._begun = done, threading.Event()

    def __enter__(self) -> "Progress":
        if self._shown and self._bar.disable:  # a bar shows that nothing is done yet
            threading.Thread(target=self._wait_for_the_first, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._begun.set()
        self._bar.close()

    def _wait_for_the_first(self) -> None:
        while not self._begun.wait(SILENCE_S):
            self.say("the first is under way, perhaps compiled first")

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        self._begun.set()
        if self._start is None:
            self._start, self._first = time.monotonic(), self._done
            if not self._bar.disable:
                self._bar.initial, self._bar.start_t = self._done, time.time()
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._last_line > self._every_s:
            self.say("")

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Leave the time spent in this block out of the rate: it is not the units' work."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        if self._start is not None:
            self._start += seconds
            if not self._bar.disable:
                self._bar.start_t += seconds

    def _left(self) -> str:
        """Return how much time is left; "" as long as nobody knows."""
        made = self._done - self._first
        if self._start is None or not (made or self._done == self._total):
            return ""
        each = (time.monotonic() - self._start) / max(made, 1)
        return f"{duration(each * (self._total - self._done))} left"

    def say(self, text: str) -> None:
        """Print a line: how far it is, `text`, and the time left."""
        if not self._shown:
            return
        eta = self._left()
        line = " | ".join(
            part
            for part in (f"{self._what} {self._done}/{self._total} {self._unit}s", text, eta)
            if part
        )
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
        self._last_line = time.monotonic()


def duration(seconds: float) -> str:
    """Format a time as people do: 0:42 (minutes), 3:05:00 (hours), 2 days 7 h."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes_of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


MOST = 10_000_000


def parse_numbers(flag: str, text: str) -> list[int]:
    """Parse `7`, `0-63` or `0-9,20-29` to whole numbers, ends included; errors name `flag`."""
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
    """Parse `0-9,20-29` to the numbers of each range; errors name `flag`."""
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
    """Parse `guidance.scale=1,1.5,2,ema_length=0.05,0.1` to values by name.

    The one syntax of `--sweep`.

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
    """Return every combination of a sweep's values, the last setting changing the fastest."""
    return [dict(zip(sweep, each, strict=True)) for each in itertools.product(*sweep.values())]


def in_short(numbers: Sequence[int]) -> str:
    """Invert `parse_numbers`: 0, 1, 2, 3, 7 → `0-3,7`."""
    parts, index = [], 0
    while index < len(numbers):
        last = index
        while last + 1 < len(numbers) and numbers[last + 1] == numbers[last] + 1:
            last += 1
        parts.append(str(numbers[index]) if last == index else f"{numbers[index]}-{numbers[last]}")
        index = last + 1
    return ",".join(parts)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """Join the first few names for a message, and say how many more there are."""
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
