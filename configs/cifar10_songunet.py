"""CIFAR-10 with DDPM++ and NCSN++, with their own attention or TMSA: the paper's Table 5.

    --config configs/cifar10_songunet.py:vp         DDPM++, Song's training (the paper's 3.01)
    --config configs/cifar10_songunet.py:vp_tmsa    with TMSA (2.76)
    --config configs/cifar10_songunet.py:ve         NCSN++ (3.77)
    --config configs/cifar10_songunet.py:ve_tmsa    with TMSA (3.49)
    --config configs/cifar10_songunet.py            EDM's retraining of DDPM++; also :edm_tmsa

The paper's rows without TMSA are configuration A of EDM's Table 2 (Karras et al. 2022, arXiv
2206.00364): the continuous networks of Song et al. 2021 (arXiv 2011.13456) under EDM's
deterministic sampler, 35 evaluations. How TMSA went in is not stated: here all six attention layers
have one head, a position bias over the whole grid, and the networks' own conditioning vector in the
place of x_t, trained from scratch.
"""

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

# Process, its family of networks, half-life of the average in updates (Song: decay 0.9999, 0.999),
# updates until the checkpoint that EDM took (one in 50,000).
SONG = {
    "vp": (dict(name="vp"), "ddpmpp", 6_931, 400_000),
    "ve": (dict(name="ve"), "ncsnpp", 693, 1_200_000),
}
EDM = dict(
    name="edm",
    sigma_data=0.5,
    log_sigma_mean=-1.2,
    log_sigma_std=1.2,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
)


def get_config(variant: str = "edm") -> ConfigDict:
    """Return the config; `variant` is "vp", "ve" or "edm", or one of these and "_tmsa"."""
    process, _, tmsa = variant.partition("_")
    if process not in (*SONG, "edm") or tmsa not in ("", "tmsa"):
        raise UserError(
            f"configs/cifar10_songunet.py:{variant} is unknown: write vp, ve or edm, or one of "
            "these and _tmsa, like configs/cifar10_songunet.py:vp_tmsa"
        )
    of_song = process in SONG
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(dict(name="cifar10", data_dir=""))
    config.model = ConfigDict(
        dict(
            name="songunet",
            image_size=32,
            image_channels=3,
            channels=128,
            channel_mults=(1, 2, 2, 2) if of_song else (2, 2, 2),
            num_blocks=4,
            attention_sizes=(16,),
            family=SONG[process][1] if of_song else "ddpmpp",
            tmsa="all" if tmsa else "none",
            augment_labels=1 if of_song else 9,
            dropout=0.1 if of_song else 0.13,
            attention="auto",
            dtype="bfloat16",
        )
    )
    # Song mirrors every second image; the network is told, and draws none so.
    others = ("y_flip", "scale", "rotation", "stretch", "shift")
    config.augmentation = ConfigDict(
        dict(probability=1.0, **dict.fromkeys(others, 0.0)) if of_song else dict(probability=0.12)
    )
    config.process = ConfigDict(SONG[process][0] if of_song else EDM)

    batch_size = 128 if of_song else 512
    config.optimizer = ConfigDict(
        dict(
            learning_rate=2e-4 if of_song else 1e-3,
            warmup_steps=5_000 if of_song else 10_000_000 // batch_size,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            max_gradient_norm=1.0 if of_song else 0.0,
        )
    )
    halflife = SONG[process][2] * batch_size if of_song else 500_000
    config.ema = ConfigDict(dict(halflife_images=halflife, rampup_ratio=0.05))
    config.training = ConfigDict(
        dict(
            batch_size=batch_size,
            label_dropout=0.0,
            total_steps=SONG[process][3] if of_song else 390_625,  # EDM: 200 million images
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
            sampler=dict(name="heun", num_steps=18),  # 35 evaluations
            guidance=dict(kind="none"),
            batch_per_device=128,
            pixel_rounding="edm",
        )
    )
    return config.lock()
