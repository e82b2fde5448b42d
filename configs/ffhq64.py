"""FFHQ at 64×64 in pixels with the image-space network: the paper's FID 2.22 (Table 1). It has no
labels.

`configs/ffhq64_h1.py` has four blocks in each stage. Sections and tables are those of the paper
(arXiv 2312.02139) unless EDM (Karras et al. 2022, arXiv 2206.00364, and its training code) is
named, whose "training configuration and augmentation" it takes over (I.1).
"""

from ml_collections import ConfigDict

EDM_RAMP_UP_IMAGES = 10_000_000  # the learning rate rises over so many (EDM's code)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    # The 70,000 pictures: `launch/prepare.py --source FFHQ --name ffhq64 --crop resize --size 64`
    # makes them.
    config.data = ConfigDict(dict(name="ffhq64", data_dir=""))

    config.model = ConfigDict(
        dict(
            name="image_diffit",
            image_size=64,
            image_channels=3,
            channels=(128, 256, 256, 256),  # Fig. 4 and Table S.3: 64×64, 32×32, 16×16, 8×8
            # I.1, which is about this training. Appendix H.1 says 4 everywhere: ffhq64_h1.
            num_blocks=(1, 2, 2, 2),
            window=8,  # H.1; Fig. 8
            time_width=512,  # Table 3: time 512, tokens 256
            head_width=64,  # not stated
            num_classes=0,
            mlp_ratio=4,
            augment_labels=9,
            dropout=0.05,  # EDM
            scan_unroll=2,  # the depth of a stage: there is little to loop over
            # Of the matrix products, not stated (EDM trains FFHQ in float32); parameters, softmax,
            # losses and averages are float32.
            dtype="bfloat16",
        )
    )

    # EDM's six operations, each with probability 0.15, and its nine labels.
    config.augmentation = ConfigDict(dict(probability=0.15))

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

    batch_size = 256  # I.1, and EDM
    config.optimizer = ConfigDict(
        dict(
            learning_rate=2e-4,  # I.1, and EDM
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
            label_dropout=0.0,
            # I.1, 51 million images. EDM trains on 200 million, which are 781,250 updates: the
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
            sampler=dict(name="heun", num_steps=40),  # I.1, and EDM: 79 evaluations
            guidance=dict(kind="none"),
            batch_per_device=64,
            pixel_rounding="edm",
        )
    )
    return config.lock()
