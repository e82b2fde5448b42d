"""The verb `evaluate`: from samples and a reference to the scores of ADM's suite."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation import classes
from diffit_jax.evaluation.evaluator import WITH_DEVIATION, Comparison, Evaluator, check_count
from diffit_jax.evaluation.images import DrawnImages, Images, open_samples
from diffit_jax.evaluation.reference import METRICS
from diffit_jax.runtime import backend, distributed, files, hub, parallel
from diffit_jax.sampling.request import Run, SampleRequest, SamplingOptions, Weights

log = logging.getLogger(__name__)

COUNT = 50_000  # samples of ADM's protocol, where they are drawn
METRICS_SUFFIX = ".metrics.json"


@backend.reproducible_numerics()
@backend.explain_oom("lower --batch_per_device, or sampling.batch_per_device")
def evaluate(
    samples: epath.PathLike | Run | Weights,
    *,
    comparison: Comparison,
    options: SamplingOptions = SamplingOptions(),
    seeds: Sequence[Sequence[int]] | None = None,
    count: int | None = None,
    output: epath.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure samples against a reference and write the scores as JSON.

    Interrupted, the same call resumes.

    Args:
      samples: an npz file with `arr_0` (N, H, W, 3 or 1) uint8, a folder or an archive of images,
        read as a stream; or a `Run` or `Weights`, whose samples are drawn and not kept.
      comparison: the reference, and how samples are compared with it.
      options: of the samples of a network.
      seeds: sets of seed numbers of a network's samples; None: one, 0 to `count` - 1. Each set is
        measured by itself, and the one of the lowest FID counts: EDM's protocol is the lowest of
        three.
      count: how many of the first samples; None: all, or of a network 50,000.
      output: path of the JSON; None: `<name of the samples>.metrics.json` next to them, or in the
        work directory.
      overwrite: whether the scores of other samples may be replaced.

    Returns:
      `metrics`: the scores by name; `count`; and `protocol`: what they depend on. Of several sets
      those of the lowest FID, and `sets`: `seeds`, `metrics` and `samples_digest` of each.

    Raises:
      UserError: files or weights that cannot be read or do not belong together, fewer samples than
        asked for, samples that are no uint8 images or not finite, or an output that holds the
        scores of others.
      interruption.Preempted, interruption.Interrupted: the measured part is kept next to the
      output.
    """
    # --- The samples, before anything else is opened.
    if isinstance(samples, Run | Weights):
        drawn, mesh, default = _draw_samples(samples, options, seeds, count)
    elif seeds is not None:
        raise UserError("--seeds goes with a network: samples that are there are as they are")
    else:
        drawn, mesh, default = _open_samples(samples)
    output = files.resolve(default if output is None else output, "output")
    for images in drawn:
        if count is not None and count > images.count:
            raise UserError(
                f"{images.metadata['samples']} has {images.count} samples, --count asks for "
                f"{count}: draw more, or ask for fewer"
            )
        check_count(images.count if count is None else count)
    distributed.on_primary(lambda: _refuse_others(output, drawn[0], overwrite))
    evaluator = Evaluator.open(comparison, drawn[0].shape, mesh)
    lowest = next((name for name in ("fid", "fd_dinov2") if name in evaluator.metrics), None)
    if len(drawn) > 1 and lowest is None:
        raise UserError(
            "of several --seeds the lowest FID counts: add fid to --metrics (or fd_dinov2)"
        )

    fewest, sizes = min(images.count for images in drawn), evaluator.extractor.sizes
    for name, key in (("fid", "mu"), ("fd_dinov2", "mu_dinov2")):
        if name in evaluator.metrics and (count or fewest) <= sizes[key]:
            log.warning(
                "%s of %d samples in %d features is far above that of many: measure more than %d",
                *(METRICS[name].title, count or fewest, sizes[key], sizes[key]),
            )

    # --- Measure and compare, one set after the other. What is measured stays until all is:
    # interrupted, it is not measured again.
    places = [
        output.with_name(f"{output.name}.begun{number or ''}.npz") for number in range(len(drawn))
    ]
    of_sets = [
        evaluator.run(images, place, count=count, keep=place != places[-1])
        for images, place in zip(drawn, places, strict=True)
    ]
    scores = min(of_sets, key=lambda one: one["metrics"].get(lowest, 0.0))
    if len(of_sets) > 1:
        scores |= {"sets": [_of_set(**one) for one in of_sets]}

    def write() -> None:
        files.write_json(output, scores)
        for place in places:
            place.unlink(missing_ok=True)
        log.info("wrote %s", output)

    distributed.on_primary(write)
    return scores


