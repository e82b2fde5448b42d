"""The verb `preflight`: memory and time of a config on a TPU pod, before the pod is rented.

The programs of training and sampling, and of the networks between images, latents and scores, are
compiled by the TPU compiler, on any machine, for a topology with their real shardings; nothing is
allocated. Every time here is the compiler's estimate, not a measurement; `preflight.cost` says how
it is added up.
"""

import dataclasses
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
from diffit_jax.evaluation.in_training import kinds
from diffit_jax.experiment.config import Experiment, build
from diffit_jax.models.model import traced_multiply_adds
from diffit_jax.preflight import compiler, report
from diffit_jax.preflight.chain import CHAIN, Chain, bytes_of
from diffit_jax.preflight.cost import cost, parse
from diffit_jax.preflight.figures import (
    Calibration,
    Compiled,
    EvalCost,
    MatmulEstimate,
    Memory,
    PipelineCost,
    Report,
    RunCost,
    SamplingCost,
    SamplingPlan,
    Setting,
    StateMemory,
    Step,
    Sweep,
    SweepPoint,
    TooLarge,
)
from diffit_jax.run.objective import flops_per_image
from diffit_jax.run.representation import arrays_beside
from diffit_jax.run.state import Setup, TrainState, setup_experiment
from diffit_jax.runtime import backend, console, parallel
from diffit_jax.runtime.backend import CHIPS_PER_HOST, SLICE_BANDWIDTH, Chip, chip_of
from diffit_jax.sampling.analysis import analyse
from diffit_jax.sampling.sampler import batch_shapes as seeds_and_labels
from diffit_jax.sampling.sampler import copy_bytes, copy_fits, sampler_without_autoguidance
from diffit_jax.training.step import batch_shapes, lower_train_step

log = logging.getLogger(__name__)

# What `--sweep` varies, and over which values where none are given; batch is per chip.
SWEEPS = {
    "batch": ("2", "4", "8", "16", "32"),
    "remat": ("none", "dots", "full"),
    "mesh": ("fsdp=1", "fsdp=4", "fsdp=16", "fsdp=64"),
    "num_heads": ("16", "9"),
}
_AXES = r"(data|fsdp|tensor)=-?\d+"
_WRITTEN = {"batch": r"\d+", "num_heads": r"\d+", "mesh": rf"{_AXES}(\+{_AXES})*", "remat": r"\w+"}


