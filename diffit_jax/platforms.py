"""What differs between CPUs, GPUs and TPUs, in one table, whose entries tests may replace."""

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_GOOGLE = "0x1ae0"  # the vendor of TPUs on a machine's PCI bus


def _skip_libtpu() -> None:
    """Take the CPU at once where libtpu is installed for its compiler, and there is no TPU.

    Else it prints lines that read as errors when jax looks for devices. Nothing is changed where
    somebody has chosen a platform, or jax has a plugin for other devices.
    """
    chosen = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS")
    if chosen or importlib.util.find_spec("libtpu") is None:
        return
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if not plugins and not any(vendor.read_text().strip() == _GOOGLE for vendor in vendors):
        jax.config.update("jax_platforms", "cpu")


_skip_libtpu()


@dataclasses.dataclass(frozen=True)
class Platform:
    """Decisions for a kind of device.

    Attributes:
      auto_attention: what `attention: auto` means, in `backends.BACKENDS`.
      auto_reason: why, for people.
      own_attention: whether "auto" takes XLA's attention with a backward pass of our own.
      attentions: ways to compute attention that a matrix of benchmarks tries.
      compiles_kernel: whether the Pallas kernel is compiled; elsewhere it is emulated, and slow.
      has_cudnn: whether cuDNN's attention is there.
      dense_tiles: whether windows are attended to together, masked to themselves: a TPU's vector
        unit holds more tokens than a window has.
      repeats_fusions: whether XLA fuses a computation into each of its consumers, and repeats it.
      tiles_last_axes: whether the two last axes of an array lie in tiles.
      resampling: precision of the products of an augmentation. On TPUs "high" is three products of
        bfloat16 in place of six: 1.5e-5 off the golden images of EDM's code, by emulation.
        (Elsewhere that name would mean less.)
      donates_from: parameters from which a step takes over the memory of its state. On CPUs memory
        is not scarce, and XLA's in-place updates make a small network's step 1.3 times as long.
      skips_by_branch: whether a step that does leaves an update out by a branch: a choice between
        the old and the new state reads and writes all of it once more.
      once: options of the compiler for a program that runs once. To optimise the initialisation of
        a network less makes the same numbers; of the digits' it takes 10 CPU seconds, not 33.
      decodes_one: whether an autoencoder works through examples one by one: on a CPU more would not
        be faster, and sums would come in another order; convolutions in a loop are over fifteen
        times as slow there.
      grid_per_device: samples of a grid that a device draws at once, so that a signal is heard
        soon; 0: as many as `sampling.batch_per_device` says.
      sums_by_slices: whether sums over the bits of a large array are taken slice by slice: where a
        cast of bits is written to memory before its sum is taken.
      core_flops: of training, by a core of the host, where that is what computes: 9 to 11e9 on two
        cores of 2.25 GHz, by networks here; 0: not known, another device computes.
    """

    auto_attention: str = "xla"
    auto_reason: str = "auto, not on a TPU"
    own_attention: bool = False
    attentions: tuple[str, ...] = ("xla",)
    compiles_kernel: bool = False
    has_cudnn: bool = False
    dense_tiles: bool = False
    repeats_fusions: bool = False
    tiles_last_axes: bool = False
    resampling: str = "highest"
    donates_from: float = 0
    skips_by_branch: bool = False
    once: dict[str, Any] | None = None
    decodes_one: bool = False
    grid_per_device: int = 0
    sums_by_slices: bool = False
    core_flops: float = 0


PLATFORMS = {
    "cpu": Platform(
        own_attention=True,
        repeats_fusions=True,
        donates_from=2e7,
        skips_by_branch=True,
        once={"xla_backend_optimization_level": 1},
        decodes_one=True,
        grid_per_device=4,
        sums_by_slices=True,
        core_flops=1e10,
    ),
    "gpu": Platform(
        auto_reason="auto; in bfloat16 model.attention=cudnn may be faster",
        attentions=("xla", "cudnn"),
        has_cudnn=True,
    ),
    "tpu": Platform(
        auto_attention="pallas",
        auto_reason="the kernel serves this network",
        attentions=("xla", "pallas"),
        compiles_kernel=True,
        dense_tiles=True,
        tiles_last_axes=True,
        resampling="high",
    ),
}
_OTHERS = {"gpu": ("cuda", "rocm")}  # names that devices and lowering rules have for it


def of(name: str) -> Platform:
    """Return the entry of a platform, by the name that devices and lowering rules have for it.

    For an unknown platform, an entry that decides nothing.
    """
    known = {other: family for family, others in _OTHERS.items() for other in others}
    return PLATFORMS.get(known.get(name, name), Platform())


def of_mesh(mesh: jax.sharding.Mesh) -> Platform:
    """Return the entry of a mesh's devices."""
    return of(mesh.devices.flat[0].platform)


def where(decision: str, function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Compute `function(*arrays)` on platforms with this `decision`, the arrays elsewhere."""
    names = [name for name, entry in PLATFORMS.items() if getattr(entry, decision)]
    names = [one for name in names for one in _OTHERS.get(name, (name,))]
    branches = {name: lambda *xs: tuple(function(*xs)) for name in names}
    return jax.lax.platform_dependent(*arrays, **branches, default=lambda *xs: xs)
