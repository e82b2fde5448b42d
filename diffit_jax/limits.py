"""Ranges of settings, declared where the field is, and one check for all of them.

    batch_size: Annotated[int, at_least(1)]
    name: Annotated[str, one_of("adam", "lamb")]
    channels: Annotated[Sequence[Annotated[int, at_least(1)]], at_least(1)]

(Of a sequence, the limits are those of its length.)

`check` compares the values of an object's fields with these declarations. A field whose declaration
it does not know is left alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, get_args, get_origin

import numpy as np

from diffit_jax.errors import UserError

INT32_MAX = 2**31 - 1  # what the counters of a state and the indices of an array hold


@dataclasses.dataclass(frozen=True)
class Limits:
    """The range of a number (or of a sequence's length), or the values of a text.

    Attributes:
      ge, gt: lower end, itself allowed or not.
      le, lt: upper end, itself allowed or not.
      also: single values allowed outside of the range.
      infinite: whether a number may be infinite. Not-a-number it may never be.
      choices: the values of a text, or the names of a dtype's; () is any.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: tuple[float, ...] = ()
    infinite: bool = False
    choices: tuple[str, ...] = ()

    def contains(self, number: float) -> bool:
        """Whether a number keeps to them."""
        within = (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )
        return number in self.also or (
            within and number == number and (self.infinite or abs(number) < math.inf)
        )

    def describe(self, number: float) -> str:
        """Describe the limit that the number violates, for an error message."""
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if high == INT32_MAX and low is not None and number < high:
            high = None  # nobody wants to read it
        if low is None and high is None:
            words = "a finite number"
        elif high is None:
            words = f"at least {_short(low)}" if self.gt is None else f"above {_short(low)}"
        elif low is None:
            words = f"at most {_short(high)}" if self.lt is None else f"below {_short(high)}"
        else:
            ends = {
                (True, True): "",
                (False, True): ", and not the former",
                (True, False): ", and not the latter",
            }
            words = f"between {_short(low)} and {_short(high)}" + ends.get(
                (self.gt is None, self.lt is None), ""
            )
        finite = "finite and " if number in (math.inf, -math.inf) or number != number else ""
        return (words if words == "a finite number" else finite + words) + "".join(
            f", or {_short(value)}" for value in self.also
        )


def at_least(
    ge: float, le: float | None = None, also: tuple[float, ...] = (), infinite: bool = False
) -> Limits:
    """Require a number of at least `ge`, and of at most `le` if it is given."""
    return Limits(ge=ge, le=le, also=also, infinite=infinite)


def above(low: float, below: float | None = None) -> Limits:
    """Require a number above `low`, and below another one if it is given."""
    return Limits(gt=low, lt=below)


def fraction(below_one: bool = False) -> Limits:
    """Require a number between 0 and 1, both included unless `below_one`."""
    return Limits(ge=0, lt=1) if below_one else Limits(ge=0, le=1)


def one_of(*choices: str) -> Limits:
    """Require one of some texts."""
    return Limits(choices=choices)


FINITE = Limits()
# Beside a field whose setting may differ between a config and the run that it continues, because
# the numbers do not depend on it.
RESUMABLE = "free"
# Beside a field that came after others: what was made before it is known by the others alone, so
# that a digest or record of settings leaves it out where it has its default.
LATER = "later"
Path = Annotated[str, "path"]  # as a person writes it, see `files.resolve`
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Side = Annotated[int, at_least(1, le=2**14)]  # of an image or latent
Width = Annotated[int, at_least(1, le=2**20)]
NoiseLevel = Annotated[float, at_least(1e-9, le=1e9)]  # whose square float32 holds
GridPower = Annotated[float, at_least(0.1, le=1000)]  # rho of EDM's grid, which has 7
Dtype = Annotated[np.dtype, one_of("float32", "bfloat16")]


def is_resumable(declared: Any) -> bool:
    """Whether a field with this declaration has the mark `RESUMABLE`."""
    return RESUMABLE in getattr(declared, "__metadata__", ())


def is_later(declared: Any) -> bool:
    """Whether a field with this declaration has the mark `LATER`."""
    return LATER in getattr(declared, "__metadata__", ())


def is_path(declared: Any) -> bool:
    """Whether a field with this declaration holds a path."""
    return "path" in getattr(declared, "__metadata__", ())


def type_of(declared: Any) -> Any:
    """Return the plain type of a declaration: int, float, bool, str, dtype or a sequence."""
    return _parts(declared)[0]


def _parts(declared: Any) -> tuple[Any, Limits]:
    """Return (type, limits) of a declaration."""
    if get_origin(declared) is not Annotated:
        return declared, FINITE
    declared, *marks = get_args(declared)
    return declared, next((mark for mark in marks if isinstance(mark, Limits)), FINITE)


def check(settings: Any, section: str | None = None) -> None:
    """Check the fields of a dataclass (or Flax module) against their declarations.

    Args:
      settings: the object.
      section: name of the config's section that it is, for the error message; "" if it is the
        config itself, None if neither.

    Raises:
      UserError: names the first key whose value is of another type or outside of its range, and
        says what it must be.
    """
    for field in dataclasses.fields(settings):
        wrong = problem(getattr(settings, field.name), field.type)
        if wrong:
            owner = (
                f"{type(settings).__name__}."
                if section is None
                else f"config key {section}{'.' if section else ''}"
            )
            raise UserError(f"{owner}{field.name} {wrong}")


class Section:
    """Base class of dataclasses whose fields are checked when an object is made.

    `class Optimizer(Section, name="optimizer")`: `name` is the config's section.
    """

    _section: ClassVar[str | None] = None

    def __init_subclass__(cls, name: str | None = None, **keywords: Any):
        super().__init_subclass__(**keywords)
        cls._section = cls._section if name is None else name

    def __post_init__(self):
        check(self, self._section)


def describe(declared: Any) -> str:
    """Describe what a field with this declaration takes: "a whole number, at least 1"."""
    declared, limits = _parts(declared)
    if limits.choices:
        return "one of " + ", ".join(limits.choices)
    if get_origin(declared) is Sequence:
        return f"a list of: {describe(get_args(declared)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    ends = "" if limits in (FINITE, Limits(infinite=True)) else f", {limits.describe(0.5)}"
    return words.get(declared, "a section") + ends


def problem(value: Any, declared: Any) -> str:
    """Describe the mistake in a value, "" if there is none."""
    declared, limits = _parts(declared)
    if get_origin(declared) is Sequence:
        (item_type,) = get_args(declared)
        if not isinstance(value, list | tuple):
            return f"is {value!r}: it must be a list"
        if not limits.contains(len(value)):
            return f"is {value!r}: it must have {limits.describe(len(value))} entries"
        wrongs = [(item, problem(item, item_type)) for item in value]
        item, wrong = next(((item, wrong) for item, wrong in wrongs if wrong), (None, ""))
        return wrong and f"has {item!r}: each {wrong.partition(': it ')[2]}"
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
    if declared is int and limits.le is None and limits.lt is None:
        limits = dataclasses.replace(limits, le=INT32_MAX)
    if declared in (int, float) and not (
        limits.contains(value) and (declared is int or _fits_float(value))
    ):
        return f"is {value!r}: it must be {limits.describe(value)}"
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
