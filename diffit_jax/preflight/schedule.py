"""The cost of the attention kernels: the length of their static schedule.

The TPU compiler writes it out on request. A TPU's core issues one bundle of instructions in each
cycle, in an order that the compiler fixed, so that the bundles of a kernel's body times the steps
of its grid are its cycles, as long as memory keeps up. The compiler is asked in a process of its
own, since it takes such options only when it starts.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffit_jax.errors import UserError
from diffit_jax.models.diffit import attention_kernel, attention_tangent_kernel
from diffit_jax.preflight.cost import Kernel
from diffit_jax.runtime.backend import chip_of


def kernel_cycles(kernel: Kernel, topology: str) -> float | None:
    """Return the cycles of one call of an attention kernel on one chip.

    Args:
      kernel: as a program calls it.
      topology: such as `v5e:16x16`; only its chip counts.

    Returns:
      The larger of bundles × steps of the grid, divided over the chip's cores, and the bytes over
      the memory's bandwidth. Bundles that run once a head count once a head. None for a kernel that
      is not ours.

    Raises:
      UserError: the compiler wrote no schedule.
    """
    if kernel.name not in KERNELS:
        return None
    chip = chip_of(topology).device()
    queries, *_, strip = (
        (dtype, tuple(map(int, shape.split(","))))
        for dtype, shape in (
            re.match(r"(\w+)\[([\d,]+)\]", x).groups() for x in kernel.operands[:4]
        )
    )
    (dtype, shape), tokens = queries, strip[1][2] // 2
    sizes = attention_kernel.sizes_of(shape, tokens, chip.cores)
    bundles, once = _schedule(chip.example, dtype, sizes.examples, tokens, sizes.width)[kernel.name]
    # Each core has a group of the batch, or where there is one group, some of the heads.
    heads = sizes.heads if sizes.groups == chip.cores else -(-sizes.heads // chip.cores)
    return max(
        heads * (once + bundles * sizes.steps), kernel.bytes / chip.memory_bandwidth * chip.clock
    )


KERNELS = ("tmsa_forward", "tmsa_backward", "tmsa_tangent")
_known: dict[tuple, dict] = {}


def _schedule(
    topology: str, dtype: str, examples: int, tokens: int, width: int
) -> dict[str, tuple[int, int]]:
    """Return kernel → bundles of a grid step, and those that run once a head beside them.

    A step is a head of some examples, with so many tokens and channels.
    """
    key = topology, dtype, examples, tokens, width
    if key not in _known:
        whole, steps = (_compiled_bundles(*key, parts) for parts in ("all", "steps"))
        _known[key] = {name: (steps[name], whole[name] - steps[name]) for name in KERNELS}
    return _known[key]


def _compiled_bundles(topology: str, *key: Any) -> dict[str, int]:
    """Return kernel → bundles of its program, compiled in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="diffit_jax_schedule_") as folder:
        orders = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": orders}
        command = [sys.executable, "-m", "diffit_jax.preflight.schedule", topology, *map(str, key)]
        root = str(Path(__file__).parents[2])
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise UserError(f"the attention kernel does not compile for {topology} ({last[:200]})")
        return {name: _bundles(Path(folder), name) for name in KERNELS}


# How the compiler runs where there is no TPU, or another process uses it.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _bundles(folder: Path, name: str) -> int:
    for path in folder.glob(f"*{name}*schedule-analysis_final_bundles.txt"):
        return int(re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())[1])
    raise UserError(
        f"the TPU compiler wrote no schedule of {name}: its price is unknown with this version of "
        "libtpu"
    )


def _compile(topology: str, dtype: str, *sizes: str) -> None:
    """Compile all kernels; without what runs once a head if the last argument is "steps"."""
    from unittest import mock

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import pallas, topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    device = topologies.get_topology_desc(topology, platform="tpu").devices[:1]
    whole = NamedSharding(Mesh(np.array(device), ("x",)), PartitionSpec())
    examples, tokens, width = map(int, sizes[:3])
    head = (width, tokens) if attention_kernel.channels_first(width) else (tokens, width)
    # Several steps in both directions of the grid, as in a real one; five groups, so that no larger
    # group divides the batch.
    q = jax.ShapeDtypeStruct(
        (5 * examples, 2, *head), {"bf16": jnp.bfloat16, "f32": jnp.float32}[dtype], sharding=whole
    )
    window = round(tokens**0.5)
    strip = jax.ShapeDtypeStruct((2, window, 2 * tokens), jnp.float32, sharding=whole)

    def kernels(q, k, v, strip, gradient):
        out, pullback = jax.vjp(attention_kernel.attention, q, k, v, strip)
        tangent = attention_tangent_kernel.with_tangent((q, k, v), strip, [gradient] * 3)
        return out, pullback(gradient), tangent

    with contextlib.ExitStack() as stack:
        if sizes[3] == "steps":
            nothing = mock.patch.object(pallas, "when", lambda _: lambda _: None)
            stack.enter_context(nothing)
        jax.jit(kernels).lower(q, q, q, strip, q).compile()


if __name__ == "__main__":
    _compile(*sys.argv[1:])
