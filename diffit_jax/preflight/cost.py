"""The cost of a compiled TPU program, by the compiler's own estimate.

Its text (`compiled.as_text()`) is parsed as computations. The compiler notes `estimated_cycles` on
most scheduled operations. A step's estimate walks the entry computation and multiplies the body of
a loop by its trip count, weighs the branches of a conditional, and adds up. Operations without an
estimate are never silently free:

* collectives: bytes over the bandwidth of a chip's links, a lower bound, kept apart because compute
can hide it;
* copies and fusions without an estimate: bytes over the bandwidth of the memory (HBM);
* custom kernels: the cycles of their static schedule, from the caller; a kernel without one is
listed as unpriced.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

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
        """Return the computations named by attributes like `calls=` or `branch_computations=`."""
        names = []
        for key in keys:
            found = re.search(key + r"=(\{[^}]*\}|%?[\w.\-]+)", self.attributes)
            names += re.findall(r"[\w.\-]+", found[1]) if found else []
        return names


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program: computations by name, each a list of instructions as scheduled.

    Attributes:
      entry: name of the computation where it starts.
      computations: all of them.
      sources: stack frame id → "file:line" of the innermost frame.
    """

    entry: str
    computations: Mapping[str, Sequence[Instruction]]
    sources: Mapping[int, str]

    def source(self, instruction: Instruction) -> str:
        """Return an instruction's line of source, and its part of the network; "" if unknown."""
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
    """Return the bytes of a type such as `f32[3,4]{1,0}` or a tuple of them, without padding.

    A bool counts one byte; what is not an array (tokens) none.
    """
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", text):
        total += _BYTES.get(dtype, 1 if dtype.startswith("f8") else 0) * math.prod(
            int(size) for size in shape.split(",") if size
        )
    return total


def parse(text: str) -> Program:
    """Parse the text of a scheduled program."""
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
    """Split "TYPE opcode(…" into the type and the rest."""
    if text.startswith("("):
        inside, rest = _balanced(text)
        return f"({inside})", rest.strip()
    result, _, rest = text.partition(" ")
    return result, rest


