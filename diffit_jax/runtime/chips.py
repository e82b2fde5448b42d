"""What is known about TPU chips: the one table for utilisation and preflight.

Peak, bandwidth and links are those of Google's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
(Cloud TPU documentation, system architecture); links are all of a chip's together, in one
direction. `memory` is what the compiler says a program may use. Clocks are those at which the
compiler's cycles and the peak agree: peak = clock × 2 × 128² × matrix units × cores.
"""

import dataclasses

import jax

from diffit_jax.errors import UserError


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
        """The share of the chip that the compiler calls a device."""
        share = {
            name: getattr(self, name) / self.devices
            for name in ("peak_flops", "memory", "memory_bandwidth", "link_bandwidth")
        }
        return dataclasses.replace(self, cores=self.cores // self.devices, devices=1, **share)


_GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 1.05e9, 275e12, 30.5 * _GIB, 1228e9, 300e9, 2, 2, "v4:2x2x1", False),
    "v5e": Chip("TPU v5 lite", 1.5e9, 197e12, 15.75 * _GIB, 819e9, 200e9, 1, 1, "v5e:2x2", True),
    "v5p": Chip("TPU v5", 1.75e9, 459e12, 95.74 * _GIB, 2765e9, 600e9, 2, 1, "v5p:2x2x1", True),
    "v6e": Chip("TPU v6 lite", 1.75e9, 918e12, 31.25 * _GIB, 1640e9, 448e9, 1, 1, "v6e:2x2", False),
}
CHIPS_PER_HOST = 4  # of slices with several hosts
# Between slices, bytes per second for a chip: 100 Gbit/s for a host of four.
SLICE_BANDWIDTH = 12.5e9 / CHIPS_PER_HOST


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:16x16`.

    Raises:
      UserError: it is not in the table.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(f"--topology {topology} is unknown: use {KNOWN_TOPOLOGIES}")
    return CHIPS[name]


KNOWN_TOPOLOGIES = (
    "v4:2x2x1 … v4:8x8x16, v5e:2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16, v5p:2x2x1 … "
    "v5p:8x8x16, v6e like v5e"
)


# Dense bfloat16 FLOP/s of one device as jax counts them, from the makers' data sheets; by what
# `device_kind` begins with.
PEAK_FLOPS = {
    **{
        chip.device_kind: chip.peak_flops
        for chip in sorted(CHIPS.values(), key=lambda chip: -len(chip.device_kind))
    },
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None if it is not in the table."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None
    )
