"""Preflight's reports for people: the table, one line of a sweep, and a paragraph of advice."""

from collections.abc import Mapping, Sequence
from typing import Any


def render(report: Mapping[str, Any]) -> str:
    """The report of `preflight.preflight` as text."""
    setting, train = report["setting"], report.get("train")
    mesh = " x ".join(f"{axis} {size}" for axis, size in setting["mesh"].items())
    slices = f"{setting['num_slices']} slices of " if setting["num_slices"] > 1 else ""
    lines = [
        f"{slices}{setting['topology']}: {setting['chips']} chips, {mesh}; batch "
        f"{setting['batch_size']} "
        f"({setting['batch_per_chip']:g} per chip), remat {setting['remat']}, "
        f"{_heads(setting)}attention {setting['attention']}",
        f"jax {setting['jax']}, libtpu {setting['libtpu']}. All times are the compiler's "
        "ESTIMATES, not measurements."
        + (
            ""
            if setting["calibrated"]
            else " For this chip they are not calibrated: compare settings, trust no figure."
        ),
        "",
        *_memory(report),
    ]
    for name in ("train", "sample"):
        if name in report:
            lines += ["", *_program(name, report[name])]
    if setting["sampled_without"]:
        lines += [
            f"NOT PRICED: sampling's {setting['sampled_without']}, which evaluates a second network"
        ]
    if "run" in report and train:
        run = report["run"]
        lines += [
            "",
            f"the whole run: {run['steps']:,} steps, {run['hours']:,.0f} hours, "
            f"{run['chip_hours']:,.0f} chip-hours (estimate)",
            f"data: {_bytes(run['data_bytes_per_s_per_host'])}/s for each of {run['hosts']} hosts",
        ]
    lines += ["", "FITS" if report["fits"] else f"DOES NOT FIT: {shortage(report)}"]
    return "\n".join(lines)


def shortage(report: Mapping[str, Any]) -> str:
    """By how much a report's programs do not fit."""
    parts = []
    for name in ("train", "sample"):
        program = report.get(name, {"fits": True})
        if not program["fits"]:
            if "needed" in program:
                needed, available = program["needed"], program["available"]
                more = (
                    f"needs {_bytes(needed)} where {_bytes(available)} are free, "
                    f"{_bytes(needed - available)} too much"
                )
            else:
                more = f"is too large ({program['reason']})"
            parts.append(f"the {name} step {more}")
    return "; ".join(parts)


def sweep_header(dimensions: Sequence[str]) -> str:
    """The columns of `sweep_row`."""
    return (
        "  ".join(f"{name:>10}" for name in dimensions)
        + f"  {'HBM':>10}  {'est. step':>10}  {'img/s/chip':>10}  {'est. MFU':>8}"
    )


def sweep_row(report: Mapping[str, Any], best: bool = False) -> str:
    """One setting of a sweep."""
    row = "  ".join(f"{value:>10}" for value in report["varied"].values())
    if "error" in report:
        return f"{row}  {report['error']}"
    if not report["fits"]:
        return f"{row}  does not fit: {shortage(report)}"
    train = report["train"]
    figures = (
        f"{train['step_s']:>8.4f} s  {train['images_per_s_per_chip']:>10.2f}  {train['mfu']:>8.3f}"
    )
    return f"{row}  {_bytes(report['memory']['total']):>10}  {figures}" + (
        "  <- best that fits" if best else ""
    )


