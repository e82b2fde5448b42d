"""The verb `sweep`: which settings of sampling give the best scores."""

import dataclasses
import functools
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from diffit_jax import limits
from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluator import Comparison, Evaluator, check_count
from diffit_jax.evaluation.images import DrawnImages
from diffit_jax.evaluation.measuring import protocol_of
from diffit_jax.evaluation.reference import METRICS
from diffit_jax.experiment import sections
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime import backend, console, distributed, files
from diffit_jax.sampling.request import Networks, Run, SampleRequest, SamplingOptions, Weights

log = logging.getLogger(__name__)

COUNT = 5_000  # samples of each point
SCALE = "guidance.scale"
# Keys of a source, not of sampling; each has its weights.
OF_SOURCE: Mapping[str, type] = {"ema_length": float, "checkpoint": int}

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Swept:
    """What a sweep has found.

    Attributes:
      keys: that were varied, and their values.
      metric: that decides.
      points: of each combination `settings`, `metrics`, `count` and `protocol`.
    """

    keys: Mapping[str, Sequence[Any]]
    metric: str
    points: Sequence[Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any]:
        """The point with the best score."""
        sign = -1 if METRICS[self.metric].more_is_better else 1
        return min(self.points, key=lambda point: sign * point["metrics"][self.metric])

    def edges(self) -> list[str]:
        """Return a sentence for each key whose best value is at an end of those that were tried."""
        notes = []
        for key, values in self.keys.items():
            value = self.best["settings"][key]
            if (
                len(values) > 1
                and not isinstance(value, str)
                and value in (ends := (min(values), max(values)))
            ):
                which, way = ("smallest", "smaller") if value == ends[0] else ("largest", "larger")
                notes.append(
                    f"the best {key}, {value:g}, is the {which} of those tried: try {way} ones too"
                )
        return notes


@backend.reproducible_numerics()
@backend.explain_oom("lower --batch_per_device, or sampling.batch_per_device")
def sweep(
    source_of: Callable[..., Run | Weights],
    *,
    keys: Mapping[str, Sequence[Any]],
    comparison: Comparison,
    options: SamplingOptions = SamplingOptions(),
    output: epath.PathLike | None = None,
    count: int = COUNT,
    overwrite: bool = False,
) -> Swept:
    """Score samples for all combinations of settings.

    Interrupted, the same call resumes; with more values it only adds those. Guidance scales share
    one compiled function, and so do averages of all lengths.

    Args:
      source_of: the network, with `ema_length` and `checkpoint` as keyword arguments if they are
        among the keys.
      keys: values by key, from `parse`.
      comparison: as of `evaluate`. The first of its metrics decides; FID if none are named.
      options: of the samples of all points.
      output: path of the JSON, for the plot with another ending; None: `sweep.json` in the
        directory of the network.
      count: samples of each point, of the seeds 0 to `count` - 1.
      overwrite: whether another sweep may be replaced.

    Raises:
      UserError: a key that changes nothing, impossible settings, or as `evaluate`.
      interruption.Preempted, interruption.Interrupted: the measured points are kept.
    """
    # --- All points, before anything is opened that takes time.
    check_count(count)
    requests = _SweepRequests(source_of, range(count), options, keys)
    points = console.combinations(keys)
    request = [requests.point(settings) for settings in points]
    _check_effect(keys, points, request)
    first = request[0]
    default = first.source.directory / "sweep.json"
    path = files.resolve(default if output is None else output, "output")
    if not comparison.metrics:
        comparison = dataclasses.replace(
            comparison, metrics=["fid" if comparison.inception else "fd_dinov2"]
        )
    evaluator = Evaluator.open(comparison, first.shape, first.setup.mesh)
    what = _identity(first, evaluator, count)
    held = distributed.primary_first(lambda: _held(path, what, overwrite))

    # --- One point after the other; what is there is not measured again.
    partial, names = path.with_name(f"{path.name}.begun.npz"), list(map(_name, points))
    for number, (name, settings, one) in enumerate(zip(names, points, request, strict=True), 1):
        images = DrawnImages(one, requests.networks(settings, one))
        expected = protocol_of(images, evaluator.extractor, count)
        if not distributed.all_hosts(name in held and _is_of(held[name], expected)):
            words = _describe(settings)
            log.info("point %d of %d: %s", number, len(points), words)
            held[name] = {"settings": settings, **evaluator.run(images, partial, what=words)}
            write = functools.partial(_write, path, what | {"points": list(held.values())}, partial)
            distributed.on_primary(write)
    swept = Swept(keys, evaluator.metrics[0], [held[name] for name in names])
    if distributed.is_primary():
        plot(swept, path.with_suffix(".png"))
    return swept