_Samples = tuple[Sequence[Images], jax.sharding.Mesh, epath.Path]  # …, and where scores go


def _draw_samples(
    source: Run | Weights,
    options: SamplingOptions,
    seeds: Sequence[Sequence[int]] | None,
    count: int | None,
) -> _Samples:
    """Return the samples of a network, one `Images` for each set of seeds."""
    if seeds is not None and count is not None:
        raise UserError("--seeds and --count both say how many samples: leave out either")
    sets = seeds or [range(COUNT if count is None else count)]
    every = [SampleRequest.make(source, seeds=one, options=options) for one in sets]
    networks, path = every[0].load(), every[0].output(None)
    lowest = f".lowest_of_{len(sets)}" if len(sets) > 1 else ""
    output = path.with_name(f"{path.stem}{lowest}{METRICS_SUFFIX}")
    return [DrawnImages(one, networks) for one in every], every[0].setup.mesh, output


def _open_samples(samples: epath.PathLike) -> _Samples:
    """Open the samples of a file or folder."""
    path = hub.local(samples, "samples")
    name = path.name if path.is_dir() else path.stem
    output = hub.output_directory(samples, path) / f"{name}{METRICS_SUFFIX}"
    return [open_samples(path)], parallel.any_mesh(), output


def _of_set(metrics: Mapping[str, float], protocol: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Return the entry of one of several sets in the scores."""
    seeds, digest = protocol["seeds"], protocol["samples_digest"]
    return {"seeds": seeds, "metrics": metrics, "samples_digest": digest}


def table(scores: Mapping[str, Any]) -> str:
    """Format the scores of `evaluate` as text."""
    metrics, protocol = scores["metrics"], scores["protocol"]
    lines = [
        f"{METRICS[name].title:20}{value:12.5f}"
        + (f" ± {metrics[f'{name}_std']:.5f}" if name in WITH_DEVIATION else "")
        for name, value in metrics.items()
        if name in METRICS
    ]
    reference = epath.Path(protocol["reference"]["path"]).name
    for one in scores.get("sets", ()):
        name = "fid" if "fid" in one["metrics"] else "fd_dinov2"
        lines.append(
            f"{METRICS[name].title} of seeds {one['seeds']:20}{one['metrics'][name]:12.5f}"
        )
    rules = [protocol["resize"]] if "resize" in protocol else []
    rules += [f"{protocol['dinov2']['resize']} (DINOv2)"] if "dinov2" in protocol else []
    lines.append(
        f"({scores['count']} samples against {reference}; resize {', '.join(rules)}, labels "
        f"{protocol['labels']})"
    )
    if "by_class" in scores:
        lines += ["", classes.table(scores["by_class"])]
    return "\n".join(lines)


def _refuse_others(output: epath.Path, images: Images, overwrite: bool) -> None:
    """Raise `UserError` if scores of other samples would be replaced, or cannot be written."""
    files.make_directory(output.parent, "output directory")
    found = files.Artifact(
        output,
        {"samples": images.metadata["samples"]},
        of=lambda scores: {"samples": scores.get("protocol", {}).get("samples")},
    ).inspect()
    if found.state == "other" and not overwrite:
        theirs, _ = found.differences.get("samples", (None, None))
        what = f"holds the scores of {theirs}" if theirs else "holds scores of another kind"
        raise UserError(f"{output} {what}: name another --output, or say --overwrite")
