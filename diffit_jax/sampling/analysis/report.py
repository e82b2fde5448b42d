"""An analysis as pictures and as a short text."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffit_jax.experiment.spaces import Space
from diffit_jax.sampling.analysis import spectra
from diffit_jax.sampling.analysis.analyse import TIME_SHARES, Analysed

COLUMNS, ROWS = 8, 4  # steps and layers of which maps are drawn
_WORDS = {
    "q_from_time": "time's share of the queries",
    "v_from_time": "time's share of the values",
    "logits_time": "time's share of the logits' variance",
    "change": "attention that moves, against the frozen time",
}


def pictures(analysed: Analysed, space: Space) -> dict[str, bytes]:
    """Draw everything: PNG files by name. Raises ImportError without matplotlib."""
    draw: dict[str, Callable[[Analysed], Any]] = {
        "maps": lambda found: _maps(found, space),
        "heads": _heads,
        "time": _time,
        "variance": _variance,
        "spectra": _spectra,
    }
    found = {}
    for name, one in draw.items():
        content = io.BytesIO()
        one(analysed).savefig(content, format="png", dpi=110)
        found[name] = content.getvalue()
    return found


def _figure(**settings: Any) -> Any:
    from matplotlib.figure import Figure  # half a second, and not everybody has it

    return Figure(**settings)


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many numbers below `count`, evenly spread, ends included."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _maps(analysed: Analysed, space: Space) -> Any:
    """Draw the first image's estimates, and the attention of its query by layer."""
    steps = _spread(len(analysed.sigmas), COLUMNS)
    names = list(analysed.layers)
    layers = [names[index] for index in _spread(len(names), ROWS)]
    figure = _figure(figsize=(1.25 * len(steps) + 1.2, 1.3 * (1 + 2 * len(layers))))
    panels = figure.subplots(1 + 2 * len(layers), len(steps), squeeze=False)
    shown = space.preview(np.asarray(space.from_model(analysed.denoised[steps, 0])))
    for axes, image, step in zip(panels[0], shown, steps, strict=True):
        axes.imshow(image.squeeze(), cmap="gray")
        axes.set_title(f"σ = {analysed.sigmas[step]:.3g}", fontsize=8)
    panels[0][0].set_ylabel("estimate", fontsize=7)
    for row, layer in enumerate(layers):
        for offset, name in enumerate(("map", "map_frozen")):
            of_steps = analysed.layers[layer][name][steps, 0].mean(1)  # over heads
            side = int(of_steps.shape[-1] ** 0.5)  # tokens outside the grid are left out
            of_steps = of_steps[:, : side * side].reshape(-1, side, side)
            for axes, weights in zip(panels[1 + 2 * row + offset], of_steps, strict=True):
                axes.imshow(weights, cmap="viridis", vmin=0, vmax=max(of_steps.max(), 1e-9))
            label = layer if offset == 0 else f"{layer}\ntime frozen"
            panels[1 + 2 * row + offset][0].set_ylabel(label, fontsize=7)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle("Attention of one query, mean over heads", fontsize=10)
    figure.tight_layout()
    return figure


def _rows_of_heads(analysed: Analysed, value: Callable[[str], np.ndarray]) -> np.ndarray:
    """Stack (…, H) of every layer to (all heads, …)."""
    return np.concatenate([np.moveaxis(value(layer), -1, 0) for layer in analysed.layers])


def _ticks(analysed: Analysed) -> tuple[list[int], list[str]]:
    """Return where each layer's heads begin, and its name."""
    counts = [layer["change"].shape[-1] for layer in analysed.layers.values()]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
    names = list(analysed.layers)
    keep = _spread(len(names), 24)
    return [starts[index] for index in keep], [names[index] for index in keep]


def _heads(analysed: Analysed) -> Any:
    count = sum(layer["change"].shape[-1] for layer in analysed.layers.values())
    figure = _figure(figsize=(9, min(2 + 0.16 * count, 12)), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("entropy", "reach"),
        ("entropy / largest", "reach, tokens"),
        strict=True,
    ):
        of_name = _rows_of_heads(
            analysed, lambda layer, name=name: analysed.layers[layer][name].mean((1, 3))
        )
        mesh = axes.imshow(of_name, aspect="auto", interpolation="nearest")
        axes.set_title(title)
        figure.colorbar(mesh, ax=axes)
        steps = _spread(len(analysed.sigmas), 6)
        axes.set_xticks(steps, [f"{analysed.sigmas[step]:.2g}" for step in steps])
        axes.set_xlabel("noise level σ, from noise to data")
        axes.set_yticks(*_ticks(analysed), fontsize=6)
    return figure


