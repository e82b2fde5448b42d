r"""Makes a data set of latents, to train latent models on.

    diffit encode --source ILSVRC2012_img_train.tar --crop adm --size 256 \
        --vae hf://stabilityai/sd-vae-ft-ema --name imagenet256_latents

The source may be a data set that diffit prepare wrote. On a pod every host runs the same
command, and encodes shards of its own.

Interrupted, the same command resumes.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import SourceFlags

SOURCE = SourceFlags()
VAE = cli.define_path(
    "vae", "Folder of the autoencoder (diffusers' AutoencoderKL), or hf://owner/name.", to_read=True
)
VAE_DTYPE = flags.DEFINE_enum(
    "vae_dtype", "float32", ["float32", "bfloat16"], "Of the autoencoder's convolutions."
)
STORED = flags.DEFINE_enum("stored", "float16", ["float16", "float32"], "Of moments on disk.")
ORIENTATIONS = flags.DEFINE_enum(
    "orientations",
    "2",
    ["1", "2"],
    "2: of each image and its mirror image, which training draws between; 1: half the space.",
)
BATCH_PER_DEVICE = flags.DEFINE_integer(
    "batch_per_device", 32, "Images that each device encodes in a call.", lower_bound=1
)
VAE_BATCH_SIZE = flags.DEFINE_integer(
    "vae_batch_size",
    None,
    "How many of them an accelerator encodes at once, 8 if not said; a CPU encodes one.",
    lower_bound=1,
)
flags.DEFINE_alias("vae_at_once", "vae_batch_size")  # its name before
KEEP = flags.DEFINE_enum(
    "keep",
    "none",
    ["none", "image", "features"],
    "What is kept beside moments, for losses on representations (REPA): the image, of which the "
    "encoder makes tokens in every step, or the encoder's tokens of both orientations.",
)
ENCODER = cli.define_path(
    "encoder",
    "With --keep features: DINOv2's weights, a .pth, safetensors or hf://facebook/dinov2-base; "
    "digits: a small stand-in, to try a command.",
    to_read=True,
    words=("digits",),
)
ENCODER_POSITIONS = flags.DEFINE_enum(
    "encoder_positions",
    "antialiased",
    ["antialiased", "official", "hub"],
    "How its positions come to the grid: as REPA (timm), the released code or the hub has it.",
)
ENCODER_DTYPE = flags.DEFINE_enum(
    "encoder_dtype", "float32", ["float32", "bfloat16"], "Of its matrix products."
)
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("vae")


def check() -> None:
    """Look whether the flags go together."""
    SOURCE.check()


def main() -> None:
    """Run the command."""
    from diffit_jax.ingest.encode import Encoding, encode

    encoding = Encoding(
        VAE.value,
        VAE_DTYPE.value,
        STORED.value,
        int(ORIENTATIONS.value),
        BATCH_PER_DEVICE.value,
        VAE_BATCH_SIZE.value,
        KEEP.value,
        ENCODER.value or "",
        ENCODER_DTYPE.value,
        ENCODER_POSITIONS.value,
    )
    encode(encoding=encoding, **SOURCE.value)
