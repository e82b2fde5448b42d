"""Makes a data set to train on from images as people have them.

    python launch/prepare.py --source images --name flowers --crop center --size 64

Of latents that others made (EDM2's and REPA's layout) it makes one for latent models:

    python launch/prepare.py --source edm2-latents.zip --name imagenet256_latents --latents

Interrupted, the same command resumes.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import SourceFlags

SOURCE = SourceFlags()
LATENTS = flags.DEFINE_bool(
    "latents", False, "The source holds moments of latents (img-mean-std-*.npy) instead of images."
)


def main() -> None:
    """Run the command."""
    from diffit_jax.ingest import import_latents, prepare
    from diffit_jax.ingest.decoding import Preprocessing

    values = SOURCE.value
    if not LATENTS.value:
        prepare.prepare(**values)
        return
    if values.pop("preprocessing") != Preprocessing():
        cli.fail("--crop, --size, --channels and --upright are for images, not for latents")
    values.pop("workers")
    import_latents.import_latents(**values)