@backend.reproducible_numerics()
def preflight(
    config: ConfigDict, *, topology: str, num_slices: int = 1, programs: Sequence[str] | None = None
) -> Report:
    """Compile the programs of a config for a topology and report their memory and time.

    Args:
      config: of the experiment; its data and weights need not be there.
      topology: chip and grid of a slice, such as `v5e:16x16`.
      num_slices: how many slices.
      programs: which of "train", "sample" and "analyse", and of `CHAIN`; None: the first two, and
        those of its evaluations if it has a section `evaluation`.

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
        setup = setup_experiment(config, devices)
    experiment, state = setup.experiment, setup.state
    chips, held = len(devices) // chip.devices, _held(state)

    compiled = functools.partial(compiler.compile_for, topology=topology, num_slices=num_slices)
    train = sample = chain = analysis = None
    if "train" in programs:
        log.info("compiling the train step for %d chips", chips)
        # Each device's part of the gradient crosses slices in bfloat16, there and back.
        crossing_s = held.parameters / (SLICE_BANDWIDTH / chip.devices) * (num_slices > 1)
        train = _price_training(setup, chip, chips, compiled, crossing_s)
    if "sample" in programs:
        log.info("compiling the sample step for %d chips", chips)
        sample = price_sampling(setup, chip, chips, compiled)
    if "analyse" in programs:
        log.info("compiling an analysis for %d chips", chips)
        analysis = price_analysis(setup, chip, chips, compiled)
    if chained := [program for program in CHAIN if program in programs]:
        log.info("compiling %s for %d chips", ", ".join(chained), chips)
        chain = price_pipeline(
            setup, chip=chip, chips=chips, compiled=compiled, programs=chained, sampling=sample
        )
    evaluating = price_evaluation(
        setup, chip=chip, chips=chips, state_bytes=held.total, sampling=sample, chain=chain
    )
    fitting = train if isinstance(train, Step) else None
    parts = train, sample and sample.batch, chain, analysis, evaluating
    return Report(
        setting=_setting(setup, topology, num_slices, chip, chips),
        fits=all(one.fits for one in parts if one is not None),
        memory=Memory.of(chip.memory / chip.devices, held, fitting and fitting.memory),
        checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        train=train,
        sample=sample,
        chain=chain,
        analysis=analysis,
        evaluating=evaluating,
        run=fitting and _run(experiment, chips, fitting.step_s),
    )


def _price_training(
    setup: Setup,
    chip: Chip,
    chips: int,
    compiled: Callable[[jax.stages.Lowered], Compiled | TooLarge],
    between_slices_s: float,
) -> Step | TooLarge:
    """Price the update; arguments as of `price_sampling` and `Step.of`."""
    experiment = setup.experiment
    batch = batch_shapes(experiment, setup.mesh)
    answer = compiled(lower_train_step(setup, setup.state, batch))
    if not isinstance(answer, Compiled):
        return answer
    size = experiment.training.batch_size
    return Step.of(
        answer,
        chip,
        chips,
        images=size,
        flops=flops_per_image(experiment) * size,
        between_slices_s=between_slices_s,
    )


def _chosen(config: ConfigDict, programs: Sequence[str] | None) -> Sequence[str]:
    """Return the programs that are asked for, or those of a config."""
    known = ("train", "sample", "analyse", *CHAIN)
    if programs is None:
        experiment = build(config)
        of_evaluations = _of_evaluations(experiment)
        return [*known[:2], *(of_evaluations if experiment.evaluation.measures else ())]
    if not programs:
        raise UserError(f"--programs is empty: use some of {', '.join(known)}")
    for program in programs:
        if program not in known:
            raise UserError(f"--programs has {program!r}: use some of {', '.join(known)}")
    return programs


def with_batch(config: ConfigDict, topology: str, num_slices: int, per_chip: int) -> ConfigDict:
    """Return a copy of a config with this many images per chip of a topology in a batch."""
    return _vary(config, topology, num_slices, {"batch": str(per_chip)})


def parse_sweep(text: str) -> dict[str, list[str]]:
    """Parse `batch,remat` or `batch=4,8,16,mesh=fsdp=4,fsdp=16+tensor=2`, by names in `SWEEPS`.

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
        name: console.SweepKey(reader(name), wanted, bare=True, nested=name == "mesh")
        for name in SWEEPS
    }
    return console.parse_sweep(text, known)


def sweep(
    config: ConfigDict,
    topology: str,
    num_slices: int,
    settings: Mapping[str, Sequence[str]],
    show: Callable[[str], None] = print,
) -> Sweep:
    """Compare the training step for all combinations of settings.

    Args:
      config: as for `preflight`.
      topology: as for `preflight`.
      num_slices: as for `preflight`.
      settings: of `parse_sweep`; where there are no values, those of `SWEEPS`.
      show: called with each line of the table when it is known, and with the best one at the end.

    Raises:
      UserError: an impossible value.
    """
    dimensions = {name: values or SWEEPS[name] for name, values in settings.items()}
    trials = []
    show(report.sweep_header(dimensions))
    for varied in console.combinations(dimensions):
        changed = _vary(config, topology, num_slices, varied)
        try:
            trial = SweepPoint(
                varied,
                preflight(changed, topology=topology, num_slices=num_slices, programs=["train"]),
            )
        except UserError as error:
            trial = SweepPoint(varied, error=str(error))
        show(report.sweep_row(trial))
        trials.append(trial)
    done = Sweep(trials)
    show("\n" + (report.sweep_row(done.best, best=True) if done.best else "none fits"))
    return done


def _vary(
    config: ConfigDict, topology: str, num_slices: int, settings: Mapping[str, str]
) -> ConfigDict:
    """Return a copy of a config with some settings changed.

    Args:
      config: as for `preflight`.
      topology: as for `preflight`.
      num_slices: as for `preflight`.
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
            model: Any = changed.model
            model[name] = int(value) if name == "num_heads" else value
    return changed


def calibrate(topology: str) -> Calibration:
    """Compare estimates for large bfloat16 matrix products with the peak.

    It shows how far the compiler's estimates can be trusted on a chip: for a product of 8192³ and
    two of the XL/2 network's.
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
        fraction = 2 * m * k * n / seconds / chip.peak_flops
        rows.append(MatmulEstimate(f"{m} x {k} x {n}", seconds, fraction))
    return Calibration(rows)


