"""Latent DiffiT on 8×8 handwritten digits, treated as 1-channel latents.

The ImageNet recipe in small, on two CPU cores in four minutes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = ConfigDict()
    config.seed = 0

    # No autoencoder: the "latents" are the digits themselves, in [-1, 1], and samples are images.
    config.data = ConfigDict(dict(name="digits", data_dir="", autoencoder=""))

    config.model = ConfigDict(
        dict(
            name="latent_diffit",
            input_size=8,
            input_channels=1,
            patch_size=2,
            hidden_size=96,
            depth=4,
            num_heads=4,
            mlp_ratio=4,
            num_classes=10,
            learn_sigma=True,
            slim_tmsa=False,
            # The depth: on a CPU, a loop of small layers costs more than compiling them one by one.
            scan_unroll=4,
            remat="none",
            dtype="float32",
        )
    )

    config.process = ConfigDict(
        dict(
            name="ddpm",
            num_timesteps=1000,
            schedule="linear",
            variance="learned_range",
            loss_type="hybrid",
            respacing="",
            rho=7.0,
        )
    )

    config.optimizer = ConfigDict(
        dict(learning_rate=2e-3, warmup_steps=200, beta1=0.9, beta2=0.999, epsilon=1e-8)
    )
    config.ema = ConfigDict(dict(halflife_images=20_000, rampup_ratio=0.05))

    config.training = ConfigDict(
        dict(
            batch_size=64,
            label_dropout=0.1,
            total_steps=3_000,
            log_steps=100,
            grid_steps=1_000,
            checkpoint_steps=1_000,
            keep_checkpoints=3,
            grid_images=100,
        )
    )

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, num_slices=1))

    config.sampling = ConfigDict(
        dict(
            # These latents have bounds.
            sampler=dict(name="ddpm", num_steps=100, clip_denoised=True),
            guidance=dict(kind="constant", scale=1.5, channels=0),  # all (there is only one)
            batch_per_device=100,
        )
    )
    return config.lock()