def _identity(request: SampleRequest, evaluator: Evaluator, count: int) -> dict[str, Any]:
    """Return what all points of a sweep have in common, JSON values by name."""
    return {
        "source": str(request.source.directory),
        "reference": evaluator.reference.sha256,
        "count": count,
        "metrics": list(evaluator.metrics),
    }


def _name(settings: Settings) -> str:
    """Return the name of a point."""
    return json.dumps(settings, sort_keys=True)


def divided(settings: Settings) -> tuple[Settings, Settings]:
    """Divide settings of a point into those of its source, and those of sampling."""
    of_source = {key: value for key, value in settings.items() if key in OF_SOURCE}
    return of_source, {key: value for key, value in settings.items() if key not in OF_SOURCE}


class _SweepRequests:
    """Requests for the samples of points, which share what they can: networks, and samplers."""

    def __init__(
        self,
        source_of: Callable[..., Run | Weights],
        seeds: Sequence[int],
        options: SamplingOptions,
        keys: Mapping[str, Sequence[Any]],
    ):
        for key in keys:
            if key in options.overrides:
                raise UserError(f"--{key} and --sweep {key} both say which: leave out either")
        self._source_of, self._seeds = source_of, seeds
        self._options, self._scales = options, keys.get(SCALE)
        self._sources: dict[str, Run | Weights] = {}
        self._templates: dict[str, SampleRequest] = {}
        self._loaded: tuple[str, tuple[Any, dict[str, Any]]] | None = None

    def _source(self, settings: Settings) -> tuple[str, Run | Weights]:
        of_source, _ = divided(settings)
        name = json.dumps(of_source)
        if name not in self._sources:
            self._sources[name] = self._source_of(**of_source)
        return name, self._sources[name]

    def point(self, settings: Settings) -> SampleRequest:
        """Return the request of a point."""
        _, source = self._source(settings)
        _, of_sampling = divided(settings)
        if self._scales:  # the farthest from 1: it is guided
            of_sampling[SCALE] = max(self._scales, key=lambda scale: abs(scale - 1))
        name = json.dumps(of_sampling)
        if name not in self._templates:
            setup = next((one.setup for one in self._templates.values()), None)
            setup = setup or setup_experiment(
                source.config, to_train=False, config_file=source.config_file
            )
            overrides = {**self._options.overrides, **of_sampling}
            options = dataclasses.replace(self._options, overrides=overrides)
            self._templates[name] = SampleRequest.make(
                source, seeds=self._seeds, options=options, setup=setup
            )
        request = dataclasses.replace(self._templates[name], source=source)
        return request.with_scale(settings[SCALE]) if self._scales else request

    def networks(self, settings: Settings, request: SampleRequest) -> Networks:
        """Return the networks of a point; the last source's stay in memory."""
        name, source = self._source(settings)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # before the next ones come
            self._loaded = name, source.load(request.setup)
        return request.bundle(*self._loaded[1])


def _check_effect(
    keys: Mapping[str, Sequence[Any]],
    combinations: Sequence[Settings],
    request: Sequence[SampleRequest],
) -> None:
    """Raise `UserError` if two values of a key ask for the same samples."""
    seen: dict[str, Settings] = {}
    for settings, one in zip(combinations, request, strict=True):
        of_source, _ = divided(settings)
        identity = json.dumps([one.settings(), of_source], sort_keys=True, default=str)
        if identity in seen:
            other = seen[identity]
            key = next((key for key in keys if settings[key] != other[key]), next(iter(keys)))
            raise UserError(
                f"--sweep {key}={other[key]},{settings[key]} changes nothing: the samples are the "
                "same; sweep another key, or leave a value out"
            )
        seen[identity] = settings