def _balanced(text: str) -> tuple[str, str]:
    """Return the inside of the parenthesis that `text` begins with, and the rest after it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[1 : match.start()], text[match.end() :]
    return text[1:], ""


def parts(result: str) -> list[str]:
    """Return the array types of a type that may be a tuple."""
    return re.findall(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\]", result)


def _sources(tables: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """Map stack frame id → "file:line" of its innermost frame."""

    def number(text: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", text)
        return int(found[1]) if found else 0

    sources = {}
    for frame, text in tables.get("StackFrames", {}).items():
        location = tables["FileLocations"].get(number(text, "file_location_id"), "")
        name = tables["FileNames"].get(number(location, "file_name_id"), "").strip('"')
        sources[frame] = f"{name}:{number(location, 'line')}" if name else ""
    return sources


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Operations that move nothing: names for parts of buffers, constants, and the ends of what was
# counted at its start.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "iota",
        "add-dependency",
    ]
)
_ASYNC_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_KERNEL = "tpu_custom_call"
# What the compiler says to itself in the form of calls.
_MARKERS = frozenset(
    (
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "ZeroCrop",
        "Sharding",
    )
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom kernel (Pallas) as a program calls it.

    Attributes:
      name: that it was given.
      operands: their types, such as `bf16[4,9,1024,128]`.
      bytes: of operands and results.
    """

    name: str
    operands: tuple[str, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that takes time, as often as it runs in one execution of the program.

    Attributes:
      name, opcode: of the instruction.
      where: path of the operation in the traced program, such as `…/attention/dot_general`.
      source: file:line.
      cycles: of all runs together.
      times: how often it runs.
      estimated: whether the compiler estimated it; otherwise it is priced by its bytes, or by a
        kernel's schedule.
    """

    name: str
    opcode: str
    where: str
    source: str
    cycles: float
    times: float
    estimated: bool


@dataclasses.dataclass
class Cost:
    """What one execution of a program costs on one chip.

    Attributes:
      operations: everything that was priced.
      collectives: kind → [how often, bytes that leave or enter the chip].
      async_copies: [how often, bytes] of copies between HBM and on-chip memory that overlap with
        other operations.
      unpriced: name of a custom kernel or call without a known price → how often it runs.
      even_conditionals: conditionals, of which nobody says how often each branch is taken; all
        branches count alike.
      unknown_loops: loops whose trip count could not be found; they count once.
    """

    operations: list[Operation] = dataclasses.field(default_factory=list)
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    async_copies: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    unpriced: dict[str, float] = dataclasses.field(default_factory=dict)
    even_conditionals: list[str] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    @property
    def cycles(self) -> float:
        """Of all operations, one after the other; without collectives."""
        return sum(operation.cycles for operation in self.operations)

    @property
    def cycles_by_bytes(self) -> float:
        """The part of `cycles` that the compiler did not estimate."""
        return sum(operation.cycles for operation in self.operations if not operation.estimated)

    def top_ops(self, count: int) -> list[Operation]:
        """Return the costliest operations, summed over those of one line of source and one kind."""
        groups = collections.defaultdict(list)
        for operation in self.operations:
            groups[operation.source, operation.where, operation.opcode].append(operation)
        merged = [
            dataclasses.replace(
                max(group, key=lambda o: o.cycles),
                cycles=sum(o.cycles for o in group),
                times=sum(o.times for o in group),
            )
            for group in groups.values()
        ]
        return sorted(merged, key=lambda operation: -operation.cycles)[:count]


def cost(
    program: Program,
    bytes_per_cycle: float,
    kernels: Callable[["Kernel"], float | None] = lambda _: None,
) -> Cost:
    """Price a program.

    Args:
      program: from `parse`.
      bytes_per_cycle: bandwidth of the chip's memory, for operations that the compiler did not
        estimate.
      kernels: a custom kernel → cycles of one call, None if they are not known.
    """
    return _Walk(program, bytes_per_cycle, kernels).run()


def kernels(program: Program) -> set[Kernel]:
    """Return the custom kernels that a program calls."""
    found = set()
    for instructions in program.computations.values():
        by_name = {instruction.name: instruction for instruction in instructions}
        found |= {
            kernel_of(i, by_name)
            for i in instructions
            if f'custom_call_target="{_KERNEL}"' in i.attributes
        }
    return found


def kernel_of(instruction: Instruction, by_name: Mapping[str, Instruction]) -> Kernel:
    """Return the kernel that an instruction calls."""
    named = re.search(r'op_name="(?:[^"]*[/(])?([\w.\-]+)\)*/pallas_call', instruction.attributes)
    operands = tuple(
        part
        for name in instruction.operands
        if name in by_name
        for part in parts(by_name[name].result)
    )
    size = instruction.bytes + sum(type_bytes(part) for part in operands)
    return Kernel(named[1] if named else instruction.name, operands, size)


def group_size(attributes: str) -> int | None:
    """Return how many devices take part in a collective; None if it does not say."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(
            int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]) if name in sizes
        )
    return None


