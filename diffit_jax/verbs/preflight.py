"""The verb `preflight`: what a config will do on a TPU pod, found out by the TPU's compiler on any
machine before the pod is rented.

The programs of training and sampling are compiled for a topology with their real shardings; nothing
is allocated. Every time here is the compiler's estimate, not a measurement; `tpu_program` says how
it is added up.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment import Experiment, build
from diffit_jax.models.model import training_flops
from diffit_jax.runtime import backend, parallel, ranges
from diffit_jax.tpu import compiler, report
from diffit_jax.tpu.chips import CHIPS_PER_HOST, SLICE_BANDWIDTH, Chip, chip_of
from diffit_jax.tpu.cost import cost
from diffit_jax.tpu.figures import (
    Calibration,
    Compiled,
    Held,
    Memory,
    Product,
    Report,
    Run,
    Setting,
    Step,
    Sweep,
    TooLarge,
    Trial,
)
from diffit_jax.tpu.program import parse
from diffit_jax.training.state import Opened, TrainState, open_experiment
from diffit_jax.training.step import batch_shapes, lower_train_step
from diffit_jax.verbs.pricing import price_chain, price_evaluating, price_sampling

log = logging.getLogger(__name__)

CHAIN = ("encode", "decode", "inception")
# What `--sweep` varies, and over which values where none are given; batch is per chip.
SWEEPS = {
    "batch": ("2", "4", "8", "16", "32"),
    "remat": ("none", "dots", "full"),
    "mesh": ("fsdp=1", "fsdp=4", "fsdp=16", "fsdp=64"),
    "num_heads": ("16", "9"),
}
_AXES = r"(data|fsdp|tensor)=-?\d+"
_WRITTEN = {"batch": r"\d+", "num_heads": r"\d+", "mesh": rf"{_AXES}(\+{_AXES})*", "remat": r"\w+"}


@backend.pinned()
def preflight(
    config: ConfigDict, topology: str, num_slices: int = 1, programs: Sequence[str] | None = None
) -> Report:
    """Compiles the programs of a config for a topology and says what they need and take.

    Args:
      config: of the experiment; its data and weights need not be there.
      topology: chip and grid of a slice, such as `v5e:16x16`.
      num_slices: how many slices.
      programs: which of "train" and "sample", and of `CHAIN`; None: these two, and those of its
        evaluations if it has a section `evaluation`.

    Returns:
      What they need and take; `sample` is how this chip would draw.

    Raises:
      UserError: an unknown topology, a mesh or batch that does not fit it, or no TPU compiler.
    """
    programs = _chosen(config, programs)
    chip, devices = chip_of(topology), compiler.topology_devices(topology, num_slices)
    config = ConfigDict(config.to_dict())
    if num_slices > 1:
        mesh_section = config.to_dict().get("mesh") or {}
        config.mesh = ConfigDict({**mesh_section, "num_slices": num_slices})
    with compiler.for_another_machine():  # it may try the attention kernel
        opened = open_experiment(config, devices)
    experiment, state = opened.experiment, opened.state
    chips = len(devices) // chip.devices
    held = _held(state)

    compiled = functools.partial(compiler.compile_for, topology=topology, num_slices=num_slices)
    train = sample = chain = None
    if "train" in programs:
        log.info("compiling the train step for %d chips", chips)
        train = _price_training(opened, chip, chips, compiled, num_slices > 1)
    if "sample" in programs:
        log.info("compiling the sample step for %d chips", chips)
        sample = price_sampling(opened, chip, chips, compiled)
    if chained := [program for program in CHAIN if program in programs]:
        log.info("compiling %s for %d chips", ", ".join(chained), chips)
        chain = price_chain(
            opened, chip=chip, chips=chips, compiled=compiled, programs=chained, sampling=sample
        )
    evaluating = price_evaluating(
        opened, chip=chip, chips=chips, state_bytes=held.total, sampling=sample, chain=chain
    )
    fitting = train if isinstance(train, Step) else None
    parts = train, sample and sample.batch, chain, evaluating
    return Report(
        setting=_setting(opened, topology, num_slices, chip, chips),
        fits=all(one.fits for one in parts if one is not None),
        memory=Memory.of(chip.memory / chip.devices, held, fitting and fitting.memory),
        checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        train=train,
        sample=sample,
        chain=chain,
        evaluating=evaluating,
        run=fitting and _run(experiment, chips, fitting.step_s),
    )


def _price_training(
    opened: Opened,
    chip: Chip,
    chips: int,
    compiled: Callable[[jax.stages.Lowered], Compiled | TooLarge],
    several_slices: bool,
) -> Step | TooLarge:
    """The update; arguments as of `price_sampling`."""
    experiment = opened.experiment
    batch = batch_shapes(experiment, opened.mesh)
    answer = compiled(lower_train_step(opened, opened.state, batch))
    if not isinstance(answer, Compiled):
        return answer
    size = experiment.training.batch_size
    # Every device's share of the gradient crosses from slice to slice, in bfloat16, there and back.
    crossing_s = _held(opened.state).parameters / (SLICE_BANDWIDTH / chip.devices)
    return Step.of(
        answer,
        chip,
        chips,
        images=size,
        flops=training_flops(experiment.model) * size,
        between_slices_s=crossing_s if several_slices else 0.0,
    )


def _chosen(config: ConfigDict, programs: Sequence[str] | None) -> Sequence[str]:
    """The programs that are asked for, or of a config."""
    known = ("train", "sample", *CHAIN)
    if programs is None:
        experiment = build(config)
        of_evaluations = ["decode"] * bool(experiment.data.autoencoder) + ["inception"]
        return [*known[:2], *(of_evaluations if experiment.evaluation.steps else ())]
    if not programs:
        raise UserError(f"--programs is empty: use some of {', '.join(known)}")
    for program in programs:
        if program not in known:
            raise UserError(f"--programs has {program!r}: use some of {', '.join(known)}")
    return programs


def with_batch(config: ConfigDict, topology: str, num_slices: int, per_chip: int) -> ConfigDict:
    """A copy of a config with this many images per chip of a topology in a batch."""
    return _vary(config, topology, num_slices, {"batch": str(per_chip)})


def parse_sweep(text: str) -> dict[str, list[str]]:
    """`batch,remat` or `batch=4,8,16,mesh=fsdp=4,fsdp=16+tensor=2` → values by names in `SWEEPS`.

    Raises:
      UserError: an unknown name or a value that cannot be.
    """

    def reader(name: str) -> Callable[[str], str]:
        def read(value: str) -> str:
            if not re.fullmatch(_WRITTEN[name], value):
                raise ValueError(value)
            return value

        return read

    wanted = "write values as in batch=4,8,16 or mesh=fsdp=4,fsdp=16+tensor=2"
    known = {
        name: ranges.Swept(reader(name), wanted, bare=True, nested=name == "mesh")
        for name in SWEEPS
    }
    return ranges.parse_sweep(text, known)


def sweep(
    config: ConfigDict,
    topology: str,
    num_slices: int,
    settings: Mapping[str, Sequence[str]],
    show: Callable[[str], None] = print,
) -> Sweep:
    """The training step for all combinations of settings, compared.

    Args:
      config, topology, num_slices: as for `preflight`.
      settings: of `parse_sweep`; where there are no values, those of `SWEEPS`.
      show: called with each line of the table when it is known, and with the best one at the end.

    Raises:
      UserError: a value that cannot be.
    """
    dimensions = {name: values or SWEEPS[name] for name, values in settings.items()}
    trials = []
    show(report.sweep_header(dimensions))
    for varied in ranges.combinations(dimensions):
        changed = _vary(config, topology, num_slices, varied)
        try:
            trial = Trial(varied, preflight(changed, topology, num_slices, programs=["train"]))
        except UserError as error:
            trial = Trial(varied, error=str(error))
        show(report.sweep_row(trial))
        trials.append(trial)
    done = Sweep(trials)
    show("\n" + (report.sweep_row(done.best, best=True) if done.best else "none fits"))
    return done


def _vary(
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


def calibrate(topology: str) -> Calibration:
    """The estimate for large bfloat16 matrix products against the peak: how far the compiler's
    estimates can be trusted on a chip. Asked of a product of 8192³ and two of the XL/2 network's.
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
        rows.append(Product(f"{m} x {k} x {n}", seconds, share))
    return Calibration(rows)


