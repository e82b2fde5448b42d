"""Preflight's reports for people: the table, one line of a sweep, and a paragraph of advice."""

from collections.abc import Iterable
from typing import Any

from diffit_jax.preflight.figures import (
    Calibration,
    EvalCost,
    Memory,
    PipelineCost,
    Report,
    SamplingCost,
    SamplingPlan,
    Setting,
    Step,
    SweepPoint,
    TooLarge,
)


def render(report: Report) -> str:
    """Format a report as a table."""
    setting, run = report.setting, report.run
    mesh = " x ".join(f"{axis} {size}" for axis, size in setting.mesh.items())
    slices = f"{setting.num_slices} slices of " if setting.num_slices > 1 else ""
    uncalibrated = " For this chip they are not calibrated: compare settings, trust no figure."
    lines = [
        f"{slices}{setting.topology}: {setting.chips} chips, {mesh}; batch {setting.batch_size} "
        f"({setting.batch_per_chip:g} per chip), remat {setting.remat}, "
        f"{_heads(setting)}attention {setting.attention}",
        f"jax {setting.jax}, libtpu {setting.libtpu}. All times are the compiler's "
        f"ESTIMATES, not measurements.{'' if setting.calibrated else uncalibrated}",
        "",
        *_memory(report),
    ]
    # A section for each program that was priced.
    if report.train:
        lines += ["", *_program("training step", "FLOPs, not recomputed", report.train)]
    if report.sample:
        lines += ["", *_program("sampling, one batch", "FLOPs, all evaluations", report.sample)]
    if setting.sampled_without:
        lines += [
            f"NOT PRICED: sampling's {setting.sampled_without}, which evaluates a second network"
        ]
    if report.chain:
        lines += _chain(report.chain)
    if report.analysis:
        lines += ["", *_program("analysis", "FLOPs, all evaluations", report.analysis)]
    if report.evaluating:
        lines += _evaluating(report.evaluating)
    # What follows for the whole run.
    if run:
        lines += [
            "",
            f"the whole run: {run.steps:,} steps, {run.hours:,.0f} hours, "
            f"{run.chip_hours:,.0f} chip-hours (estimate)",
            f"data: {_bytes(run.data_bytes_per_s_per_host)}/s for each of {run.hosts} hosts",
        ]
    lines += ["", "FITS" if report.fits else f"DOES NOT FIT: {shortage(report)}"]
    return "\n".join(lines)


def shortage(report: Report) -> str:
    """Say by how much a report's programs do not fit."""
    parts = []
    programs: dict[str, Any] = {"train": report.train, "sample": _batch(report.sample)}
    if report.chain:
        programs |= report.chain.programs
    programs["analyse"] = report.analysis
    for name, program in programs.items():
        if not isinstance(program, TooLarge):
            continue
        if program.needed is not None and program.available is not None:
            more = (
                f"needs {_bytes(program.needed)} where {_bytes(program.available)} are free, "
                f"{_bytes(program.needed - program.available)} too much"
            )
        else:
            more = f"is too large ({program.reason})"
        parts.append(f"the {name} step {more}")
    evaluating = report.evaluating
    if evaluating and not evaluating.fits:
        more = evaluating.memory - evaluating.limit
        parts.append(f"an evaluation beside the state needs {_bytes(more)} too much")
    return "; ".join(parts)


def sweep_header(settings: Iterable[str]) -> str:
    """Return the columns of `sweep_row`."""
    return (
        "  ".join(f"{name:>10}" for name in settings)
        + f"  {'HBM':>10}  {'est. step':>10}  {'img/s/chip':>10}  {'est. MFU':>8}"
    )


def sweep_row(trial: SweepPoint, best: bool = False) -> str:
    """Format one combination of a sweep."""
    row = "  ".join(f"{value:>10}" for value in trial.varied.values())
    if trial.report is None:
        return f"{row}  {trial.error}"
    train, memory = trial.report.train, trial.report.memory
    if not isinstance(train, Step):
        return f"{row}  does not fit: {shortage(trial.report)}"
    figures = f"{train.step_s:>8.4f} s  {train.images_per_s_per_chip:>10.2f}  {train.mfu:>8.3f}"
    marked = "  <- best that fits" if best else ""
    return f"{row}  {_bytes(memory.total or 0):>10}  {figures}{marked}"


def render_products(calibration: Calibration) -> str:
    """Format a calibration as a table."""
    return "\n".join(
        f"{row.product:22} {row.seconds * 1e3:9.4f} ms   {row.share_of_peak:.3f} of the peak "
        "(estimate)"
        for row in calibration.products
    )