def _setting(setup: Setup, topology: str, num_slices: int, chip: Chip, chips: int) -> Setting:
    experiment, model = setup.experiment, setup.experiment.model
    settings = experiment.training
    return Setting(
        topology=topology,
        num_slices=num_slices,
        chips=chips,
        calibrated=chip.calibrated,
        mesh=dict(setup.mesh.shape),
        batch_size=settings.batch_size,
        batch_per_chip=settings.batch_size / chips,
        accumulation=settings.accumulation,
        remat=model.remat,
        num_heads=model.heads[0],
        head_width=model.heads[1],
        attention=models.describe_attention(model, "tpu"),
        sampled_without="autoguidance" if experiment.sampling.guidance.needs_guide else "",
        averages=1 + len(setup.state.power_emas),
        jax=jax.__version__,
        libtpu=compiler.libtpu_version(),
    )


def _held(state: TrainState) -> StateMemory:
    """Return the bytes that each device holds between steps, by purpose."""

    def on_device(*trees: Any) -> int:
        return sum(map(_bytes_on_device, jax.tree.leaves(trees)))

    return StateMemory(
        parameters=on_device(state.params, state.constants),
        optimizer=on_device(state.opt_state),
        ema=on_device(state.ema),
        power_emas=[on_device(one) for one in state.power_emas],
    )


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _run(experiment: Experiment, chips: int, step_s: float) -> RunCost:
    settings = experiment.training
    example = experiment.space.batch(1, experiment.model.sample_shape).values()
    per_image = sum(leaf.size * leaf.dtype.itemsize for leaf in example)
    per_image += sum(spec.size for spec in arrays_beside(experiment).values())
    hours = settings.total_steps * step_s / 3600
    hosts = max(chips // CHIPS_PER_HOST, 1)
    return RunCost(
        steps=settings.total_steps,
        hours=hours,
        chip_hours=hours * chips,
        hosts=hosts,
        data_bytes_per_s_per_host=settings.batch_size / step_s * per_image / hosts,
    )


Ask = Callable[[jax.stages.Lowered], Compiled | TooLarge]


def price_sampling(setup: Setup, chip: Chip, chips: int, compiled: Ask) -> SamplingPlan:
    """Price drawing a batch, with or without a copy of the parameters, as the chip would.

    And the other way if there is one. Autoguidance's guiding network is not known here; the report
    says so.
    """
    experiment, variables = setup.experiment, setup.variables
    size = copy_bytes(experiment.model, variables)
    wanted = size > 0 and copy_fits(size, chip.memory / chip.devices)

    def price(copy: bool) -> SamplingPlan:
        sampler = sampler_without_autoguidance(experiment, setup.mesh, copy=copy)
        batch = compiled(sampler.lower(variables))
        if isinstance(batch, Compiled):
            flops = 2 * sampler.multiply_adds(variables)
            batch = SamplingCost.of(batch, chip, chips, images=sampler.batch_size, flops=flops)
        return SamplingPlan(batch, size if copy else 0)

    alternative = price(not wanted) if size else None
    return dataclasses.replace(price(wanted), alternative=alternative)


def price_analysis(
    setup: Setup, chip: Chip, chips: int, compiled: Ask, *, measured: bool = True
) -> Step | TooLarge:
    """Price what `analyse` does by default, with an image on each device at least.

    `measured`: whether attention is measured on the way; arguments else as of `price_sampling`.
    """
    experiment, mesh = setup.experiment, setup.mesh
    steps, count = analyse.STEPS, parallel.next_batch_size(mesh, max(analyse.IMAGES, mesh.size))
    sigmas = experiment.process.sigmas(steps)
    frozen = float(sigmas[steps // 2])
    way = analyse.Way(count, tuple(sigmas.tolist()), frozen=frozen, measured=measured)
    batch = seeds_and_labels(mesh, count)
    with parallel.placement(mesh):
        lowered = analyse.program(setup, way).lower(setup.variables, batch)
    answer = compiled(lowered)
    if not isinstance(answer, Compiled):
        return answer
    evaluations = steps * (2 if measured else 1) + 1
    flops = 2 * count * evaluations * traced_multiply_adds(experiment.model)
    return Step.of(answer, chip, chips, images=count, flops=flops)


def price_pipeline(
    setup: Setup,
    *,
    chip: Chip,
    chips: int,
    compiled: Ask,
    programs: Sequence[str],
    sampling: SamplingPlan | None,
) -> PipelineCost:
    """Price the networks between images, latents and scores.

    The published autoencoder in bfloat16, a slice on each device, and the FID network, a batch.

    Args:
      setup: the experiment.
      chip: of the topology.
      chips: how many.
      compiled: asks the compiler.
      programs: which of `CHAIN`.
      sampling: how the experiment draws, for the memory of its network and these together.

    Raises:
      UserError: a program of an autoencoder for an experiment without one.
    """
    with_autoencoder = bool(setup.experiment.data.autoencoder)
    if not with_autoencoder and {"encode", "decode"} & set(programs):
        raise UserError("--programs has encode or decode, but the config names no autoencoder")
    chain = Chain(setup)
    priced: dict[str, Step | TooLarge] = {}
    for name in programs:
        lowered, images, adds = getattr(chain, name)()
        answer = compiled(lowered)
        if isinstance(answer, Compiled):
            answer = Step.of(answer, chip, chips, images=images, flops=2 * images * adds)
        priced[name] = answer
    held = {
        "autoencoder": bytes_of(chain.of_autoencoder) if with_autoencoder else 0,
        "inception": bytes_of(chain.of_inception) if _inception_in(programs) else 0,
    }
    if "dinov2" in programs:
        held["dinov2"] = bytes_of(chain.of_dinov2)
    if "encoder" in programs:
        held["encoder"] = bytes_of(chain.of_encoder())
    return PipelineCost(priced, held, _together(sampling, priced, held), chip.memory / chip.devices)


def price_evaluation(
    setup: Setup,
    *,
    chip: Chip,
    chips: int,
    state_bytes: int,
    sampling: SamplingPlan | None,
    chain: PipelineCost | None,
) -> EvalCost | None:
    """Price the evaluations that an experiment asks for while it trains.

    None if it asks for none, or one of their programs was not priced.

    Args:
      setup: the experiment.
      chip: of the topology.
      chips: how many.
      state_bytes: of the state on each device.
      sampling: as it was priced.
      chain: as it was priced.
    """
    experiment = setup.experiment
    settings = experiment.evaluation
    if not settings.measures or sampling is None or chain is None:
        return None
    wanted = _of_evaluations(experiment)
    steps = [sampling.batch, *(chain.programs.get(name) for name in wanted)]
    fitting = [step for step in steps if isinstance(step, Step)]
    if len(fitting) < len(steps):
        return None
    extra = max(map(_extra_bytes, fitting))
    seconds = sum(1 / (step.images_per_s_per_chip * chips) for step in fitting)
    weights = len(list(kinds(experiment, setup.state, settings.raw)))
    total = experiment.training.total_steps
    last = settings.final_count or settings.count
    before = (
        -(-total // settings.steps) - 1 if settings.steps else 0
    )  # the last one comes after the last update
    images = before * settings.count + last
    return EvalCost(
        kinds=weights,
        seconds_per_image=seconds,
        memory=state_bytes + sum(chain.held.values()) + extra,
        limit=chip.memory / chip.devices,
        run_hours=weights * images * seconds / 3600,
    )


def _of_evaluations(experiment: Experiment) -> list[str]:
    """Return the programs between samples and scores, names in `CHAIN`."""
    networks = [key for key in ("inception", "dinov2") if getattr(experiment.evaluation, key)]
    return ["decode"] * bool(experiment.data.autoencoder) + networks


def _extra_bytes(step: Step) -> int:
    """Return the bytes that a program needs besides its arguments."""
    return step.memory.outputs + step.memory.temporaries + step.memory.program


def _inception_in(programs: Sequence[str]) -> bool:
    """Whether images are measured by the FID network: unless it is by DINOv2 alone."""
    return "inception" in programs or "dinov2" not in programs


def _together(
    sampling: SamplingPlan | None, priced: Mapping[str, Step | TooLarge], held: Mapping[str, int]
) -> int | None:
    """Return the bytes on each device while samples are drawn, decoded and measured.

    All weights, and the largest of the programs' other memory; None if one of them is not known.
    """
    uses = {
        "decode": held["autoencoder"],
        "inception": _inception_in([*priced]),
        "dinov2": "dinov2" in priced,
    }
    wanted = [name for name, used in uses.items() if used]
    steps = [sampling.batch if sampling else None, *(priced.get(name) for name in wanted)]
    fitting = [step for step in steps if isinstance(step, Step)]
    if len(fitting) < len(steps):
        return None
    weights = fitting[0].memory.arguments + sum(held.values()) - held.get("encoder", 0)
    return weights + max(map(_extra_bytes, fitting))
