"""CIFAR-10 in pixels with the image-space network: the paper reports FID 1.95.

`--config configs/cifar10.py` is unconditional, as the paper's; `--config
configs/cifar10.py:conditional` gives the network the labels. `configs/cifar10_h1.py` has four
blocks in each stage. Sections and tables are those of the paper (arXiv 2312.02139) unless EDM
(Karras et al. 2022, arXiv 2206.00364, and its training code) is named, whose "training
configuration and augmentation" it takes over (I.1).
"""

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

VARIANTS = {"": 0, "conditional": 10}
EDM_RAMP_UP_IMAGES = 10_000_000  # the learning rate rises over so many (EDM's code)


def get_config(variant: str = "") -> ConfigDict:
    """Return the config; `variant` is "" or "conditional"."""
    if variant not in VARIANTS:
        raise UserError(
            f"configs/cifar10.py:{variant} is unknown: write configs/cifar10.py:conditional or "
            "leave it out"
        )
    num_classes = VARIANTS[variant]
    config = ConfigDict()
    config.seed = 0

    # The 50,000 training images: `diffit prepare --source cifar-10-python.tar.gz --name
    # cifar10` makes them.
    config.data = ConfigDict(dict(name="cifar10", data_dir=""))

    config.model = ConfigDict(
        dict(
            name="image_diffit",
            image_size=32,
            image_channels=3,
            channels=(128, 256, 256),  # Fig. 4 and Table S.2: 32×32, 16×16, 8×8
            # I.1, which is about this training. Appendix H.1 says 4 everywhere: cifar10_h1.
            num_blocks=(2, 2, 2),
            window=4,  # H.1; Fig. 8
            time_width=512,  # Table 3: time 512, tokens 256
            head_width=64,  # not stated
            num_classes=num_classes,
            mlp_ratio=4,
            augment_labels=9,
            dropout=0.13,  # EDM
            scan_unroll=2,  # the depth of a stage: there is little to loop over
            # Of the matrix products, not stated (EDM trains CIFAR-10 in float32); parameters,
            # softmax, losses and averages are float32.
            dtype="bfloat16",
        )
    )

    # EDM's six operations, each with probability 0.12, and its nine labels.
    config.augmentation = ConfigDict(dict(probability=0.12))

    config.process = ConfigDict(
        dict(
            name="edm",
            sigma_data=0.5,  # this and all else here: EDM's Table 1
            log_sigma_mean=-1.2,
            log_sigma_std=1.2,
            sigma_min=0.002,
            sigma_max=80.0,
            rho=7.0,
        )
    )

    batch_size = 512  # I.1, and EDM
    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-3,  # I.1, and EDM
            warmup_steps=EDM_RAMP_UP_IMAGES // batch_size,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
        )
    )

    # EDM: half a million images, at most 5 % of those seen.
    config.ema = ConfigDict(dict(halflife_images=500_000, rampup_ratio=0.05))

    config.training = ConfigDict(
        dict(
            batch_size=batch_size,
            label_dropout=0.0,  # EDM; its samples are not guided
            # I.1, 102 million images. EDM trains on 200 million, which are 390,625 updates: the
            # paper's number is the one that belongs to its result.
            total_steps=200_000,
            log_steps=100,
            grid_steps=10_000,
            checkpoint_steps=5_000,
            keep_checkpoints=3,
            grid_images=64,
        )
    )

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, num_slices=1))

    config.sampling = ConfigDict(
        dict(
            sampler=dict(name="heun", num_steps=18),  # I.1, and EDM: 35 evaluations
            guidance=dict(kind="none"),
            batch_per_device=128,
            pixel_rounding="edm",
        )
    )
    return config.lock()
