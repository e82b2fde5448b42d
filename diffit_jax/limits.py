"""What a setting may be: its type and range stand beside the field that holds it, and are checked
in one way.

    batch_size: Annotated[int, at_least(1)]
    name: Annotated[str, one_of("adam", "lamb")]
    channels: Annotated[Sequence[Annotated[int, at_least(1)]], at_least(1)]

(Of a sequence, the limits are those of its length.)

`check` compares the values of an object's fields with these declarations. A field whose declaration
it does not know is left alone.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

import numpy as np

from diffit_jax.errors import UserError

INT32_MOST = 2**31 - 1  # what the counters of a state and the indices of an array hold


@dataclasses.dataclass(frozen=True)
class Limits:
    """The range of a number (or of a sequence's length), or the values of a text.

    Attributes:
      least, above: lower end, itself allowed or not.
      most, below: upper end, itself allowed or not.
      besides: single values allowed outside of the range.
      infinite: whether a number may be infinite. Not-a-number it may never be.
      choices: the values of a text, or the names of a dtype's; () is any.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    besides: tuple[float, ...] = ()
    infinite: bool = False
    choices: tuple[str, ...] = ()

    def hold(self, number: float) -> bool:
        """Whether a number keeps to them."""
        within = (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )
        return number in self.besides or (
            within and number == number and (self.infinite or abs(number) < math.inf)
        )

    def in_words(self, number: float) -> str:
        """What a number must be that is not so, for people."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high == INT32_MOST and low is not None and number < high:
            high = None  # nobody wants to read it
        if low is None and high is None:
            words = "a finite number"
        elif high is None:
            words = f"at least {_short(low)}" if self.above is None else f"above {_short(low)}"
        elif low is None:
            words = f"at most {_short(high)}" if self.below is None else f"below {_short(high)}"
        else:
            ends = {
                (True, True): "",
                (False, True): ", and not the former",
                (True, False): ", and not the latter",
            }
            words = f"between {_short(low)} and {_short(high)}" + ends.get(
                (self.above is None, self.below is None), ""
            )
        finite = "finite and " if number in (math.inf, -math.inf) or number != number else ""
        return (words if words == "a finite number" else finite + words) + "".join(
            f", or {_short(value)}" for value in self.besides
        )


def at_least(
    least: float, most: float | None = None, besides: tuple[float, ...] = (), infinite: bool = False
) -> Limits:
    """A number from `least` on, up to `most` if there is such an end."""
    return Limits(least=least, most=most, besides=besides, infinite=infinite)


def above(low: float, below: float | None = None) -> Limits:
    """A number above `low`, and below another one if it is given."""
    return Limits(above=low, below=below)


def share(below_one: bool = False) -> Limits:
    """A number between 0 and 1, which may be both, or only 0."""
    return Limits(least=0, below=1) if below_one else Limits(least=0, most=1)


def one_of(*choices: str) -> Limits:
    """One of some texts."""
    return Limits(choices=choices)


FINITE = Limits()
# Beside a field whose setting may differ between a config and the run that it continues, because
# the numbers do not depend on it.
FREE = "free"
Path = Annotated[str, "path"]  # as a person writes it, see `files.resolve`
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Side = Annotated[int, at_least(1, most=2**14)]  # of an image or latent
Width = Annotated[int, at_least(1, most=2**20)]
NoiseLevel = Annotated[float, at_least(1e-9, most=1e9)]  # whose square float32 holds
GridPower = Annotated[float, at_least(0.1, most=1000)]  # rho of EDM's grid, which has 7
Dtype = Annotated[np.dtype, one_of("float32", "bfloat16")]


def is_free(declared: Any) -> bool:
    """Whether a field with this declaration has the mark `FREE`."""
    return FREE in getattr(declared, "__metadata__", ())


def is_path(declared: Any) -> bool:
    """Whether a field with this declaration holds a path."""
    return "path" in getattr(declared, "__metadata__", ())


def type_of(declared: Any) -> Any:
    """The plain type of a declaration: int, float, bool, str, `np.dtype`, a `Sequence` of …"""
    return _parts(declared)[0]


def explained(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its fields, by their names."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        _, _, attributes = (inspect.cleandoc(owner.__doc__ or "") + "\n").partition("Attributes:\n")
        for names, text in re.findall(r"(?m)^  ([\w, ]+): (.*\n(?:    .*\n)*)", attributes):
            said = " ".join(text.split())
            texts |= {name: said for name in names.split(", ") if not said.startswith("as in `")}
    return texts


def _parts(declared: Any) -> tuple[Any, Limits]:
    """(type, limits) of a declaration."""
    if get_origin(declared) is not Annotated:
        return declared, FINITE
    declared, *marks = get_args(declared)
    return declared, next((mark for mark in marks if isinstance(mark, Limits)), FINITE)


def check(settings: Any, section: str | None = None) -> None:
    """Checks the fields of a dataclass (or Flax module) against their declarations.

    Args:
      settings: the object.
      section: name of the config's section that it is, for the error message; "" if it is the
        config itself, None if neither.

    Raises:
      UserError: names the first key whose value is of another type or outside of its range, and
        says what it must be.
    """
    for field in dataclasses.fields(settings):
        problem = _problem(getattr(settings, field.name), field.type)
        if problem:
            owner = (
                f"{type(settings).__name__}."
                if section is None
                else f"config key {section}{'.' if section else ''}"
            )
            raise UserError(f"{owner}{field.name} {problem}")


def _problem(value: Any, declared: Any) -> str:
    """What is wrong with a value, "" if nothing is."""
    declared, limits = _parts(declared)
    if get_origin(declared) is Sequence:
        (item_type,) = get_args(declared)
        if not isinstance(value, list | tuple):
            return f"is {value!r}: it must be a list"
        if not limits.hold(len(value)):
            return f"is {value!r}: it must have {limits.in_words(len(value))} entries"
        problems = [(item, _problem(item, item_type)) for item in value]
        item, problem = next(((item, problem) for item, problem in problems if problem), (None, ""))
        return problem and f"has {item!r}: each {problem.partition(': it ')[2]}"
    if declared is np.dtype:
        return (
            ""
            if _dtype_name(value) in limits.choices
            else f"is {value!r}: use {' or '.join(limits.choices)}"
        )
    accepted = {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.get(declared)
    if accepted is None:
        return ""
    if not isinstance(value, accepted) or (isinstance(value, bool) and declared is not bool):
        return f"is {value!r}: it must be of type {declared.__name__}"
    if limits.choices and value not in limits.choices:
        return f"is {value!r}: use {', '.join(limits.choices)}"
    if declared is int and limits.most is None and limits.below is None:
        limits = dataclasses.replace(limits, most=INT32_MOST)
    if declared in (int, float) and not (
        limits.hold(value) and (declared is int or _fits_float(value))
    ):
        return f"is {value!r}: it must be {limits.in_words(value)}"
    return ""


def _fits_float(number: float) -> bool:
    try:
        return float(number) is not None
    except OverflowError:  # a whole number with hundreds of digits
        return False


def _dtype_name(value: Any) -> str | None:
    try:
        return np.dtype(value).name
    except TypeError:
        return None


def _short(number: float | None) -> str:
    return f"{number:.3g}" if isinstance(number, float) else str(number)