def best_of(reports: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the report that fits with the most images per second and chip; None if none fits."""
    rates = [
        report["train"]["images_per_s_per_chip"] if report["fits"] else 0.0 for report in reports
    ]
    return max(range(len(rates)), key=rates.__getitem__) if any(rates) else None


def explain(report: Mapping[str, Any]) -> str:
    """A paragraph of advice that follows from a report's numbers."""
    setting, memory, train = report["setting"], report["memory"], report.get("train")
    if not report["fits"]:
        mesh = setting["mesh"]
        options = [
            "more recomputation (config.model.remat=full)",
            "parts (config.training.accumulation)",
            "a smaller batch, or more chips",
        ]
        if mesh["fsdp"] < setting["chips"]:
            options.insert(0, f"a larger mesh.fsdp than {mesh['fsdp']}")
        return f"It does not fit: {shortage(report)}. Try, in this order: {'; '.join(options)}."
    if not train:
        return "Only the training step is explained."
    sentences = []
    free = memory["headroom"] / memory["limit"]
    if free > 0.5 and setting["remat"] != "none":
        sentences.append(
            f"{free:.0%} of the memory is free: a larger batch per chip than "
            f"{setting['batch_per_chip']:g}, or less recomputation than "
            f"remat={setting['remat']}, would use it."
        )
    elif free < 0.05:
        sentences.append(
            f"Only {free:.0%} of the memory is free; a real run also holds buffers of its own, so "
            "leave more."
        )
    ratio = train["collectives_s"] / train["compute_s"]
    if ratio > 1:
        sentences.append(
            f"Moving data between chips takes {ratio:.1f} times as long as computing: more images "
            "per chip, or a smaller mesh.fsdp "
            f"(now {setting['mesh']['fsdp']}), is the first thing to change."
        )
    else:
        sentences.append(
            f"Moving data between chips takes {ratio:.0%} of the time of computing; where none of "
            "it is hidden the step takes "
            f"{train['serial_s']:.4f} s instead of {train['step_s']:.4f} s."
        )
    if setting["num_heads"] and setting["attention"].startswith("xla"):
        sentences.append(
            "Attention runs through XLA, which writes logits and bias to memory: "
            "config.model.attention=auto uses the kernel."
        )
    width = report.get("head_width")
    if width and width % 128:
        sentences.append(
            f"Heads of width {width} fill {width / (-(-width // 128) * 128):.0%} of a matrix unit; "
            "for a model trained from scratch, "
            f"heads of 128 have the same number of parameters."
        )
    top = train["dearest"][0]
    sentences.append(
        f"The dearest place is {top['operation']} ({top['source']}): "
        f"{top['seconds'] / train['compute_s']:.0%} of computing."
    )
    return " ".join(sentences)


def _heads(setting: Mapping[str, Any]) -> str:
    return f"{setting['num_heads']} heads, " if setting["num_heads"] else ""


def _memory(report: Mapping[str, Any]) -> list[str]:
    rows = [f"{'memory of each device':28}"]
    for name, size in report["memory"].items():
        if name not in ("limit", "total", "headroom"):
            rows.append(f"  {name:26} {_bytes(size):>12}")
    if "total" in report["memory"]:
        rows.append(
            f"  {'total':26} {_bytes(report['memory']['total']):>12}  of "
            f"{_bytes(report['memory']['limit'])}"
        )
        rows.append(f"  {'headroom':26} {_bytes(report['memory']['headroom']):>12}")
    return [*rows, f"{'a checkpoint':28} {_bytes(report['checkpoint_bytes']):>12}"]


def _program(name: str, program: Mapping[str, Any]) -> list[str]:
    title = {"train": "training step", "sample": "sampling, one batch"}[name]
    if not program["fits"]:
        return [f"{title}: does not fit"]
    rows = [
        f"{title} of {program['images']} images (compiled in {program['seconds_to_compile']:.0f} s)"
    ]
    work = {"train": "FLOPs, 3 forward passes", "sample": "FLOPs, all evaluations"}[name]
    rows.append(f"  {work:32} {program['flops']:.3e}")
    rows += [
        f"  {'computing':32} {program['compute_s']:.4f} s   (kernels by their schedule "
        f"{program['kernels_s']:.4f} s, "
        f"without an estimate and priced by bytes {program['by_bytes_s']:.4f} s)",
        f"  {'moving between chips, at least':32} {program['collectives_s']:.4f} s",
    ]
    rows += [
        f"    {kind:30} {entry['count']:,.0f} times, {_bytes(entry['bytes'])}"
        for kind, entry in program["collectives"].items()
    ]
    if program["between_slices_s"]:
        rows.append(f"  {'between slices, at least':32} {program['between_slices_s']:.4f} s")
    copies = program["async_copies"]
    moved = f"{copies['count']:,.0f} copies, {_bytes(copies['bytes'])}"
    rows.append(f"  {'beside it, fetching from memory':32} {copies['seconds']:.4f} s   ({moved})")
    rows.append(
        f"  {'estimated time':32} {program['step_s']:.4f} s   (one after the other: "
        f"{program['serial_s']:.4f} s)"
    )
    rows.append(
        f"  {'estimated images/s/chip':32} {program['images_per_s_per_chip']:.4g}   estimated MFU "
        f"{program['mfu']:.3f}"
    )
    if name == "sample":
        rows += _sampling(program)
    for kernel, times in program["unpriced_kernels"].items():
        rows.append(f"  NOT PRICED: {kernel}, {times:,.0f} times")
    if program["even_conditionals"]:
        rows.append(f"  all branches alike: {', '.join(program['even_conditionals'])}")
    for loop in program["unknown_loops"]:
        rows.append(f"  NOT PRICED: loop {loop} has an unknown trip count and counts once")
    rows.append("  dearest operations")
    rows += [
        f"    {entry['seconds'] * 1e3:10.2f} ms  {entry['times']:8,.0f} x  {entry['operation']:44} "
        f"{entry['source']}"
        for entry in program["dearest"]
    ]
    return rows


def _sampling(program: Mapping[str, Any]) -> list[str]:
    """How the parameters get to the network, both ways, and how long the samples of a FID take."""

    def way(copy_bytes: int) -> str:
        return (
            f"with a copy of the parameters ({_bytes(copy_bytes)})"
            if copy_bytes
            else "casting and gathering in each evaluation"
        )

    rows = [
        f"  {'50,000 samples':32} {program['hours_for_50000']:,.2f} hours, "
        f"{way(program['copy_bytes'])} (estimate)"
    ]
    other = program.get("alternative")
    if other:
        told = (
            f"{other['hours_for_50000']:,.2f} hours (estimate)" if other["fits"] else "does not fit"
        )
        rows.append(f"    {way(other['copy_bytes']) + ':':42} {told}")
    return rows


def _bytes(size: float) -> str:
    """1.50 GB (10⁹), as makers of memory and disks count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"
