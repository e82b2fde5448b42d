"""The verb `preflight`: what a config will do on a TPU pod, found out by the TPU's compiler on any
machine before the pod is rented.

The programs of training and sampling are compiled for a topology with their real shardings; nothing
is allocated. Every time here is the compiler's estimate, not a measurement; `tpu_program` says how
it is added up.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment
from diffit_jax.runtime import backend, files, parallel
from diffit_jax.sampling.sampler import copy_bytes, copy_fits, sampler_without_autoguidance
from diffit_jax.tpu.chips import CHIPS_PER_HOST, KNOWN_TOPOLOGIES, SLICE_BANDWIDTH, Chip, chip_of
from diffit_jax.tpu.cost import cost
from diffit_jax.tpu.program import parse
from diffit_jax.tpu.schedule import COMPILER_ENVIRONMENT, kernel_cycles
from diffit_jax.training.state import Opened, TrainState, open_experiment
from diffit_jax.training.watch import training_flops
from diffit_jax.verbs.train import lower_train_step

log = logging.getLogger(__name__)

DEAREST = 10
CACHE = (files.home() or Path(tempfile.gettempdir())) / ".cache/diffit_jax/preflight"
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
    chip, devices = chip_of(topology), topology_devices(topology, num_slices)
    config = ConfigDict(config.to_dict())
    if num_slices > 1:
        config.mesh = ConfigDict(dict(config.get("mesh") or {}))
        config.mesh.num_slices = num_slices
    with _for_another_machine():  # it may try the attention kernel
        opened = open_experiment(config, devices)
    experiment, mesh, state = opened.experiment, opened.mesh, opened.state
    settings, model = experiment.training, experiment.model
    chips = len(devices) // chip.devices
    heads = getattr(model, "num_heads", None)
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
            "remat": getattr(model, "remat", "none"),
            "num_heads": heads,
            "attention": models.attention_in_words(model, "tpu"),
            "sampled_without": "autoguidance"
            if experiment.sampling.guidance == "autoguidance"
            else "",
            "averages": 1 + len(state.power_emas),
            "jax": jax.__version__,
            "libtpu": libtpu_version(),
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
            compiled = _compile(
                lower_train_step(experiment, mesh, state, _batch(experiment, mesh)),
                topology,
                num_slices,
            )
            flops = training_flops(model) * settings.batch_size
            report["train"] = _figures(
                compiled, chip, chips, settings.batch_size, flops, crossing_s
            )
        else:
            report["sample"] = _price_sampling(
                opened, chip, chips, lambda lowered: _compile(lowered, topology, num_slices)
            )
        report["fits"] &= report[program]["fits"]
    if report.get("train", {}).get("fits"):
        report["memory"] |= _planned(report["memory"], report["train"]["memory"])
        report["run"] = _run(experiment, chips, report["train"]["step_s"])
    if heads:
        report["head_width"] = model.hidden_size // heads
    report["checkpoint_bytes"] = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    return report


def topology_devices(topology: str, num_slices: int = 1) -> Sequence[Any]:
    """Descriptions of the devices of a topology.

    Raises:
      UserError: no TPU compiler, or a topology that it does not know.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: bash launch/setup_env.sh test (or pip install -c "
            "constraints.txt libtpu)"
        )
    for name, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **more).devices
    except Exception as error:  # the compiler's own errors, of several types
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology {topology} is unknown to the TPU compiler ({reason}): use "
            f"{KNOWN_TOPOLOGIES}"
        ) from error


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
            changed.training.batch_size = int(value) * count_chips(topology, num_slices)
        elif name == "mesh":
            sizes = dict(part.split("=") for part in value.split("+"))
            changed.mesh = ConfigDict(
                {"data": -1} | {axis: int(size) for axis, size in sizes.items()}
            )
        else:
            changed.model[name] = int(value) if name == "num_heads" else value
    return changed


def count_chips(topology: str, num_slices: int = 1) -> int:
    """Chips of a topology, all slices together; errors as in `topology_devices`."""
    return len(topology_devices(topology, num_slices)) // chip_of(topology).devices


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
    device = topology_devices(chip.example)[:1]
    mesh = parallel.make_mesh(device)
    rows = []
    for m, k, n in ((8192, 8192, 8192), (8192, 1152, 4608), (8192, 4608, 1152)):
        a, b = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=parallel.replicated(mesh))
            for shape in ((m, k), (k, n))
        )
        with _for_another_machine():
            text = jax.jit(jnp.matmul).lower(a, b).compile().as_text()
        seconds = cost(parse(text), chip.memory_bandwidth / chip.clock).cycles / chip.clock
        share = 2 * m * k * n / seconds / chip.peak_flops
        rows.append({"product": f"{m} x {k} x {n}", "seconds": seconds, "share_of_peak": share})
    return rows


def libtpu_version() -> str:
    """Of the TPU compiler at hand."""
    return importlib.metadata.version("libtpu")


