"""The verb `self_test`: ADM's published samples against ADM's published figures."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluate import METRICS_SUFFIX, evaluate
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import BATCH_PER_DEVICE
from diffit_jax.runtime import hub

FID_BAR = 0.005


class Published(NamedTuple):
    """Samples, what they were compared with, and the figures that were found.

    Attributes:
      samples, reference: names of files.
      metrics: figures by name.
    """

    samples: str
    reference: str
    metrics: Mapping[str, float]


# guided-diffusion, evaluations/README.md: the one batch with all figures to their last digit.
PUBLISHED = (
    Published(
        "admnet_guided_upsampled_imagenet256.npz",
        "VIRTUAL_imagenet256_labeled.npz",
        {
            "fid": 3.94256,
            "sfid": 6.14043,
            "inception_score": 215.8370,
            "precision": 0.8265,
            "recall": 0.5309,
        },
    ),
)


def self_test(
    folder: epath.PathLike,
    *,
    inception: epath.PathLike,
    published: tuple[Published, ...] = PUBLISHED,
    batch_per_device: int = BATCH_PER_DEVICE,
) -> list[dict[str, Any]]:
    """Evaluate published samples.

    Args:
      folder: of the files; `<name of the samples>.metrics.json` is written there.
      inception: as of `evaluate`.
      published: files and their published scores.
      batch_per_device: as of `evaluate`.

    Returns:
      For each: `samples`, `metrics` (name → ours and theirs) and `passed`: whether FID is within
      `FID_BAR`.

    Raises:
      UserError: none of the files are there.
    """
    folder = hub.local(folder, "folder")
    there = [
        one
        for one in published
        if (folder / one.samples).exists() and (folder / one.reference).exists()
    ]
    if not there:
        wanted = " and ".join(published[0][:2])
        raise UserError(
            f"--folder {folder} has no published samples: fetch {wanted} from "
            "openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256"
        )
    rows = []
    for one in there:
        scores = evaluate(
            folder / one.samples,
            comparison=Comparison(
                folder / one.reference,
                inception,
                list(one.metrics),
                batch_per_device=batch_per_device,
            ),
            output=folder / f"{epath.Path(one.samples).stem}{METRICS_SUFFIX}",
        )["metrics"]
        pairs = {name: (scores[name], theirs) for name, theirs in one.metrics.items()}
        ours, theirs = pairs["fid"]
        passed = abs(ours - theirs) <= FID_BAR
        rows.append({"samples": one.samples, "metrics": pairs, "passed": passed})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the result of `self_test` as text."""
    lines = []
    for row in rows:
        lines.append(f"{row['samples']:44}{'ours':>12}{'published':>12}")
        lines += [
            f"  {name:42}{ours:12.5f}{theirs:12.5f}"
            for name, (ours, theirs) in row["metrics"].items()
        ]
        verdict = "passed" if row["passed"] else "FAILED"
        lines.append(f"  {verdict}: FID is to come within {FID_BAR} of the published one")
    return "\n".join(lines)
