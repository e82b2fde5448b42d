"""The cost of the attention kernels: the length of their static schedule.

The TPU compiler writes it out on request. A TPU's core issues one bundle of instructions in each
cycle, in an order that the compiler fixed, so that the bundles of a kernel's body times the steps
of its grid are its cycles, as long as memory keeps up. The compiler is asked in a process of its
own, since it takes such options only when it starts.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from diffit_jax.errors import UserError
from diffit_jax.models.diffit import attention_kernel
from diffit_jax.preflight.cost import Kernel
from diffit_jax.runtime.backend import chip_of


def kernel_cycles(kernel: Kernel, topology: str) -> float | None:
    """Return the cycles of one call of an attention kernel on one chip.

    Args:
      kernel: as a program calls it.
      topology: such as `v5e:16x16`; only its chip counts.

    Returns:
      The larger of bundles × steps of the grid, divided over the chip's cores, and the bytes over
      the memory's bandwidth. None for a kernel that is not ours.

    Raises:
      UserError: the compiler wrote no schedule.
    """
    if kernel.name not in ("tmsa_forward", "tmsa_backward"):
        return None
    dtype, shape = re.match(r"(\w+)\[([\d,]+)\]", kernel.operands[0]).groups()
    chip = chip_of(topology).device()
    batch, heads, tokens, width = map(int, shape.split(","))
    steps = batch // attention_kernel.examples_per_step(batch, tokens)
    bundles = _schedule(chip.example, dtype, batch // steps, tokens, width)[kernel.name]
    return max(
        bundles * -(-heads // chip.cores) * steps, kernel.bytes / chip.memory_bandwidth * chip.clock
    )


_known: dict[tuple, dict] = {}


def _schedule(topology: str, dtype: str, examples: int, tokens: int, width: int) -> dict[str, int]:
    """Return kernel → bundles of one grid step: a head of some examples.

    With so many tokens and channels.
    """
    key = topology, dtype, examples, tokens, width
    if key not in _known:
        with tempfile.TemporaryDirectory(prefix="diffit_jax_schedule_") as folder:
            orders = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            environment = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": orders}
            command = [sys.executable, "-m", "diffit_jax.preflight.schedule", *map(str, key)]
            root = str(Path(__file__).parents[2])
            result = subprocess.run(
                command, env=environment, capture_output=True, text=True, cwd=root
            )
            if result.returncode:
                last = (result.stderr.strip().splitlines() or ["it was killed"])[-1]
                raise UserError(
                    f"the attention kernel does not compile for {topology} ({last[:200]})"
                )
            _known[key] = {
                name: _bundles(Path(folder), name) for name in ("tmsa_forward", "tmsa_backward")
            }
    return _known[key]


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
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    device = topologies.get_topology_desc(topology, platform="tpu").devices[:1]
    whole = NamedSharding(Mesh(np.array(device), ("x",)), PartitionSpec())
    examples, tokens, width = map(int, sizes)
    # Several steps in both directions of the grid, as in a real one; five groups, so that no larger
    # group divides the batch.
    q = jax.ShapeDtypeStruct(
        (5 * examples, 2, tokens, width),
        {"bf16": jnp.bfloat16, "f32": jnp.float32}[dtype],
        sharding=whole,
    )
    strips = jax.ShapeDtypeStruct(
        (2, attention_kernel.BLOCK, 2 * tokens - attention_kernel.BLOCK),
        jnp.float32,
        sharding=whole,
    )

    def both(q, k, v, strips, gradient):
        out, pullback = jax.vjp(attention_kernel.attention, q, k, v, strips)
        return out, pullback(gradient)

    jax.jit(both).lower(q, q, q, strips, q).compile()


if __name__ == "__main__":
    _compile(*sys.argv[1:])
