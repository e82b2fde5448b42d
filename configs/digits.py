"""Class-conditional image DiffiT on 8×8 handwritten digits.

It trains on two CPU cores in about three minutes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict(dict(name="digits", data_dir=""))

    config.model = ConfigDict(
        dict(
            name="image_diffit",
            image_size=8,
            image_channels=1,
            channels=(16, 64),
            num_blocks=(1, 2),
            window=4,
            time_width=128,
            head_width=16,
            num_classes=10,
            mlp_ratio=4,
            # The depth of a stage: on a CPU, a loop of small layers costs more than compiling them
            # one by one.
            scan_unroll=2,
            dtype="float32",  # of the matrix products; bfloat16 pays on TPUs and GPUs, not on CPUs
        )
    )

    config.process = ConfigDict(
        dict(
            name="edm",
            sigma_data=0.75,  # standard deviation of the digits in [-1, 1]
            log_sigma_mean=-1.2,  # EDM's P_mean and P_std
            log_sigma_std=1.2,
            sigma_min=0.002,
            sigma_max=80.0,
            rho=7.0,
        )
    )

    config.optimizer = ConfigDict(
        dict(learning_rate=2e-3, warmup_steps=200, beta1=0.9, beta2=0.999, epsilon=1e-8)
    )

    # EDM has a half-life of 500,000 images in a run of 200 million; this run is shorter by three
    # orders of magnitude.
    config.ema = ConfigDict(dict(halflife_images=10_000, rampup_ratio=0.05))

    config.training = ConfigDict(
        dict(
            batch_size=64,
            label_dropout=0.1,
            total_steps=1_500,
            log_steps=100,
            grid_steps=500,
            checkpoint_steps=500,
            keep_checkpoints=3,
            grid_images=100,
        )
    )

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, num_slices=1))

    config.sampling = ConfigDict(
        dict(
            sampler=dict(name="heun", num_steps=18, churn_amount=0.0),
            guidance=dict(kind="constant", scale=1.5),
            batch_per_device=100,
        )
    )
    return config.lock()
