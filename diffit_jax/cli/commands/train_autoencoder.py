"""Trains a small autoencoder with L1 and KL losses, no adversarial loss; or resumes.

On a data set that diffit prepare has written:

    diffit train_autoencoder --dataset flowers --workdir runs/autoencoder
"""

from absl import flags

from diffit_jax import cli

DATASET = flags.DEFINE_string(
    "dataset", None, "Name of prepared images, with a train and a test split."
)
DATA_DIR = cli.define_path(
    "data_dir",
    "Where prepared data sets live; default: ~/tensorflow_datasets.",
    to_read=True,
    must_exist=False,
)
WORKDIR = cli.define_path(
    "workdir", "Directory that becomes the autoencoder; a training that is in it is continued."
)
CHANNELS = flags.DEFINE_list(
    "channels",
    ["32", "64", "64", "64"],
    "Of each stage, multiples of 8; every stage after the first halves the side.",
)
NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 1, "Residual blocks of a stage.")
LATENT_CHANNELS = flags.DEFINE_integer("latent_channels", 4, "Of latents.")
STEPS = flags.DEFINE_integer("steps", 220, "Updates of the whole run.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images per update, over all devices.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Adam's; it falls to 0 as a cosine.")
KL_WEIGHT = flags.DEFINE_float("kl_weight", 1e-6, "Of the divergence from a normal distribution.")
SEED = flags.DEFINE_integer("seed", 0, "Of parameters, data order and noise.")
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("dataset")
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Run the command."""
    from diffit_jax.training.autoencoder import AutoencoderTraining
    from diffit_jax.training.train_autoencoder import train_autoencoder

    if not all(text.isdigit() for text in CHANNELS.value):
        cli.fail(f"--channels {','.join(CHANNELS.value)} must be whole numbers, as 32,64,64,64")
    settings = AutoencoderTraining(
        channels=tuple(map(int, CHANNELS.value)),
        num_blocks=NUM_BLOCKS.value,
        latent_channels=LATENT_CHANNELS.value,
        steps=STEPS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        kl_weight=KL_WEIGHT.value,
        seed=SEED.value,
    )
    train_autoencoder(
        DATASET.value, workdir=WORKDIR.value, settings=settings, data_dir=DATA_DIR.value or ""
    )