def _setting(opened: Opened, topology: str, num_slices: int, chip: Chip, chips: int) -> Setting:
    experiment, model = opened.experiment, opened.experiment.model
    settings = experiment.training
    return Setting(
        topology=topology,
        num_slices=num_slices,
        chips=chips,
        calibrated=chip.calibrated,
        mesh=dict(opened.mesh.shape),
        batch_size=settings.batch_size,
        batch_per_chip=settings.batch_size / chips,
        accumulation=settings.accumulation,
        remat=model.remat,
        num_heads=model.heads[0],
        head_width=model.heads[1],
        attention=models.attention_in_words(model, "tpu"),
        sampled_without="autoguidance" if experiment.sampling.guidance.needs_weaker else "",
        averages=1 + len(opened.state.power_emas),
        jax=jax.__version__,
        libtpu=compiler.libtpu_version(),
    )


def _held(state: TrainState) -> Held:
    """What each device holds between steps, by what it is for."""

    def on_device(*trees: Any) -> int:
        return sum(map(_bytes_on_device, jax.tree.leaves(trees)))

    return Held(
        parameters=on_device(state.params, state.constants),
        optimizer=on_device(state.opt_state),
        ema=on_device(state.ema),
        power_emas=[on_device(one) for one in state.power_emas],
    )


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _run(experiment: Experiment, chips: int, step_s: float) -> Run:
    settings = experiment.training
    example = experiment.space.batch(1, experiment.model.sample_shape).values()
    per_image = sum(leaf.size * leaf.dtype.itemsize for leaf in example)
    hours = settings.total_steps * step_s / 3600
    hosts = max(chips // CHIPS_PER_HOST, 1)
    return Run(
        steps=settings.total_steps,
        hours=hours,
        chip_hours=hours * chips,
        hosts=hosts,
        data_bytes_per_s_per_host=settings.batch_size / step_s * per_image / hosts,
    )
