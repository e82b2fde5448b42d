"""Reads the text of a compiled TPU program (`compiled.as_text()`): computations, and what each
instruction says about itself."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as in the text.
      result: its type, as text.
      operands: names of other instructions.
      attributes: everything after the operands, as text.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def bytes(self) -> int:
        """Size of the result, all arrays of a tuple together."""
        return type_bytes(self.result)

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate, None where it has none: it may say so by 2^63 - 1."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and int(found[1]) < 2**62 else None

    def called(self, *keys: str) -> list[str]:
        """Names of the computations given by attributes like `calls=` or
        `branch_computations={…}`."""
        names = []
        for key in keys:
            found = re.search(key + r"=(\{[^}]*\}|%?[\w.\-]+)", self.attributes)
            names += re.findall(r"[\w.\-]+", found[1]) if found else []
        return names


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program: computations by name, each a list of instructions in the order of their
    schedule.

    Attributes:
      entry: name of the computation where it starts.
      computations: all of them.
      sources: stack frame id → "file:line" of the innermost frame.
    """

    entry: str
    computations: Mapping[str, Sequence[Instruction]]
    sources: Mapping[int, str]

    def source(self, instruction: Instruction) -> str:
        """Where in the source an instruction comes from, and in which part of the network; "" if
        unknown."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        inline = re.search(r'source_file="([^"]+)"(?: source_line=(\d+))?', instruction.attributes)
        return (
            self.sources.get(int(frame[1]), "")
            if frame
            else f"{inline[1]}:{inline[2] or '?'}"
            if inline
            else ""
        )


def type_bytes(text: str) -> int:
    """Bytes of a type such as `f32[3,4]{1,0}` or a tuple of them, without padding.

    A bool counts one byte; what is not an array (tokens) none.
    """
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", text):
        total += _BYTES.get(dtype, 1 if dtype.startswith("f8") else 0) * math.prod(
            int(size) for size in shape.split(",") if size
        )
    return total


def parse(text: str) -> Program:
    """Reads the text of a scheduled program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
    table = None
    for line in text.splitlines():
        if current is not None:
            if line.startswith("}"):
                current = None
            elif " = " in line:
                current.append(_instruction(line))
            continue
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and "->" in line:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables[line]
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
    return Program(entry, computations, _sources(tables))


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    name = left.split()[-1].lstrip("%")
    result, rest = _leading_type(right)
    opcode, _, rest = rest.partition("(")
    operands, rest = _balanced("(" + rest)
    attributes = rest.lstrip(", ")
    if opcode == "constant":
        attributes = f"constant({operands}) {attributes}"
    return Instruction(
        name, opcode.strip(), result, tuple(re.findall(r"%([\w.\-]+)", operands)), attributes
    )


def _leading_type(text: str) -> tuple[str, str]:
    """Splits "TYPE opcode(…" into the type and the rest."""
    if text.startswith("("):
        inside, rest = _balanced(text)
        return f"({inside})", rest.strip()
    result, _, rest = text.partition(" ")
    return result, rest


def _balanced(text: str) -> tuple[str, str]:
    """The inside of the parenthesis that `text` begins with, and what follows it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[1 : match.start()], text[match.end() :]
    return text[1:], ""


def parts(result: str) -> list[str]:
    """The types of the arrays of a type that may be a tuple."""
    return re.findall(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\]", result)


def _sources(tables: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """Stack frame id → "file:line" of its innermost frame."""

    def number(text: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", text)
        return int(found[1]) if found else 0

    sources = {}
    for frame, text in tables.get("StackFrames", {}).items():
        location = tables["FileLocations"].get(number(text, "file_location_id"), "")
        name = tables["FileNames"].get(number(location, "file_name_id"), "").strip('"')
        sources[frame] = f"{name}:{number(location, 'line')}" if name else ""
    return sources
