"""Asks the TPU's compiler about programs, on any machine: what they need and what they cost.

Its answers are kept in `CACHE`.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from diffit_jax.errors import UserError, one_line
from diffit_jax.models.diffit import attention_kernel
from diffit_jax.preflight import cost, schedule
from diffit_jax.preflight.figures import (
    CollectiveStats,
    Compiled,
    Copies,
    MemoryPlan,
    TooLarge,
    TopOp,
    answer_of,
)
from diffit_jax.runtime import backend, files
from diffit_jax.runtime.backend import KNOWN_TOPOLOGIES, chip_of

CACHE = (files.home() or Path(tempfile.gettempdir())) / ".cache/diffit_jax/preflight"
TOP_OPS = 10


# Sources that an answer depends on, besides the program.
def topology_devices(topology: str, num_slices: int = 1) -> Sequence[Any]:
    """Return descriptions of the devices of a topology.

    Raises:
      UserError: no TPU compiler, or a topology that it does not know.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: bash launch/setup_env.sh test (or pip install -c "
            "constraints.txt libtpu)"
        )
    for name, value in schedule.COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **more).devices
    except Exception as error:  # the compiler's own errors, of several types
        reason = one_line(error, 160)
        raise UserError(
            f"--topology {topology} is unknown to the TPU compiler ({reason}): use "
            f"{KNOWN_TOPOLOGIES}"
        ) from error


def count_chips(topology: str, num_slices: int = 1) -> int:
    """Count the chips of a topology, all slices together; errors as in `topology_devices`."""
    return len(topology_devices(topology, num_slices)) // chip_of(topology).devices


def libtpu_version() -> str:
    """Return the version of the TPU compiler at hand."""
    return importlib.metadata.version("libtpu")


def compile_for(lowered: jax.stages.Lowered, topology: str, num_slices: int) -> Compiled | TooLarge:
    """Compile a program for a topology; return the compiler's memory plan and cost.

    From the cache if it was compiled before.
    """
    estimator = (backend.__file__, __file__, cost.__file__, schedule.__file__)
    ours = "".join(map(_code_of, (*estimator, attention_kernel.__file__)))
    # A kernel's code names the folder of its source; the source itself is counted.
    text = re.sub(
        r'(@tpu_custom_call\(.*?backend_config = ")(?:[^"\\]|\\.)*', r"\1", lowered.as_text()
    )
    metadata = f"{topology} {num_slices} {libtpu_version()} {jax.__version__} {text}"
    cached = CACHE / f"{hashlib.sha256((metadata + ours).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, or of another form
        return answer_of(json.loads(cached.read_text()))
    answer = _ask(lowered, topology)
    cached.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(cached, json.dumps(dataclasses.asdict(answer)).encode())
    return answer


def _code_of(path: str) -> str:
    """Return a source's code without comments, docstrings, imports, and line breaks."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tree.body = [each for each in tree.body if not isinstance(each, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return ast.dump(tree)


def _ask(lowered: jax.stages.Lowered, topology: str) -> Compiled | TooLarge:
    started = time.monotonic()
    try:
        with for_another_machine():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return shortage_in(str(error))
    seconds = time.monotonic() - started
    # Price the text of the compiled program.
    chip = chip_of(topology).device()
    program = cost.parse(compiled.as_text() or "")
    total = cost.cost(
        program,
        chip.memory_bandwidth / chip.clock,
        lambda kernel: schedule.kernel_cycles(kernel, topology),
    )
    # Kernels have no estimate of the compiler; their cycles are those of their schedule.
    kernels = sum(
        operation.cycles
        for operation in total.operations
        if operation.opcode == "custom-call" and not operation.estimated
    )
    plan = compiled.memory_analysis()
    copies, copied = total.async_copies
    return Compiled(
        seconds_to_compile=seconds,
        memory=MemoryPlan(
            arguments=plan.argument_size_in_bytes,
            outputs=plan.output_size_in_bytes,
            aliased=plan.alias_size_in_bytes,
            temporaries=plan.temp_size_in_bytes,
            program=plan.generated_code_size_in_bytes,
        ),
        compute_s=total.cycles / chip.clock,
        kernels_s=kernels / chip.clock,
        by_bytes_s=(total.cycles_by_bytes - kernels) / chip.clock,
        collectives={
            kind: CollectiveStats(*moved) for kind, moved in sorted(total.collectives.items())
        },
        async_copies=Copies(copies, copied, copied / chip.memory_bandwidth),
        even_conditionals=total.even_conditionals,
        unpriced_kernels=total.unpriced,
        unknown_loops=total.unknown_loops,
        dearest=[
            TopOp(
                seconds=operation.cycles / chip.clock,
                times=operation.times,
                operation=_short(operation.where) or operation.name,
                source=_relative(operation.source),
            )
            for operation in total.top_ops(TOP_OPS)
        ],
    )


@contextlib.contextmanager
def for_another_machine() -> Iterator[None]:
    """Compile programs in this block for devices that are not here.

    They are kept out of jax's cache, from which they could not be read again. And jax before 0.10
    asks such devices for their usual layouts after compiling, which of 0.7.2 killed the process;
    what it wants to know matters to those who run the program.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        with contextlib.ExitStack() as stack:
            if jax.__version_info__ < (0, 10):
                stack.enter_context(
                    mock.patch("jax._src.interpreters.pxla.is_default_layout", lambda *_: True)
                )
            yield
    finally:
        jax.config.update(name, before)


def shortage_in(message: str) -> TooLarge:
    """Parse the compiler's message on how much memory a program that does not fit needs."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
    size = r"([\d.]+)([KMGTP]?)"
    found = re.search(
        rf"temporaries \({size}\) exceeds available HBM \({size}\)", message
    ) or re.search(rf"Used {size} of {size} hbm", message)
    if not found:
        return TooLarge(reason=one_line(message)[:200])
    needed, available = float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return TooLarge(needed=needed, available=available)


def _short(where: str) -> str:
    """Return the end of an operation's path, from the last part of the network on."""
    steps = [
        step
        for step in where.split("/")
        if step not in ("while", "body", "closed_call", "checkpoint", "shard_map", "pallas_call")
    ]
    phase = "backward " if "transpose(" in where else ""
    again = "again " if "rematted_computation" in where else ""
    return again + phase + "/".join(steps[-2:])


def _relative(source: str) -> str:
    """Return `diffit_jax/models/blocks.py:69`, not where it is installed."""
    parts = source.split("/")
    for root in ("diffit_jax", "flax", "jax", "optax"):
        if root in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    return parts[-1]