def _batch(experiment: Experiment, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, whatever the data set."""
    size, shape = experiment.training.batch_size, experiment.model.sample_shape
    latents = bool(experiment.data.autoencoder) or experiment.data.name == "imagenet_latents"
    sharding = parallel.batch_sharding(mesh)
    example = {"latent": jnp.float32} if latents else {"image": jnp.uint8}
    batch = {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)
        for name, dtype in example.items()
    }
    return batch | {"label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)}


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


def _compile(lowered: jax.stages.Lowered, topology: str, num_slices: int) -> dict[str, Any]:
    """What the compiler says about a program: its memory plan, and its cost in cycles; from the
    cache if it was asked before."""
    text = lowered.as_text()
    here = Path(__file__).parents[1]
    ours = b"".join(
        path.read_bytes()
        for path in (
            Path(__file__),
            *sorted(here.glob("tpu/*.py")),
            here / "models" / "attention_kernel.py",
        )
    )
    facts = f"{topology} {num_slices} {libtpu_version()} {jax.__version__} {text}"
    cached = CACHE / f"{hashlib.sha256(facts.encode() + ours).hexdigest()}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    answer = _ask(lowered, topology)
    cached.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(cached, json.dumps(answer).encode())
    return answer


def _ask(lowered: jax.stages.Lowered, topology: str) -> dict[str, Any]:
    started = time.monotonic()
    try:
        with _for_another_machine():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False} | _shortage(str(error))
    seconds = time.monotonic() - started
    chip = chip_of(topology).device()
    program = parse(compiled.as_text())
    total = cost(
        program, chip.memory_bandwidth / chip.clock, lambda kernel: kernel_cycles(kernel, topology)
    )
    kernels = sum(
        operation.cycles
        for operation in total.operations
        if operation.opcode == "custom-call" and not operation.estimated
    )
    plan = compiled.memory_analysis()
    return {
        "fits": True,
        "seconds_to_compile": seconds,
        "memory": {
            "arguments": plan.argument_size_in_bytes,
            "outputs": plan.output_size_in_bytes,
            "aliased": plan.alias_size_in_bytes,
            "temporaries": plan.temp_size_in_bytes,
            "program": plan.generated_code_size_in_bytes,
        },
        "compute_s": total.cycles / chip.clock,
        "kernels_s": kernels / chip.clock,
        "by_bytes_s": (total.cycles_by_bytes - kernels) / chip.clock,
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in sorted(total.collectives.items())
        },
        "async_copies": {
            "count": total.async_copies[0],
            "bytes": total.async_copies[1],
            "seconds": total.async_copies[1] / chip.memory_bandwidth,
        },
        "even_conditionals": total.even_conditionals,
        "unpriced_kernels": total.unpriced,
        "unknown_loops": total.unknown_loops,
        "dearest": [
            {
                "seconds": o.cycles / chip.clock,
                "times": o.times,
                "operation": _short(o.where) or o.name,
                "source": _relative(o.source),
            }
            for o in total.dearest(DEAREST)
        ],
    }


@contextlib.contextmanager
def _for_another_machine() -> Iterator[None]:
    """Programs compiled in this block are for devices that are not here.

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


def _shortage(message: str) -> dict[str, float]:
    """How much memory a program that does not fit needs, from the compiler's message."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
    size = r"([\d.]+)([KMGTP]?)"
    found = re.search(
        rf"temporaries \({size}\) exceeds available HBM \({size}\)", message
    ) or re.search(rf"Used {size} of {size} hbm", message)
    if not found:
        return {"reason": " ".join(message.split())[:200]}
    needed, available = float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return {"needed": needed, "available": available}


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
        sampler = sampler_without_autoguidance(
            experiment, opened.mesh, experiment.sampling.batch_size, copy
        )
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
    settings, shape = experiment.training, experiment.model.sample_shape
    per_image = math.prod(shape) * (4 if experiment.data.autoencoder else 1) + 4
    hours = settings.total_steps * step_s / 3600
    hosts = max(chips // CHIPS_PER_HOST, 1)
    return {
        "steps": settings.total_steps,
        "hours": hours,
        "chip_hours": hours * chips,
        "hosts": hosts,
        "data_bytes_per_s_per_host": settings.batch_size / step_s * per_image / hosts,
    }


def _short(where: str) -> str:
    """The end of an operation's path, from the last part of the network on."""
    steps = [
        step
        for step in where.split("/")
        if step not in ("while", "body", "closed_call", "checkpoint", "shard_map", "pallas_call")
    ]
    phase = "backward " if "transpose(" in where else ""
    again = "again " if "rematted_computation" in where else ""
    return again + phase + "/".join(steps[-2:])


def _relative(source: str) -> str:
    """`diffit_jax/models/blocks.py:69`, not where it is installed."""
    parts = source.split("/")
    for root in ("diffit_jax", "flax", "jax", "optax"):
        if root in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    return parts[-1]
