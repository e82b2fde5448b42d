"""What a person sees while something long runs: a bar on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Progress through `total` units. Use it as a context manager.

    On a terminal it is a bar with rate and ETA. Elsewhere it is a plain line with the same, at most
    every `every_s` seconds, and only if nothing is said by `say` (which prints a line in both
    cases). With `shown` False nothing is printed: of several processes one speaks.
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
        self._start, self._first, self._last_line = time.monotonic(), done, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self._done += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._last_line > self._every_s:
            self.say("")

    def say(self, text: str) -> None:
        """Prints a line: how far it is, `text`, and how long it will take."""
        if not self._shown:
            return
        seconds = (
            (time.monotonic() - self._start)
            / max(self._done - self._first, 1)
            * (self._total - self._done)
        )
        eta = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        line = " | ".join(
            part
            for part in (f"{self._what} {self._done}/{self._total} {self._unit}s", text, eta)
            if part
        )
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
        self._last_line = time.monotonic()
