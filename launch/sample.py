"""Draws samples from a run or from released weights:

    python launch/sample.py --workdir runs/digits --seeds 0-63 --labels 3,5 --guidance.scale 1.5
    python launch/sample.py --weights diffit_256.safetensors --labels "golden retriever,88" \\
        --vae sd-vae-ft-ema

Interrupted, the same command goes on where it was.
"""

from absl import flags

from diffit_jax import cli

WORKDIR = cli.define_path("workdir", "Directory of the run, local or gs://.")
WEIGHTS = cli.define_path(
    "weights", "Released weights (safetensors, on a local or mounted disk) instead of a run."
)
CONFIG = cli.define_config(
    "Config whose process and sampling the weights are used with; default: "
    "configs/imagenet{256,512}_latent.py."
)
SEEDS = flags.DEFINE_string("seeds", "0-99", "Seed numbers, one sample each: 7, 0-63 or 0-9,20-29.")
LABELS = flags.DEFINE_string(
    "labels",
    None,
    "Labels given out in turn: 3, 0-9, names of ImageNet classes, or random; default: seed modulo "
    "the number of classes.",
)
OUTPUT = cli.define_path(
    "output",
    "npz file to write; default: samples_NxHxWxC.npz in the work directory or beside the weights, "
    "with what differs from the default.",
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace files of another request.")
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint",
    None,
    "With --workdir: step of an older checkpoint; default: the newest.",
    lower_bound=0,
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Use weights that have NaNs or infinities."
)
EMA_LENGTH = flags.DEFINE_float(
    "ema_length",
    None,
    "With --workdir: average the parameters over this share of training, from the run's snapshots "
    "(ema.power_lengths).",
)
VAE = cli.define_path(
    "vae",
    "Folder of the autoencoder (diffusers' AutoencoderKL) that decodes latents to images; without "
    "it, latents are written.",
)
VAE_DTYPE = flags.DEFINE_enum(
    "vae_dtype", None, ["float32", "bfloat16"], "Of the autoencoder's convolutions."
)
VAE_AT_ONCE = flags.DEFINE_integer(
    "vae_at_once",
    None,
    "Latents that a device decodes at once; default: 1 on a CPU, else 4.",
    lower_bound=1,
)
GRID = flags.DEFINE_bool(
    "grid", False, "Draw NAME.classes.png too: a row of ten for each of the first twenty labels."
)
TRAJECTORY = flags.DEFINE_integer(
    "trajectory",
    0,
    "Draw NAME.trajectory.png too, in so many columns: the clean image as it is estimated along "
    "the way, for the first eight samples.",
    lower_bound=0,
)
CLUSTER = cli.define_cluster()

SAMPLING = cli.SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …


def main() -> None:
    from diffit_jax.runtime.ranges import parse_numbers
    from diffit_jax.sampling.decoder import Decoding
    from diffit_jax.sampling.networks import Run, Weights, config_for_weights
    from diffit_jax.verbs.sample import sample

    cli.require_one(workdir=WORKDIR.value, weights=WEIGHTS.value)
    if WORKDIR.value and CONFIG.value:
        cli.fail("--config goes with --weights: a work directory has a config of its own")
    if EMA_LENGTH.value is not None and not WORKDIR.value:
        cli.fail("--ema_length goes with --workdir: a file of weights holds one average")
    if CHECKPOINT.value is not None and not WORKDIR.value:
        cli.fail("--checkpoint goes with --workdir: a file of weights holds one state")
    if WORKDIR.value:
        source = Run(WORKDIR.value, EMA_LENGTH.value, CHECKPOINT.value, ALLOW_NONFINITE.value)
    else:
        config = config_for_weights(CONFIG.value, WEIGHTS.value)
        source = Weights(WEIGHTS.value, config, ALLOW_NONFINITE.value)
    decoding = None
    if VAE.value:
        decoding = Decoding(VAE.value, VAE_DTYPE.value or "float32", VAE_AT_ONCE.value)
    elif VAE_DTYPE.value or VAE_AT_ONCE.value:
        cli.fail("--vae_dtype and --vae_at_once go with --vae")
    path = sample(
        source,
        parse_numbers("--seeds", SEEDS.value),
        LABELS.value,
        OUTPUT.value,
        OVERWRITE.value,
        SAMPLING.value,
        decoding,
        GRID.value,
        TRAJECTORY.value,
    )
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main, CLUSTER)
