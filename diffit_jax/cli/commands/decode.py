r"""Decodes samples that are latents to images.

    diffit decode --latents runs/flowers/latents_100x32x32x4.npz \
        --vae hf://stabilityai/sd-vae-ft-ema

The images are written as `diffit sample --vae` writes them. Interrupted, the same command resumes.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import DecodingFlags, define_images

LATENTS = cli.define_path(
    "latents", "npz file of latents, as `diffit sample` writes them without --vae.", to_read=True
)
OUTPUT = cli.define_path(
    "output", "npz file to write; default: samples_NxHxWxC.npz beside the latents."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace other samples.")
IMAGES = define_images()
DECODING = DecodingFlags()


def check() -> None:
    """Look whether the flags go together."""
    cli.require_one(latents=LATENTS.value)
    DECODING.check()
    if not DECODING.given:
        cli.fail("--vae is missing: name the autoencoder that the latents are of")


def main() -> None:
    """Run the command."""
    from diffit_jax.sampling.decode import decode

    decoding = DECODING.decoding()
    assert decoding is not None
    path = decode(
        LATENTS.value,
        decoding=decoding,
        output=OUTPUT.value,
        overwrite=OVERWRITE.value,
        images=IMAGES.value,
    )
    print(f"wrote {path} and {path.with_suffix('.png')}")
