"""The verb `preflight`: what a config will do on a TPU pod, found out by the TPU's compiler on any
machine before the pod is rented.

The programs of training and sampling are compiled for a topology with their real shardings; nothing
is allocated. Every time here is the compiler's estimate, not a measurement; `tpu_program` says how
it is added up.
"""

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.models.flops import training_flops
from diffit_jax.runtime import backend, parallel
from diffit_jax.sampling.sampler import copy_bytes, copy_fits, sampler_without_autoguidance
from diffit_jax.tpu import compiler
from diffit_jax.tpu.chips import CHIPS_PER_HOST, SLICE_BANDWIDTH, Chip, chip_of
from diffit_jax.tpu.cost import cost
from diffit_jax.tpu.program import parse
from diffit_jax.training.compiling import (
    Opened,
    batch_shapes,
    lower_train_step,
    open_experiment,
)
from diffit_jax.training.state import TrainState

log = logging.getLogger(__name__)

# What `--sweep` varies, and over which values where none are given; batch is per chip.
SWEEPS = {
    "batch": ("2", "4", "8", "16", "32"),
    "remat": ("none", "dots", "full"),
    "mesh": ("fsdp=1", "fsdp=4", "fsdp=16", "fsdp=64"),
    "num_heads": ("16", "9"),
}


@backend.pinned()
def preflight(
    config: ConfigDict,
    topology: str,
    num_slices: int = 1,
    programs: Sequence[str] = ("train", "sample"),
) -> dict[str, Any]:
    """Compiles the programs of a config for a topology and says what they need and take.

    Args:
      config: of the experiment; its data and weights need not be there.
      topology: chip and grid of a slice, such as `v5e:16x16`.
      num_slices: how many slices.
      programs: which of "train" and "sample".

    Returns:
      The report, JSON values only: `setting` (what was compiled), `memory` (bytes per chip),
      `fits`, `train` and `sample` (see `_figures`), and what follows for the whole run: `run`.
      `sample` is how this chip would draw; it has `copy_bytes`, of the copy of the parameters that
      each device holds meanwhile (0: none), and `alternative`, the figures with it if it holds
      none, and without it if it does. Times are in seconds, sizes in bytes, rates per second.

    Raises:
      UserError: an unknown topology, a mesh or batch that does not fit it, or no TPU compiler.
    """
    if not programs:
        raise UserError("--programs is empty: use train, sample or both")
    for program in programs:
        if program not in ("train", "sample"):
            raise UserError(f"--programs has {program!r}: use train, sample or both")
    chip, devices = chip_of(topology), compiler.topology_devices(topology, num_slices)
    config = ConfigDict(config.to_dict())
    if num_slices > 1:
        mesh_section = config.to_dict().get("mesh") or {}
        config.mesh = ConfigDict({**mesh_section, "num_slices": num_slices})
    with compiler.for_another_machine():  # it may try the attention kernel
        opened = open_experiment(config, devices)
    experiment, mesh, state = opened.experiment, opened.mesh, opened.state
    settings, model = experiment.training, experiment.model
    chips = len(devices) // chip.devices
    tuning = model.tuning
    report: dict[str, Any] = {
        "setting": {
            "topology": topology,
            "num_slices": num_slices,
            "chips": chips,
            "calibrated": chip.calibrated,
            "mesh": dict(mesh.shape),
            "batch_size": settings.batch_size,
            "batch_per_chip": settings.batch_size / chips,
            "accumulation": settings.accumulation,
            "remat": tuning.remat,
            "num_heads": tuning.num_heads,
            "attention": models.attention_in_words(model, "tpu"),
            "sampled_without": "autoguidance"
            if experiment.sampling.guidance == "autoguidance"
            else "",
            "averages": 1 + len(state.power_emas),
            "jax": jax.__version__,
            "libtpu": compiler.libtpu_version(),
        },
        "memory": {"limit": chip.memory / chip.devices} | _held(state),
        "fits": True,
    }
    # Every device's share of the gradient crosses from slice to slice, in bfloat16, there and back.
    crossing_s = (
        report["memory"]["parameters"] / (SLICE_BANDWIDTH / chip.devices) if num_slices > 1 else 0.0
    )
    for program in programs:
        log.info("compiling the %s step for %d chips", program, chips)
        if program == "train":
            compiled = compiler.compile_for(
                lower_train_step(experiment, mesh, state, batch_shapes(experiment, mesh)),
                topology,
                num_slices,
            )
            flops = training_flops(model) * settings.batch_size
            report["train"] = _figures(
                compiled, chip, chips, settings.batch_size, flops, crossing_s
            )
        else:
            report["sample"] = _price_sampling(
                opened,
                chip,
                chips,
                lambda lowered: compiler.compile_for(lowered, topology, num_slices),
            )
        report["fits"] &= report[program]["fits"]
    if report.get("train", {}).get("fits"):
        report["memory"] |= _planned(report["memory"], report["train"]["memory"])
        report["run"] = _run(experiment, chips, report["train"]["step_s"])
    if tuning.head_width:
        report["head_width"] = tuning.head_width
    report["checkpoint_bytes"] = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    return report