class _Walk:
    def __init__(self, program: Program, bytes_per_cycle: float, kernels: Callable):
        self._program, self._bytes_per_cycle, self._kernels = program, bytes_per_cycle, kernels
        self._cost = Cost()

    def run(self) -> Cost:
        self._computation(self._program.entry, 1.0)
        return self._cost

    def _computation(self, name: str, times: float) -> None:
        instructions = self._program.computations[name]
        by_name = {instruction.name: instruction for instruction in instructions}
        # Collectives spread over several fusions of this computation; each counts once.
        chains: set[str] = set()
        for instruction in instructions:
            self._instruction(instruction, times, by_name, chains)

    def _instruction(
        self, instruction: Instruction, times: float, by_name: Mapping, chains: set[str]
    ) -> None:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            trips = self._trip_count(instruction)
            if trips is None:
                self._cost.unknown_loops.append(instruction.name)
            for called in instruction.called("condition", "body"):
                self._computation(called, times * (trips or 1))
        elif opcode == "conditional":
            branches = instruction.called(
                "branch_computations", "true_computation", "false_computation"
            )
            self._cost.even_conditionals.append(instruction.name)
            for branch in branches:
                self._computation(branch, times / len(branches))
        elif opcode == "call" or (opcode == "async-start" and instruction.called("calls")):
            for called in instruction.called("to_apply", "calls"):
                self._computation(called, times)
        elif opcode.removesuffix("-start") in COLLECTIVES:
            self._collective(instruction, times, by_name, chains)
        elif opcode in _ASYNC_COPIES:
            self._cost.async_copies[0] += times
            self._cost.async_copies[1] += times * max(
                (type_bytes(part) for part in parts(instruction.result)), default=0
            )
        elif opcode == "custom-call":
            self._custom_call(instruction, times, by_name)
        else:
            self._plain(instruction, times, by_name, chains)

    def _plain(
        self, instruction: Instruction, times: float, by_name: Mapping, chains: set[str]
    ) -> None:
        """Add a fusion, copy or single operation: the compiler's estimate, or its bytes."""
        inner = [
            i
            for name in instruction.called("calls")
            for i in self._program.computations.get(name, ())
        ]
        kernel = next((i for i in inner if f'custom_call_target="{_KERNEL}"' in i.attributes), None)
        if kernel is not None:  # into which what reads its operands was fused
            self._custom_call(kernel, times, {i.name: i for i in inner})
            return
        for collective in (i for i in inner if i.opcode.removesuffix("-start") in COLLECTIVES):
            self._collective(collective, times, by_name, chains)
        cycles = instruction.estimated_cycles
        estimated = cycles is not None
        if not estimated and any(i.opcode.removesuffix("-start") in COLLECTIVES for i in inner):
            return  # the start or end of a collective, nothing else
        if not estimated:
            # A fusion of fusions may have estimates inside.
            inside = [i.estimated_cycles for i in inner if i.estimated_cycles is not None]
            moved = instruction.bytes + sum(
                by_name[name].bytes for name in instruction.operands if name in by_name
            )
            cycles = sum(inside) if inside else moved / self._bytes_per_cycle
            estimated = bool(inside)
        self._add(instruction, cycles or 0.0, times, estimated)

    def _custom_call(self, instruction: Instruction, times: float, by_name: Mapping) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if not target or target[1] != _KERNEL:
            cycles = instruction.estimated_cycles
            if cycles is not None:
                self._add(instruction, cycles, times, True)
            elif target and target[1] not in _MARKERS:
                self._cost.unpriced[target[1]] = self._cost.unpriced.get(target[1], 0) + times
            return
        kernel = kernel_of(instruction, by_name)
        cycles = self._kernels(kernel)
        if cycles is None:
            self._cost.unpriced[kernel.name] = self._cost.unpriced.get(kernel.name, 0) + times
        else:
            self._add(instruction, cycles, times, False)

    def _collective(
        self, instruction: Instruction, times: float, by_name: Mapping, chains: set[str]
    ) -> None:
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if channel and channel[1] in chains:
            return
        chains.add(channel[1] if channel else instruction.name)
        kind = instruction.opcode.removesuffix("-start")
        sizes = [type_bytes(part) for part in parts(instruction.result)] or [0]
        # An asynchronous one shows its operand and its result. The larger side counts: the whole
        # that is gathered, or was scattered.
        result = max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)
        size = max(
            result, sum(by_name[name].bytes for name in instruction.operands if name in by_name)
        )
        members = group_size(instruction.attributes)
        entry = self._cost.collectives.setdefault(kind, [0.0, 0.0])
        entry[0] += times
        # Each of n members has an n-th already. A ring sends the rest once for a gather or a
        # scatter, twice for a sum that all get.
        fraction = (
            1.0 if kind == "collective-permute" or members is None else (members - 1) / members
        )
        entry[1] += times * size * fraction * (2 if kind == "all-reduce" else 1)

    def _add(self, instruction: Instruction, cycles: float, times: float, estimated: bool) -> None:
        if not cycles:
            return
        found = re.search(r'op_name="([^"]*)"', instruction.attributes)
        where = found[1] if found else ""
        source = self._program.source(instruction)
        self._cost.operations.append(
            Operation(
                instruction.name,
                instruction.opcode,
                where,
                source,
                cycles * times,
                times,
                estimated,
            )
        )

    def _trip_count(self, loop: Instruction) -> int | None:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        (condition,) = loop.called("condition")
        # The bound is the only constant that the condition compares with.
        constants = {
            int(value[1])
            for instruction in self._reach(condition)
            if instruction.opcode == "constant"
            and (value := re.match(r"constant\((\d+)\)", instruction.attributes))
        }
        return constants.pop() if len(constants) == 1 else None

    def _reach(self, name: str) -> Iterator[Instruction]:
        for instruction in self._program.computations.get(name, ()):
            yield instruction
            for called in instruction.called("calls", "to_apply"):
                yield from self._reach(called)
