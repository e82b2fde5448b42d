r"""Draws samples from a run or from released weights.

    diffit sample --workdir runs/digits --seeds 0-63 --labels 3,5 --guidance.scale 1.5
    diffit sample --weights diffit_256.safetensors --labels "golden retriever,88" \
        --vae sd-vae-ft-ema

If interrupted, run the same command again to resume.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import DecodingFlags, NetworkFlags, SamplingFlags, define_images

NETWORK = NetworkFlags()
SEEDS = cli.define_numbers("seeds", "0-99", "Seed numbers, one sample each: 7, 0-63 or 0-9,20-29.")
LABELS = flags.DEFINE_string(
    "labels",
    None,
    "Labels given out in turn: 3, 0-9, names of classes, or random; default: seed modulo "
    "the number of classes.",
)
OUTPUT = cli.define_path(
    "output",
    "npz file to write; default: samples_NxHxWxC.npz in the work directory or beside the weights, "
    "with the settings that differ from the defaults in its name, NAME below.",
)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace files that were made with other settings."
)
IMAGES = define_images()
DECODING = DecodingFlags()
GRID = flags.DEFINE_bool(
    "grid",
    False,
    "Draw NAME.classes.png too: a row of up to ten for each of the first twenty labels.",
)
TRAJECTORY = flags.DEFINE_integer(
    "trajectory",
    0,
    "Draw NAME.trajectory.png too, with so many columns: the clean image as it is estimated "
    "along the way, for the first eight samples.",
    lower_bound=0,
)
CLUSTER = cli.define_cluster()

SAMPLING = SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …


def check() -> None:
    """Look whether the flags go together."""
    NETWORK.check()
    DECODING.check()


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime.console import parse_numbers
    from diffit_jax.sampling.sample import sample

    path = sample(
        NETWORK.source(),
        seeds=parse_numbers("--seeds", SEEDS.value),
        labels=LABELS.value,
        output=OUTPUT.value,
        overwrite=OVERWRITE.value,
        overrides=SAMPLING.value,
        decoding=DECODING.decoding(),
        by_class=GRID.value,
        frames=TRAJECTORY.value,
        images=IMAGES.value,
    )
    print(f"wrote {path} and {path.with_suffix('.png')}")
