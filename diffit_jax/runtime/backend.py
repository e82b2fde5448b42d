"""The machine that jax computes on: devices, numerics, memory that runs out, rates of chips."""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator

import jax

from diffit_jax.errors import OutOfMemory, UserError, one_line

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

log = logging.getLogger(__name__)


def devices() -> list[jax.Device]:
    """Return the devices of all processes.

    Raises:
      UserError: there is no such platform here, or another process holds it.
    """
    try:
        return jax.devices()
    except (
        RuntimeError,
        AssertionError,
        ValueError,
        KeyError,
    ) as error:  # AssertionError: CUDA's plugin is not installed
        text = one_line(error)
        if re.search(
            r"(?i)already in use|in use by|libtpu_lockfile|lockfile|device or resource busy", text
        ):
            raise UserError(
                f"the devices are held by another process ({text[:160]}): end it, or wait for it"
            ) from error
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        if wanted:
            names = "cpu, tpu or cuda, in small letters"
            remedy = (
                f"unset JAX_PLATFORMS, set it to a platform of this machine ({names}), or "
                "install jax for it"
            )
            raise UserError(
                f"JAX_PLATFORMS is {wanted}, which cannot be used here "
                f"({text[:160] or 'it is not installed'}): {remedy}"
            ) from error
        raise UserError(
            f"no device can be used ({text[:200]}): JAX_PLATFORMS=cpu computes without one"
        ) from error


_TRANSFER_GUARDS = (
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)


@contextlib.contextmanager
def reproducible_numerics() -> Iterator[None]:
    """Compute the same numbers whatever modes of jax the environment has switched on.

    A context manager and decorator: 32 bits, threefry's partitionable form (a random number does
    not depend on how an array is divided), and the usual promotion of types. The precision of
    matrix products is left alone: see `matmul_precision`.

    Raises:
      UserError: a mode in which programs are not compiled, or in which this package's cannot be.
    """
    config = jax.config
    modes = {
        "JAX_DISABLE_JIT": config.jax_disable_jit,
        "JAX_NUMPY_RANK_PROMOTION": config.jax_numpy_rank_promotion == "raise",
        "JAX_RANDOM_SEED_OFFSET": bool(getattr(config, "jax_random_seed_offset", 0)),
        "JAX_NO_EXECUTION": bool(getattr(config, "jax_no_execution", False)),
        **{
            name.upper(): str(getattr(config, name, None)).startswith("disallow")
            for name in _TRANSFER_GUARDS
        },
    }
    for name, switched_on in modes.items():
        if switched_on:
            raise UserError(
                f"jax's mode {name} is switched on, which changes or stops this package's "
                "programs: unset it"
            )
    with enable_x64(False), jax.threefry_partitionable(True), jax.numpy_dtype_promotion("standard"):
        yield


def matmul_precision() -> str:
    """Return how precisely float32 matrix products are computed.

    "default" is the platform's (bfloat16 on TPUs, TF32 on many GPUs). It is jax's own setting: the
    variable JAX_DEFAULT_MATMUL_PRECISION, or `jax.default_matmul_precision`.
    """
    return str(jax.config.jax_default_matmul_precision or "default")


@contextlib.contextmanager
def explain_oom(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error, in compiling or running, into one line.

    Args:
      remedy: what needs less memory.

    Raises:
      OutOfMemory: memory ran out in the block.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = one_line(error)
        if not isinstance(error, MemoryError) and not re.search(
            r"(?i)RESOURCE_EXHAUSTED|out of memory|ran out of|allocation failure|\bOOM\b", text
        ):
            raise
        asked = re.search(r"(?i)(allocat\w* [\d.,]+ ?\w*|[\d.,]+ ?[KMGT]i?B?\b[^.]*)", text)
        said = asked[0][:120] if asked else type(error).__name__
        raise OutOfMemory(f"memory ran out ({said}): {remedy}") from error


TRAINING_OOM_HINT = (
    "lower training.batch_size, raise training.accumulation, set model.remat to full "
    "(latent_diffit), or divide the parameters by mesh.fsdp"
)
SAMPLING_OOM_HINT = (
    "lower sampling.batch_per_device (--batch_per_device), or divide the parameters by mesh.fsdp"
)


# --- What is known about TPU chips: the one table for utilisation and preflight.
#
# Peak, bandwidth and links are those of Google's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"
# and "TPU7x (Ironwood)" (Cloud TPU documentation, system architecture); links are all of a chip's
# together, in one direction. `memory` is what the compiler says a program may use. Clocks are those
# at which the compiler's cycles and the peak agree: peak = clock × 2 × 128² × matrix units × cores.


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      device_kind: how jax calls it.
      clock: cycles per second.
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes of HBM.
      memory_bandwidth: of HBM, bytes per second.
      link_bandwidth: of all links to other chips together, bytes per second.
      cores: tensor cores.
      devices: into how many devices the compiler divides a chip. With 1, its cores share a program.
      example: a small topology that the compiler knows.
      calibrated: whether its estimates come near the peak for large matrix products, as they do on
        the real chip (`calibrate`).
    """

    device_kind: str
    clock: float
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    cores: int
    devices: int
    example: str
    calibrated: bool

    def device(self) -> "Chip":
        """Return the part of the chip that the compiler calls a device."""
        per_device = {
            name: getattr(self, name) / self.devices
            for name in ("peak_flops", "memory", "memory_bandwidth", "link_bandwidth")
        }
        return dataclasses.replace(self, cores=self.cores // self.devices, devices=1, **per_device)


_GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 1.05e9, 275e12, 30.5 * _GIB, 1228e9, 300e9, 2, 2, "v4:2x2x1", False),
    "v5e": Chip("TPU v5 lite", 1.5e9, 197e12, 15.75 * _GIB, 819e9, 200e9, 1, 1, "v5e:2x2", True),
    "v5p": Chip("TPU v5", 1.75e9, 459e12, 95.74 * _GIB, 2765e9, 600e9, 2, 1, "v5p:2x2x1", True),
    "v6e": Chip("TPU v6 lite", 1.75e9, 918e12, 31.25 * _GIB, 1640e9, 448e9, 1, 1, "v6e:2x2", False),
    "tpu7x": Chip("TPU7x", 2.2e9, 2307e12, 189.5 * _GIB, 7380e9, 600e9, 2, 2, "tpu7x:2x2x1", False),
}
CHIPS_PER_HOST = 4  # of slices with several hosts
# Between slices, bytes per second for a chip: 100 Gbit/s for a host of four.
SLICE_BANDWIDTH = 12.5e9 / CHIPS_PER_HOST


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as `v5e:16x16`.

    Raises:
      UserError: it is not in the table.
    """
    name = topology.partition(":")[0].lower()
    if name not in CHIPS:
        raise UserError(f"--topology {topology} is unknown: use {KNOWN_TOPOLOGIES}")
    return CHIPS[name]


KNOWN_TOPOLOGIES = (
    "v4:2x2x1 … v4:8x8x16, v5e:2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16, v5p:2x2x1 … "
    "v5p:8x8x16, v6e like v5e, tpu7x:2x2x1 …"
)


# Dense bfloat16 FLOP/s of one device as jax counts them, from the makers' data sheets; by what
# `device_kind` begins with.
PEAK_FLOPS = {
    **{
        chip.device_kind: chip.peak_flops
        for chip in sorted(CHIPS.values(), key=lambda chip: -len(chip.device_kind))
    },
    CHIPS["tpu7x"].device_kind: CHIPS["tpu7x"].device().peak_flops,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Return dense bfloat16 FLOP/s of a device, None if it is not in the table."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None
    )
