"""Makes a data set to train on from a folder or an archive of images.

    diffit prepare --source images --name flowers --crop center --size 64

Latents in EDM2's and REPA's layout are imported by:

    diffit prepare --source edm2-latents.zip --name imagenet256_latents --latents

If interrupted, run the same command again to resume.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import SourceFlags

SOURCE = SourceFlags()
HOLDOUT = flags.DEFINE_float(
    "holdout",
    0.0,
    "Share of the images that becomes the split test, by a hash of their pixels: copies stay "
    "in one split, and images that come later move no others.",
    lower_bound=0.0,
    upper_bound=0.9,
)
PREVIEW = flags.DEFINE_bool(
    "preview", False, "Draw what was prepared, a row for each class: SPLIT.preview.png."
)
LATENTS = flags.DEFINE_bool(
    "latents", False, "The source holds moments of latents (img-mean-std-*.npy) instead of images."
)


def check() -> None:
    """Look whether the flags go together."""
    SOURCE.check()
    if LATENTS.value and (HOLDOUT.value or PREVIEW.value):
        cli.fail("--holdout and --preview are for images, not for latents")


def main() -> None:
    """Run the command."""
    from diffit_jax.ingest import import_latents, prepare
    from diffit_jax.ingest.decoding import Preprocessing

    values = SOURCE.value
    if not LATENTS.value:
        prepare.prepare(**values, holdout=HOLDOUT.value, preview=PREVIEW.value)
        return
    if values.pop("preprocessing") != Preprocessing():
        cli.fail("--crop, --size, --channels and --upright are for images, not for latents")
    values.pop("workers")
    values.pop("tar_classes")
    import_latents.import_latents(**values)