def explain(report: Report) -> str:
    """Return a paragraph of advice that follows from a report's numbers."""
    setting, train = report.setting, report.train
    if not report.fits:
        options = [
            "more recomputation (config.model.remat=full)",
            "parts (config.training.accumulation)",
            "a smaller batch, or more chips",
        ]
        if setting.mesh["fsdp"] < setting.chips:
            options.insert(0, f"a larger mesh.fsdp than {setting.mesh['fsdp']}")
        return f"It does not fit: {shortage(report)}. Try, in this order: {'; '.join(options)}."
    if not isinstance(train, Step):
        return "Only the training step is explained."
    advice = (
        _on_memory(setting, report.memory),
        _on_communication(setting, train),
        _on_attention(setting),
        _on_heads(setting),
        _on_top_op(train),
    )
    return " ".join(filter(None, advice))


def _on_memory(setting: Setting, memory: Memory) -> str:
    free = (memory.headroom or 0) / memory.limit
    if free > 0.5 and setting.remat != "none":
        return (
            f"{free:.0%} of the memory is free: a larger batch per chip than "
            f"{setting.batch_per_chip:g}, or less recomputation than remat={setting.remat}, would "
            "use it."
        )
    if free < 0.05:
        return (
            f"Only {free:.0%} of the memory is free; a real run also holds buffers of its own, so "
            "leave more."
        )
    return ""


def _on_communication(setting: Setting, train: Step) -> str:
    ratio = train.collectives_s / train.compute_s
    if ratio > 1:
        return (
            f"Moving data between chips takes {ratio:.1f} times as long as computing: more images "
            f"per chip, or a smaller mesh.fsdp (now {setting.mesh['fsdp']}), is the first thing to "
            "change."
        )
    return (
        f"Moving data between chips takes {ratio:.0%} of the time of computing; where none of it "
        f"is hidden the step takes {train.serial_s:.4f} s instead of {train.step_s:.4f} s."
    )


def _on_attention(setting: Setting) -> str:
    if not (setting.num_heads and setting.attention.startswith("xla")):
        return ""
    return (
        "Attention runs through XLA, which writes logits and bias to memory: "
        "config.model.attention=auto uses the kernel."
    )


def _on_heads(setting: Setting) -> str:
    width = setting.head_width
    if not width or width % 128 == 0:
        return ""
    return (
        f"Heads of width {width} fill {width / (-(-width // 128) * 128):.0%} of a matrix unit; for "
        "a model trained from scratch, heads of 128 have the same number of parameters."
    )


def _on_top_op(train: Step) -> str:
    top = train.dearest[0]
    return (
        f"The dearest place is {top.operation} ({top.source}): "
        f"{top.seconds / train.compute_s:.0%} of computing."
    )


def _batch(sampling: SamplingPlan | None) -> SamplingCost | TooLarge | None:
    return sampling and sampling.batch


def _heads(setting: Setting) -> str:
    return f"{setting.num_heads} heads, " if setting.num_heads else ""


def _memory(report: Report) -> list[str]:
    memory, held = report.memory, report.memory.held
    sizes = {"parameters": held.parameters, "optimizer": held.optimizer, "ema": held.ema}
    sizes |= {f"power_ema_{index}": size for index, size in enumerate(held.power_emas)}
    sizes |= {
        "batch and padding": memory.batch_and_padding,
        "activations": memory.activations,
        "program": memory.program,
    }
    rows = [f"{'memory of each device':28}"]
    rows += [f"  {name:26} {_bytes(size):>12}" for name, size in sizes.items() if size is not None]
    if memory.total is not None and memory.headroom is not None:
        rows += [
            f"  {'total':26} {_bytes(memory.total):>12}  of {_bytes(memory.limit)}",
            f"  {'headroom':26} {_bytes(memory.headroom):>12}",
        ]
    return [*rows, f"{'a checkpoint':28} {_bytes(report.checkpoint_bytes):>12}"]


