"""Makes a data set to train on of pictures as people have them:

    python launch/prepare.py --source pictures --name flowers --crop center --size 64

Of latents that others made (EDM2's and REPA's layout) it makes one for latent models:

    python launch/prepare.py --source edm2-latents.zip --name imagenet256_latents --latents

Interrupted, the same command goes on where it was.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import SourceFlags

SOURCE = SourceFlags()
LATENTS = flags.DEFINE_bool(
    "latents",
    False,
    "The source holds moments of latents (img-mean-std-*.npy) instead of pictures.",
)


def main() -> None:
    from diffit_jax.ingest import import_latents, prepare
    from diffit_jax.ingest.decoding import Framing

    values = SOURCE.value
    if not LATENTS.value:
        prepare.prepare(**values)
        return
    if values.pop("framing") != Framing():
        cli.fail("--crop, --size, --channels and --upright are for pictures, not for latents")
    values.pop("workers")
    import_latents.import_latents(**values)
