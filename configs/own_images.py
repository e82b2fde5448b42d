"""Your own images, in pixels or latents: what `diffit prepare` or `diffit encode` has written.

`--config own_images:flowers` takes the data set of that name in ~/tensorflow_datasets, `--config
own_images:data/flowers` the one in another folder. A size after it chooses the network: of images
`tiny` (for a CPU and some hundred images), `S` (the default) or `B` (the paper's widths); of
latents S/2 (the default), B/2, L/2, XL/2 … Shape and classes are those of the manifest.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from diffit_jax.data.records import MOMENTS, Manifest, has_split, read_manifest
from diffit_jax.data.sources import data_folder
from diffit_jax.errors import UserError
from diffit_jax.models.diffit.latent import named_size

# Of networks of images: channels of each stage, blocks of a stage, width of a head.
SIZES = {
    "tiny": ((16, 16, 32, 64), 1, 16),
    "S": ((64, 128, 128, 128), 2, 32),
    "B": ((128, 256, 256, 256), 4, 32),
}


def get_config(argument: str = "") -> ConfigDict:
    """Return the config for a prepared data set, named by `argument`."""
    name, _, size = argument.partition(":")
    if not name:
        raise UserError("name your data: --config own_images:NAME")
    above, _, last = name.rpartition("/")
    data_dir = str(Path(os.path.expanduser(above)).absolute()) if above else ""
    folder = data_folder(last, data_dir)
    manifest = read_manifest(folder, "train")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(dict(name=last, data_dir=data_dir))
    num_classes = len(manifest.classes)
    config.training = ConfigDict(
        dict(
            batch_size=64,
            label_dropout=0.1 if num_classes else 0.0,
            total_steps=200_000,  # 12.8 million images; a grid shows when it is enough
            log_steps=100,
            grid_steps=5_000,
            checkpoint_steps=5_000,
            keep_checkpoints=3,
            grid_images=36,
        )
    )
    if has_split(folder, "test"):
        config.evaluation = ConfigDict(dict(loss_steps=500))
    config.optimizer = ConfigDict(dict(learning_rate=2e-4, warmup_steps=1_000))
    config.ema = ConfigDict(dict(halflife_images=500_000, rampup_ratio=0.05))  # EDM's
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, num_slices=1))
    guidance = dict(kind="constant", scale=1.5) if num_classes else dict(kind="none")
    if MOMENTS not in manifest.arrays:
        _pixels(config, manifest, num_classes, guidance, size or "S")
    else:
        _latents(config, manifest, num_classes, guidance, size or "S/2")
    return config.lock()


def _pixels(
    config: ConfigDict, manifest: Manifest, num_classes: int, guidance: dict, size: str
) -> None:
    """Fill in the network of images with EDM, and mirrored images."""
    if size not in SIZES:
        raise UserError(f"size {size!r} is unknown for images: use {', '.join(SIZES)}")
    channels, blocks, head_width = SIZES[size]
    height, width, image_channels = manifest.example_shape
    # Stages down to a side of 8 or less, as long as windows of 4×4 fit.
    sides = [height]
    while sides[-1] > 8 and sides[-1] % 8 == 0 and len(sides) < 4:
        sides.append(sides[-1] // 2)
    if height != width or height % 4:
        raise UserError(
            f"the images are {width}×{height}: prepare them with equal sides that 4 divides "
            "(--crop center --size 64)"
        )
    config.model = ConfigDict(
        dict(
            name="image_diffit",
            image_size=height,
            image_channels=image_channels,
            channels=channels[: len(sides)],
            num_blocks=(blocks,) * len(sides),
            window=4,
            head_width=head_width,
            num_classes=num_classes,
            augment_labels=1,
            # Not in a loop: on a CPU, convolutions in one took four times as long.
            scan_unroll=max(2, blocks),
            dtype="bfloat16",
        )
    )
    # Every second image is mirrored, of which the network is told: samples are not.
    config.augmentation = ConfigDict(
        dict(probability=1.0, y_flip=0.0, scale=0.0, rotation=0.0, stretch=0.0, shift=0.0)
    )
    if size == "tiny":
        # At the same cost: held-out loss 0.330 after 400 updates where windows of 4 have 0.344.
        config.model.window = 4 if sides[-1] % 8 else 8
        config.model.dtype = "float32"  # bfloat16 pays on TPUs and GPUs, not on CPUs
        config.training.batch_size = 16
        config.training.total_steps = 800  # ten minutes on two cores, at 64×64
        config.training.log_steps = 50
        config.training.grid_steps = config.training.checkpoint_steps = 200
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 2e-3, 100
        config.ema.halflife_images = 2_000
        if "evaluation" in config:
            config.evaluation.loss_steps = 200
    config.process = ConfigDict(dict(name="edm", sigma_data=0.5))
    sampler = dict(name="heun", num_steps=18)
    config.sampling = ConfigDict(dict(sampler=sampler, guidance=guidance, batch_per_device=36))


def _latents(
    config: ConfigDict, manifest: Manifest, num_classes: int, guidance: dict, size: str
) -> None:
    """Fill in the latent network with ADM's diffusion, as for ImageNet."""
    side, width, channels = manifest.example_shape
    if side != width or side % 2:
        raise UserError(f"the latents are {width}×{side}: encode images with equal sides")
    vae, found = manifest.autoencoder, manifest.statistics
    config.data.autoencoder = str(vae.get("path", "unknown")).rstrip("/").rpartition("/")[2]
    # Latents that others made say nothing of their scale: here each channel gets mean 0 and
    # variance 1.
    config.data.latent_mean = tuple(vae.get("latent_mean", found["mean"]))
    config.data.latent_scale = tuple(
        vae.get("latent_scale", [1 / deviation for deviation in found["std"]])
    )
    config.model = ConfigDict(
        dict(
            name="latent_diffit",
            input_size=side,
            input_channels=channels,
            **named_size(size),
            num_classes=num_classes,
            learn_sigma=True,
            attention="auto",
            remat="dots",
            dtype="bfloat16",
        )
    )
    config.process = ConfigDict(dict(name="ddpm", variance="learned_range", loss_type="hybrid"))
    config.ema.halflife_images = 1_774_368  # decay 0.9999 per update of 256
    sampler = dict(name="ddpm", num_steps=250)
    config.sampling = ConfigDict(dict(sampler=sampler, guidance=guidance, batch_per_device=16))
