"""The ImageNet pipeline on a small scale, for `bash launch/quickstart.sh chain`.

Latent DiffiT on 4×4 latents of digits of 32×32 pixels, evaluated while it trains.
`--config configs/chain.py:FOLDER` takes the chain's results in a folder: the latents in
FOLDER/data, the autoencoder and the reference.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from diffit_jax.data.records import read_manifest
from diffit_jax.data.sources import data_folder


def get_config(folder: str = "runs/chain") -> ConfigDict:
    """Return the config; `folder` is the chain's."""
    place = Path(os.path.expanduser(folder)).absolute()
    name = "digit_latents"
    manifest = read_manifest(data_folder(name, place / "data"), "train")
    side, _, channels = manifest.example_shape
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        dict(
            name=name,
            data_dir=str(place / "data"),
            autoencoder="autoencoder",
            latent_mean=tuple(manifest.autoencoder["latent_mean"]),
            latent_scale=tuple(manifest.autoencoder["latent_scale"]),
        )
    )
    config.model = ConfigDict(
        dict(
            name="latent_diffit",
            input_size=side,
            input_channels=channels,
            patch_size=1,  # a latent pixel stands for 8×8 pixels
            hidden_size=96,
            depth=4,
            num_heads=4,
            num_classes=10,
            learn_sigma=True,
            scan_unroll=4,  # the depth, as in configs/digits_latent.py
        )
    )
    config.process = ConfigDict(dict(name="ddpm", variance="learned_range", loss_type="hybrid"))
    config.optimizer = ConfigDict(dict(learning_rate=2e-3, warmup_steps=200))
    config.ema = ConfigDict(dict(halflife_images=20_000, rampup_ratio=0.05))
    config.training = ConfigDict(
        dict(
            batch_size=64,
            label_dropout=0.1,
            total_steps=1_600,
            log_steps=100,
            grid_steps=800,
            checkpoint_steps=800,
            grid_images=100,
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler=dict(name="ddpm", num_steps=50),
            guidance=dict(kind="constant", scale=1.5),
            batch_per_device=100,
            pixel_rounding="adm",
        )
    )
    config.evaluation = ConfigDict(
        dict(
            steps=800,
            reference=str(place / "reference.npz"),
            inception="random",  # figures without a meaning
            vae=str(place / "autoencoder"),
            count=200,
            metrics=("fid",),
            loss_steps=400,
        )
    )
    return config.lock()