def vary(
    config: ConfigDict, topology: str, num_slices: int, settings: Mapping[str, str]
) -> ConfigDict:
    """A copy of a config with some settings changed.

    Args:
      config, topology, num_slices: as for `preflight`.
      settings: name in `SWEEPS` → value as on the command line: "8" images per chip,
        "fsdp=16+tensor=2" for the mesh.
    """
    changed = ConfigDict(config.to_dict())
    for name, value in settings.items():
        if name == "batch":
            changed.training.batch_size = int(value) * compiler.count_chips(topology, num_slices)
        elif name == "mesh":
            sizes = dict(part.split("=") for part in value.split("+"))
            changed.mesh = ConfigDict(
                {"data": -1} | {axis: int(size) for axis, size in sizes.items()}
            )
        else:
            changed.model[name] = int(value) if name == "num_heads" else value
    return changed


def sweep(
    config: ConfigDict, topology: str, num_slices: int, dimensions: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """Reports of the training step for all combinations of settings, one by one.

    Args:
      config, topology, num_slices: as for `preflight`.
      dimensions: name in `SWEEPS` → values, see `parse_sweep`.

    Yields:
      The report of each, with `varied`: its settings; or {"varied": …, "error": why it cannot be}.
    """
    for values in itertools.product(*dimensions.values()):
        varied = dict(zip(dimensions, values, strict=True))
        changed = vary(config, topology, num_slices, varied)
        try:
            yield preflight(changed, topology, num_slices, programs=["train"]) | {"varied": varied}
        except UserError as error:
            yield {"varied": varied, "fits": False, "error": str(error)}


def parse_sweep(text: str) -> dict[str, Sequence[str]]:
    """`batch,remat` or `batch=4/8/16,mesh=fsdp=4/fsdp=16` → name → values.

    Raises:
      UserError: an unknown name or a value that cannot be.
    """
    dimensions = {}
    for part in text.split(","):
        name, _, values = part.strip().partition("=")
        if name not in SWEEPS:
            raise UserError(
                f"--sweep has {name!r}: use {', '.join(SWEEPS)}, with values as in batch=4/8/16 or "
                "mesh=fsdp=4/fsdp=16"
            )
        dimensions[name] = values.split("/") if values else SWEEPS[name]
        numbers = {
            "batch": r"\d+",
            "num_heads": r"\d+",
            "mesh": r"(data|fsdp|tensor)=-?\d+(\+(data|fsdp|tensor)=-?\d+)*",
        }.get(name, r"\w+")
        for value in dimensions[name]:
            if not re.fullmatch(numbers, value):
                raise UserError(
                    f"--sweep has {name}={value}: write values as in batch=4/8/16 or "
                    "mesh=fsdp=4/fsdp=16+tensor=2"
                )
    return dimensions


def calibrate(topology: str) -> list[dict[str, Any]]:
    """The estimate for large bfloat16 matrix products against the peak: how far the compiler's
    estimates can be trusted on a chip.

    Returns:
      For a product of 8192³ and two of the XL/2 network's: `product`, `seconds` and
      `share_of_peak`.
    """
    chip = chip_of(topology).device()
    device = compiler.topology_devices(chip.example)[:1]
    mesh = parallel.make_mesh(device)
    rows = []
    for m, k, n in ((8192, 8192, 8192), (8192, 1152, 4608), (8192, 4608, 1152)):
        a, b = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=parallel.replicated(mesh))
            for shape in ((m, k), (k, n))
        )
        with compiler.for_another_machine():
            text = jax.jit(jnp.matmul).lower(a, b).compile().as_text() or ""
        seconds = cost(parse(text), chip.memory_bandwidth / chip.clock).cycles / chip.clock
        share = 2 * m * k * n / seconds / chip.peak_flops
        rows.append({"product": f"{m} x {k} x {n}", "seconds": seconds, "share_of_peak": share})
    return rows