def _program(title: str, work: str, program: Step | TooLarge | SamplingPlan) -> list[str]:
    """Return the rows of a training step, or of drawing."""
    step = program.batch if isinstance(program, SamplingPlan) else program
    if isinstance(step, TooLarge):
        return [f"{title}: does not fit"]
    # Times that can overlap are shown apart, and their sum as a bound.
    copies = step.async_copies
    moved = f"{copies.count:,.0f} copies, {_bytes(copies.bytes)}"
    rows = [
        f"{title} of {step.images} images (compiled in {step.seconds_to_compile:.0f} s)",
        f"  {work:32} {step.flops:.3e}",
        f"  {'computing':32} {step.compute_s:.4f} s   (kernels by their schedule "
        f"{step.kernels_s:.4f} s, without an estimate and priced by bytes {step.by_bytes_s:.4f} s)",
        f"  {'moving between chips, at least':32} {step.collectives_s:.4f} s",
    ]
    rows += [
        f"    {kind:30} {entry.count:,.0f} times, {_bytes(entry.bytes)}"
        for kind, entry in step.collectives.items()
    ]
    if step.between_slices_s:
        rows.append(f"  {'between slices, at least':32} {step.between_slices_s:.4f} s")
    rows += [
        f"  {'beside it, fetching from memory':32} {copies.seconds:.4f} s   ({moved})",
        f"  {'estimated time':32} {step.step_s:.4f} s   (one after the other: "
        f"{step.serial_s:.4f} s)",
        f"  {'estimated images/s/chip':32} {step.images_per_s_per_chip:.4g}   estimated MFU "
        f"{step.mfu:.3f}",
    ]
    if isinstance(program, SamplingPlan):
        rows += _sampling(program)
    for kernel, times in step.unpriced_kernels.items():
        rows.append(f"  NOT PRICED: {kernel}, {times:,.0f} times")
    if step.even_conditionals:
        rows.append(f"  all branches alike: {', '.join(step.even_conditionals)}")
    for loop in step.unknown_loops:
        rows.append(f"  NOT PRICED: loop {loop} has an unknown trip count and counts once")
    rows.append("  dearest operations")
    rows += [
        f"    {entry.seconds * 1e3:10.2f} ms  {entry.times:8,.0f} x  {entry.operation:44} "
        f"{entry.source}"
        for entry in step.dearest
    ]
    return rows


def _chain(chain: PipelineCost) -> list[str]:
    """Return the rows of the networks between images, latents and scores."""
    titles = {
        "encode": "encoding, one slice",
        "decode": "decoding, one slice",
        "inception": "the FID network, one batch",
        "dinov2": "DINOv2 ViT-L/14, one batch",
        "encoder": "the encoder of representations, the pictures of an update",
    }
    rows = []
    for name, program in chain.programs.items():
        rows += ["", *_program(titles[name], "FLOPs", program)]
        if name == "encoder":
            rows.append(f"  weights on each device  {_bytes(chain.held[name])}")
    if chain.together is not None:
        names = " and ".join(name for name, size in chain.held.items() if size)
        rows += [
            "",
            f"drawing, decoding and measuring with all weights (beside the network's {names}) on "
            f"each device: {_bytes(chain.together)} of {_bytes(chain.limit)}",
        ]
    return rows


def _evaluating(evaluating: EvalCost) -> list[str]:
    """Return the rows of the evaluations of a run while it trains."""
    hours = " and ".join(f"{evaluating.hours(count):,.2f}" for count in (10_000, 50_000))
    return [
        "",
        "evaluation while training, of "
        f"{evaluating.kinds} kind{'s' * (evaluating.kinds > 1)} of weights (estimate)",
        f"  {'10,000 and 50,000 samples':32} {hours} hours; all of this run's: "
        f"{evaluating.run_hours:,.1f} hours beside the steps",
        f"  {'state, networks, temporaries':32} {_bytes(evaluating.memory)} of "
        f"{_bytes(evaluating.limit)} on each device",
    ]


def _sampling(sampling: SamplingPlan) -> list[str]:
    """Return rows on both ways of sampling, and how long the samples of a FID take."""

    def way(copy_bytes: int) -> str:
        if not copy_bytes:
            return "casting and gathering in each evaluation"
        return f"with a copy of the parameters ({_bytes(copy_bytes)})"

    def hours(batch: SamplingCost | TooLarge) -> str:
        return f"{batch.hours_for_50000:,.2f} hours" if isinstance(batch, SamplingCost) else ""

    rows = [
        f"  {'50,000 samples':32} {hours(sampling.batch)}, {way(sampling.copy_bytes)} (estimate)"
    ]
    other = sampling.alternative
    if other:
        told = f"{hours(other.batch)} (estimate)" if other.batch.fits else "does not fit"
        rows.append(f"    {way(other.copy_bytes) + ':':42} {told}")
    return rows


def _bytes(size: float) -> str:
    """Format bytes as 1.50 GB (10⁹), as makers of memory and disks count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"