def _held(path: epath.Path, what: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """Return the points of an earlier, perhaps interrupted sweep, by their settings."""
    files.make_directory(path.parent, "output directory")
    found = files.Artifact(
        path, what, of=lambda held: {key: held.get(key) for key in what}
    ).inspect()
    if overwrite or found.state == "missing":
        return {}
    for key, value in what.items():
        if found.state == "other" and (key in found.differences or not found.content):
            raise UserError(
                f"{path} holds a sweep with another {key} ({found.content.get(key)}, now {value}): "
                "name another --output, or say --overwrite"
            )
    return {
        json.dumps(point["settings"], sort_keys=True): point for point in found.content["points"]
    }


def _write(path: epath.Path, content: Mapping[str, Any], partial: epath.Path) -> None:
    files.write_json(path, content)
    partial.unlink(missing_ok=True)


def _is_of(point: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a point was measured by this protocol."""
    theirs = point["protocol"]
    return not files.differences(expected, {name: theirs.get(name) for name in expected})


def parse(text: str) -> dict[str, list[Any]]:
    """Parse `guidance.scale=1,1.5,2,ema_length=0.05,0.1` to values by key, of the key's type.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    kinds: dict[str, Callable[[str], Any]] = dict(OF_SOURCE)
    for section, classes in sections.CHOICES.items():
        kinds[section] = str
        for cls in classes.values():
            for field in dataclasses.fields(cls):
                kind = limits.type_of(field.type)
                if kind in (int, float, str) and not limits.is_path(field.type):
                    kinds[f"{section}.{field.name}"] = kind
    kinds |= {"pixel_rounding": str, "batch_per_device": int}
    return console.parse_sweep(text, {key: console.SweepKey(kind) for key, kind in kinds.items()})


def table(swept: Swept) -> str:
    """Format every point as text, the best one marked."""
    names = [*swept.points[0]["metrics"]]
    rows = [[*swept.keys, *names, ""]]
    for point in swept.points:
        values = [_short(point["settings"][key]) for key in swept.keys]
        scores = [f"{point['metrics'][name]:.5g}" for name in names]
        rows.append([*values, *scores, "← best" if point is swept.best else ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    count = min(point["count"] for point in swept.points)
    return "\n".join([*lines, f"({count} samples for each point)", *swept.edges()])


def plot(swept: Swept, path: epath.Path) -> None:
    """Draw the deciding metric over the first key of numbers, a line per combination of the others.

    Without matplotlib, or if it cannot be written, that is logged: nothing depends on it.
    """
    numeric = [key for key, values in swept.keys.items() if not isinstance(values[0], str)]
    if not numeric:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot of the sweep: pip install matplotlib")
        return
    # One line for each combination of the other keys.
    axis, others = numeric[0], [key for key in swept.keys if key != numeric[0]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in itertools.product(*(swept.keys[key] for key in others)):
        chosen = dict(zip(others, line, strict=True))
        of_line = sorted(_points_of(swept, chosen), key=lambda point: point["settings"][axis])
        x = [point["settings"][axis] for point in of_line]
        y = [point["metrics"][swept.metric] for point in of_line]
        axes.plot(x, y, marker="o", label=_describe(chosen) or None)
    best = swept.best
    axes.plot(
        best["settings"][axis],
        best["metrics"][swept.metric],
        *("o",),
        markersize=14,
        fillstyle="none",
        color="black",
        label="best",
    )
    axes.set_xlabel(axis)
    axes.set_ylabel(swept.metric)
    axes.set_title(f"{swept.metric} of {best['count']} samples")
    axes.grid(alpha=0.3)
    axes.legend()
    # Into memory first: matplotlib cannot write to gs://.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    try:
        files.write_bytes(path, content.getvalue())
        log.info("wrote %s", path)
    except UserError as error:
        log.warning("%s", error)


def _points_of(swept: Swept, chosen: Settings) -> Iterator[Mapping[str, Any]]:
    for point in swept.points:
        if all(point["settings"][key] == value for key, value in chosen.items()):
            yield point


def _describe(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