def _time(analysed: Analysed) -> Any:
    figure = _figure(figsize=(10, 7), layout="constrained")
    names = list(analysed.layers)
    for axes, name in zip(figure.subplots(2, 2).flat, TIME_SHARES, strict=True):
        for number, layer in enumerate(names):
            colour = (0.15, 0.3 + 0.6 * number / max(len(names) - 1, 1), 0.75)
            label = layer if number in _spread(len(names), 8) else None
            of_layer = analysed.layers[layer][name].mean(-1)
            axes.semilogx(analysed.sigmas, of_layer, color=colour, label=label)
        axes.set_title(_WORDS[name], fontsize=10)
        axes.set_xlabel("noise level σ")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    return figure


def _variance(analysed: Analysed) -> Any:
    figure = _figure(figsize=(10, 5), layout="constrained")
    for axes, name in zip(
        figure.subplots(2, 1, sharex=True), ("excess_reach", "entropy"), strict=True
    ):
        shares = np.concatenate([analysed.variance(layer, name) for layer in analysed.layers])
        bottom = np.zeros(len(shares))
        for column, part in enumerate(("time", "image", "position", "rest")):
            axes.bar(range(len(shares)), shares[:, column], 1.0, bottom=bottom, label=part)
            bottom += shares[:, column]
        axes.set_ylabel(f"variance of {name.partition('_')[2] or name}")
        axes.set_xticks(*_ticks(analysed), rotation=90, fontsize=6)
    axes.legend(ncol=4, fontsize=8)
    return figure


def _spectra(analysed: Analysed) -> Any:
    power = spectra.radial_power(analysed.denoised).mean(1)
    update = spectra.radial_power(np.diff(analysed.denoised, axis=0)).mean(1)
    figure = _figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, values, title in (
        (left, power, "power of the estimate"),
        (middle, update, "power of its change in a step"),
    ):
        for step in _spread(len(values), COLUMNS):
            colour = (0.2, 0.2 + 0.7 * step / len(values), 0.8)
            label = f"σ {analysed.sigmas[step]:.2g}"
            axes.semilogy(np.maximum(values[step], 1e-12), color=colour, label=label)
        axes.set_title(title)
        axes.set_xlabel("periods per image")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    settled = spectra.settled_at(analysed.denoised)
    right.semilogy(analysed.sigmas[settled], "o-")
    right.set_title("noise level at which a frequency settles")
    right.set_xlabel("periods per image")
    right.grid(alpha=0.3)
    for axes in (left, middle, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def text(analysed: Analysed, name: str, origin: Mapping[str, Any]) -> str:
    """Format the report."""
    layers, sigmas = analysed.layers, analysed.sigmas
    first, last = f"{sigmas[0]:.3g}", f"{sigmas[-1]:.3g}"

    def mean(figure: str, step: int) -> float:
        return float(np.mean([layer[figure][step].mean() for layer in layers.values()]))

    lines = [
        "# Attention over time",
        "",
        f"{name}; {', '.join(f'{key} {value}' for key, value in origin.items())}. "
        f"{analysed.denoised.shape[1]} samples from σ = {first} to {last} in {len(sigmas)} steps, "
        f"unguided, by Euler's method; time is frozen at σ = {analysed.frozen:.3g} where it says "
        "so. Means over layers, heads, images and positions, unless said otherwise.",
        "",
        f"| | σ = {first} | σ = {sigmas[len(sigmas) // 2]:.3g} | σ = {last} |",
        "|---|---|---|---|",
    ]
    titles = {
        "entropy": "entropy, as a share of the largest",
        "reach": "reach, tokens",
        **_WORDS,
        "logits_content": "content's share of the logits' variance",
        "logits_position": "the position bias's",
    }
    for figure, title in titles.items():
        cells = [f"{mean(figure, step):.3g}" for step in (0, len(sigmas) // 2, len(sigmas) - 1)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    shares = np.concatenate([analysed.variance(layer, "excess_reach") for layer in layers])
    by_time = int((shares[:, 0] > shares[:, 1:3].max(1)).sum())
    settled = sigmas[spectra.settled_at(analysed.denoised)]
    effect = max(float(layer["key_effect"].max()) for layer in layers.values())
    key_share = float(np.mean([layer["k_from_time"].mean() for layer in layers.values()]))
    lines += [
        "",
        f"**Heads.** Of {len(shares)} heads, the reach of {by_time} varies more with time than "
        "with the image or the position (less what a place in the window makes of uniform "
        f"attention); means of the shares: time {shares[:, 0].mean():.2f}, image "
        f"{shares[:, 1].mean():.2f}, position {shares[:, 2].mean():.2f}, together "
        f"{shares[:, 3].mean():.2f}.",
        "",
        "**Frequencies** settle (a tenth of their power is still to come) at σ = "
        + ", ".join(f"{level:.2g}" for level in settled)
        + f" for 0 to {len(settled) - 1} periods per image.",
        "",
        f"**The keys' time projection** has {key_share:.2f} of the keys' mean square, and changes "
        f"no weight by more than {effect:.1e}: the softmax cancels it.",
        "",
        "`analysis.npz` holds all of it by layer and head; pictures are beside it, if matplotlib "
        "is installed.",
    ]
    return "\n".join(lines) + "\n"
