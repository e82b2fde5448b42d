"""Results of preflight as dataclasses, whose fields are the keys of its JSON.

Times are in seconds and are the compiler's estimates, sizes in bytes, rates per second.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffit_jax.runtime.backend import Chip


@dataclasses.dataclass(frozen=True)
class CollectiveStats:
    """Collective operations of one kind: how often they run, and the bytes that a device moves."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies between memories of a chip that overlap with the computation."""

    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TopOp:
    """One operation: how long all its `times` take, its place in the network and in the source."""

    seconds: float
    times: float
    operation: str
    source: str


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a program on each device. `aliased` are outputs in the place of arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a program that fits.

    Attributes:
      fits: it does.
      seconds_to_compile: here.
      memory: its plan.
      compute_s: all computations; of it `kernels_s` are kernels, by their schedule.
      by_bytes_s: what of it has no estimate and is priced by the bytes that it touches.
      collectives: kind, such as "all-gather" → what it moves.
      async_copies: they are not in `compute_s`.
      even_conditionals: whose branches cost the same.
      unpriced_kernels: kernels without a schedule → how often they run.
      unknown_loops: whose number of turns is unknown; they count once.
      dearest: operations with the largest times.
    """

    fits: bool = True
    seconds_to_compile: float
    memory: MemoryPlan
    compute_s: float
    kernels_s: float
    by_bytes_s: float
    collectives: Mapping[str, CollectiveStats]
    async_copies: Copies
    even_conditionals: list[str]
    unpriced_kernels: Mapping[str, float]
    unknown_loops: list[str]
    dearest: list[TopOp]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """What it says of one that does not: bytes `needed` and `available`, or the `reason`."""

    fits: bool = False
    needed: float | None = None
    available: float | None = None
    reason: str = ""


def answer_of(values: Mapping[str, Any]) -> Compiled | TooLarge:
    """Return the compiler's answer from its JSON values."""
    if not values["fits"]:
        return TooLarge(**values)
    nested = {
        "memory": MemoryPlan(**values["memory"]),
        "collectives": {
            kind: CollectiveStats(**moved) for kind, moved in values["collectives"].items()
        },
        "async_copies": Copies(**values["async_copies"]),
        "dearest": [TopOp(**one) for one in values["dearest"]],
    }
    return Compiled(**dict(values) | nested)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Compiled):
    """The program of a training step, or of drawing one batch, and what follows from it.

    Attributes:
      images: that it makes or learns from, on all chips.
      flops: of all chips.
      collectives_s, between_slices_s: moving data between chips and between slices, at least.
      step_s: the largest of `compute_s` and the two, since they can run at the same time.
      serial_s: their sum.
      images_per_s_per_chip: by `step_s`.
      mfu: FLOPs by `step_s`, as a share of the chips' peak.
    """

    images: int
    flops: float
    collectives_s: float
    between_slices_s: float
    step_s: float
    serial_s: float
    images_per_s_per_chip: float
    mfu: float

    @staticmethod
    def of(
        compiled: Compiled,
        chip: Chip,
        chips: int,
        *,
        images: int,
        flops: float,
        between_slices_s: float = 0.0,
    ) -> "Step":
        """Derive a step's figures from the compiler's answer, for this many chips."""
        moved = sum(moved.bytes for moved in compiled.collectives.values())
        collectives_s = moved / (chip.link_bandwidth / chip.devices)
        times = compiled.compute_s, collectives_s, between_slices_s
        step_s = max(times)
        return Step(
            **_values(compiled),
            images=images,
            flops=flops,
            collectives_s=collectives_s,
            between_slices_s=between_slices_s,
            step_s=step_s,
            serial_s=sum(times),
            images_per_s_per_chip=images / step_s / chips,
            mfu=flops / step_s / chips / chip.peak_flops,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingCost(Step):
    """The program that draws one batch; `hours_for_50000` samples, as many as a FID takes."""

    hours_for_50000: float

    @staticmethod
    def of(compiled: Compiled, chip: Chip, chips: int, **given: Any) -> "SamplingCost":
        """Derive the figures of drawing a batch, as `Step.of`."""
        step = Step.of(compiled, chip, chips, **given)
        hours = 50_000 / step.images_per_s_per_chip / chips / 3600
        return SamplingCost(**_values(step), hours_for_50000=hours)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """How a chip would draw.

    Attributes:
      batch: drawing one batch.
      copy_bytes: of the copy of the parameters that each device holds meanwhile; 0: none.
      alternative: with a copy if this is without one, and the other way round; None: there is no
        such choice.
    """

    batch: SamplingCost | TooLarge
    copy_bytes: int
    alternative: "SamplingPlan | None" = None


@dataclasses.dataclass(frozen=True)
class PipelineCost:
    """The networks between images, latents and scores.

    Attributes:
      programs: those that were asked for, names in `chain.CHAIN`.
      held: bytes of the weights on each device, of "autoencoder", "inception" …
      together: bytes on each device while samples are drawn, decoded and measured; None: not all of
        that is known.
      limit: memory of each device.
    """

    programs: Mapping[str, Step | TooLarge]
    held: Mapping[str, int]
    together: int | None
    limit: float

    @property
    def fits(self) -> bool:
        """Whether each program does, and all networks together."""
        alone = all(program.fits for program in self.programs.values())
        return alone and (self.together is None or self.together <= self.limit)


@dataclasses.dataclass(frozen=True)
class EvalCost:
    """Evaluations of a run while it trains, with its state in memory.

    Attributes:
      kinds: of weights that are evaluated.
      seconds_per_image: to draw, decode and measure one sample, on all chips.
      memory: bytes on each device: the state, the other networks, and the largest of what their
        programs need on top.
      limit: memory of each device.
      run_hours: of all evaluations of the run.
    """

    kinds: int
    seconds_per_image: float
    memory: int
    limit: float
    run_hours: float

    @property
    def fits(self) -> bool:
        """Whether everything fits in the memory."""
        return self.memory <= self.limit

    def hours(self, count: int) -> float:
        """Return the hours for so many samples of each kind of weights."""
        return self.kinds * count * self.seconds_per_image / 3600


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was compiled, for which topology, and by which versions.

    `sampled_without`: what sampling leaves out, "" if nothing; `averages`: of the parameters;
    `calibrated`: whether estimates were compared with known times of this chip.
    """

    topology: str
    num_slices: int
    chips: int
    calibrated: bool
    mesh: Mapping[str, int]
    batch_size: int
    batch_per_chip: float
    accumulation: int
    remat: str
    num_heads: int | None
    head_width: int | None
    attention: str
    sampled_without: str
    averages: int
    jax: str
    libtpu: str


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """Bytes that each device holds between steps."""

    parameters: int
    optimizer: int
    ema: int
    power_emas: list[int]

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.parameters + self.optimizer + self.ema + sum(self.power_emas)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of each device: its `limit`, the state, and the compiler's plan for a training step.

    The plan's parts are None if the step does not fit, or was not compiled.
    """

    limit: float
    held: StateMemory
    batch_and_padding: int | None = None
    activations: int | None = None
    program: int | None = None
    total: int | None = None
    headroom: float | None = None

    @classmethod
    def of(cls, limit: float, held: StateMemory, plan: MemoryPlan | None) -> "Memory":
        """Return the memory of a step with such a plan."""
        if plan is None:
            return cls(limit, held)
        return cls(
            limit,
            held,
            batch_and_padding=max(plan.arguments - held.total, 0),
            activations=plan.temporaries,
            program=plan.program,
            total=plan.total,
            headroom=limit - plan.total,
        )


@dataclasses.dataclass(frozen=True)
class RunCost:
    """The whole training run."""

    steps: int
    hours: float
    chip_hours: float
    hosts: int
    data_bytes_per_s_per_host: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a config will do on a topology; None is what was not asked for.

    Attributes:
      setting: what was compiled.
      fits: whether all its programs do.
      memory, checkpoint_bytes: what training needs.
      train: the training step.
      sample: drawing, as this chip would.
      chain: the networks between images, latents and scores.
      analysis: following samples with statistics of attention.
      evaluating: the evaluations of its section `evaluation`, if all their programs are there.
      run: the whole run; None too if the step does not fit.
    """

    setting: Setting
    fits: bool
    memory: Memory
    checkpoint_bytes: int
    train: Step | TooLarge | None
    sample: SamplingPlan | None
    chain: PipelineCost | None
    analysis: Step | TooLarge | None
    evaluating: EvalCost | None
    run: RunCost | None


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One combination of settings of a sweep.

    Attributes:
      varied: name → value of each setting.
      report: None if the combination cannot be.
      error: why it cannot.
    """

    varied: Mapping[str, str]
    report: Report | None = None
    error: str = ""

    @property
    def rate(self) -> float:
        """Images per second and chip in training; 0 if it does not fit."""
        train = self.report and self.report.train
        return train.images_per_s_per_chip if isinstance(train, Step) else 0.0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All combinations of settings, in their order."""

    trials: list[SweepPoint]

    @property
    def best(self) -> SweepPoint | None:
        """That with the most images per second and chip; None if none fits."""
        best = max(self.trials, key=lambda trial: trial.rate, default=None)
        return best if best is not None and best.rate else None


@dataclasses.dataclass(frozen=True)
class MatmulEstimate:
    """The estimate for a matrix product, and the time at the peak rate as a share of it."""

    product: str
    seconds: float
    share_of_peak: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Products whose time on a chip is known to be near the peak's."""

    products: list[MatmulEstimate]


def _values(of: Any) -> dict[str, Any]:
    """Return a dataclass's fields, without converting what is inside them."""
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
