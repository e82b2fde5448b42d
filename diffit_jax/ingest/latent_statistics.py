"""Mean and standard deviation of each channel of unscaled latents.

Computed while a data set is encoded, and compared with published ones.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffit_jax.data.records import Manifest

log = logging.getLogger(__name__)

# ImageNet's training set in latents of sd-vae-ft-mse (-ema has the same encoder), pixels in
# [-1, 1]: 256 px by iMF, to three digits also by diffuse_nnx; 512 px by the latter alone.
PUBLISHED: Mapping[int, Mapping[str, Sequence[float]]] = {
    256: {
        "mean": (0.86488, -0.27787, 0.21617, 0.37384),
        "std": (4.85504, 5.31922, 3.93725, 3.98700),
    },
    512: {"mean": (1.560, -0.695, 0.483, 0.729), "std": (5.27, 5.91, 4.21, 4.31)},
}
# What ours may differ by at 256 px: of the mean in standard deviations, of these as a fraction.
MEAN_BOUND, STD_BOUND = 0.02, 0.02
IMAGENET_TRAIN = 1_281_167
_MAY_LACK = 100


def sums_of(moments: np.ndarray) -> dict[str, np.ndarray]:
    """Sum moments to what statistics are made of, by channel, float64.

    (n, orientations, h, w, 2c) float32 moments → sums of values, of their expected squares, and
    their count.
    """
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    axes = (0, 1, 2, 3)
    return {
        "sum": mean.sum(axes),
        "square": (mean**2 + np.exp(log_variance)).sum(axes),
        "count": np.array(mean.size / mean.shape[-1]),
    }


def of_sums(sums: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return `mean` and `std` of draws from the posteriors, by channel."""
    if not sums:
        return {}
    mean = sums["sum"] / sums["count"]
    variance = np.maximum(sums["square"] / sums["count"] - mean**2, 0)
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}


def say(manifest: Manifest) -> None:
    """Log a manifest's statistics, and how they compare with published ones."""
    for level, line in lines(manifest):
        log.log(level, "%s", line)


def lines(manifest: Manifest) -> list[tuple[int, str]]:
    """Return (level of the log, text) of the statistics, with published ones of the same data.

    With a warning where they differ at 256 px. For other data sets nothing is compared.
    """
    found = manifest.statistics
    if not found:
        return []
    messages = [
        (logging.INFO, f"latents: mean {_short(found['mean'])}, std {_short(found['std'])}")
    ]
    # Nothing to compare unless it is ImageNet through Stable Diffusion's encoder.
    size = _published_size(manifest)
    if size is None:
        return messages
    published = PUBLISHED[size]
    messages.append(
        (
            logging.INFO,
            f"published at {size} px: mean {_short(published['mean'])}, std "
            f"{_short(published['std'])}",
        )
    )
    if size != 256:
        return messages
    # In units of the published deviation.
    mean, std = (np.array(found[name]) for name in ("mean", "std"))
    their_mean, their_std = (np.array(published[name]) for name in ("mean", "std"))
    off_mean = np.abs(mean - their_mean) / their_std
    off_std = np.abs(std / their_std - 1)
    if off_mean.max() > MEAN_BOUND or off_std.max() > STD_BOUND:
        text = (
            f"these are not the published latents: means differ by up to {off_mean.max():.3f} std "
            f"(at most {MEAN_BOUND}), std by up to {off_std.max():.1%} (at most {STD_BOUND:.0%}); "
            "check the source, --crop and --vae"
        )
        messages.append((logging.WARNING, text))
    return messages


def _published_size(manifest: Manifest) -> int | None:
    """Return the side at which there are published statistics of the same data.

    That is ImageNet's training set by ADM's crop through an encoder of `sd-vae-ft-*`.
    """
    lacking = IMAGENET_TRAIN - manifest.count
    autoencoder: Mapping[str, Any] = manifest.autoencoder
    same = (
        len(manifest.classes) == 1000
        and 0 <= lacking <= _MAY_LACK
        and manifest.source.get("split") == "train"
        and manifest.crop.get("crop") == "adm"
        and "sd-vae-ft-" in str(autoencoder.get("path"))
    )
    size = manifest.crop.get("size")
    return size if same and size in PUBLISHED else None


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