def _held(state: TrainState) -> dict[str, int]:
    """Bytes that each device holds between steps, by what they are for."""
    parts = {
        "parameters": (state.params, state.constants),
        "optimizer": state.opt_state,
        "ema": state.ema,
    }
    parts |= {f"power_ema_{index}": one for index, one in enumerate(state.power_emas)}
    return {name: sum(map(_bytes_on_device, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _planned(memory: Mapping[str, float], plan: Mapping[str, int]) -> dict[str, float]:
    """What the compiler plans beside what is held: activations and other temporaries, and the
    program itself."""
    held = sum(size for name, size in memory.items() if name != "limit")
    batch = plan["arguments"] - held
    total = (
        plan["arguments"]
        + plan["outputs"]
        - plan["aliased"]
        + plan["temporaries"]
        + plan["program"]
    )
    planned = {
        "batch and padding": max(batch, 0),
        "activations": plan["temporaries"],
        "program": plan["program"],
    }
    return planned | {"total": total, "headroom": memory["limit"] - total}


def _figures(
    compiled: Mapping[str, Any],
    chip: Chip,
    chips: int,
    images: int,
    flops: float,
    between_slices_s: float,
) -> dict[str, Any]:
    """A program's report: what the compiler said, and what follows from it.

    `step_s` is the largest of `compute_s`, `collectives_s` and `between_slices_s`, since they can
    run at the same time; `serial_s` is their sum.
    """
    if not compiled["fits"]:
        return dict(compiled)
    moved = sum(entry["bytes"] for entry in compiled["collectives"].values())
    collectives_s = moved / (chip.link_bandwidth / chip.devices)
    times = compiled["compute_s"], collectives_s, between_slices_s
    step_s = max(times)
    return dict(compiled) | {
        "images": images,
        "collectives_s": collectives_s,
        "step_s": step_s,
        "between_slices_s": between_slices_s,
        "serial_s": sum(times),
        "images_per_s_per_chip": images / step_s / chips,
        "flops": flops,
        "mfu": flops / step_s / chips / chip.peak_flops,
    }


def _price_sampling(
    opened: Opened, chip: Chip, chips: int, compiled: Callable[[jax.stages.Lowered], dict[str, Any]]
) -> dict[str, Any]:
    """The figures of drawing a batch as the chip would (autoguidance's second network is not known
    here; the report says so)."""
    experiment, variables = opened.experiment, opened.state.ema_variables
    size = copy_bytes(experiment.model, variables)
    wanted = size > 0 and copy_fits(size, chip.memory / chip.devices)
    priced = {}
    for copy in {wanted, size > 0 and not wanted}:
        sampler = sampler_without_autoguidance(experiment, opened.mesh, copy=copy)
        flops = 2 * sampler.multiply_adds(variables)
        figures = _figures(
            compiled(sampler.lower(variables)), chip, chips, sampler.batch_size, flops, 0.0
        )
        if figures["fits"]:
            figures["hours_for_50000"] = 50_000 / figures["images_per_s_per_chip"] / chips / 3600
        priced[copy] = figures | {"copy_bytes": size if copy else 0}
    alternative = {"alternative": priced[not wanted]} if (not wanted) in priced else {}
    return priced[wanted] | alternative


def _run(experiment: Experiment, chips: int, step_s: float) -> dict[str, float]:
    settings = experiment.training
    example = experiment.space.batch(1, experiment.model.sample_shape).values()
    per_image = sum(leaf.size * leaf.dtype.itemsize for leaf in example)
    hours = settings.total_steps * step_s / 3600
    hosts = max(chips // CHIPS_PER_HOST, 1)
    return {
        "steps": settings.total_steps,
        "hours": hours,
        "chip_hours": hours * chips,
        "hosts": hosts,
        "data_bytes_per_s_per_host": settings.batch_size / step_s * per_image / hosts,
    }
