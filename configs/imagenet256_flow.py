"""ImageNet at 256×256 by flow matching: the paper's latent network, LightningDiT's recipe.

`--config configs/imagenet256_flow.py` is XL/2, `:L/2`, `:B/2` and `:S/2` after the name a smaller
one; `:XL/2:sit` is SiT's recipe. What each value did for its authors, on DiT's transformer and not
on this one: configs/RECIPES.md. LightningDiT is arXiv 2501.01423, SiT 2401.08740.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

RECIPES = ("lightning", "sit")


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with `:sit` behind it."""
    size, _, recipe = variant.partition(":")
    if recipe and recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown: use {', '.join(RECIPES)}")
    lightning = recipe != "sit"
    config = run_path(str(Path(__file__).with_name("imagenet256_latent.py")))["get_config"](size)
    config.model.learn_sigma = False  # a velocity alone
    with config.unlocked():
        config.process = ConfigDict(
            dict(
                name="flow",
                path="linear",  # both; FID 19.5 → 17.2 of DiT-XL/2 after 80 epochs
                prediction="velocity",
                # 0 data, 1 noise. (Their networks are told u = 1 - t: clock "u" for such weights.)
                clock="t",
                # Logit-normal: 16.6 → 14.0. It is symmetric: the same in u and t.
                times="logit_normal" if lightning else "uniform",
                time_mean=0.0,
                time_std=1.0,
                # 14.0 → 12.5.
                direction_weight=1.0 if lightning else 0.0,
                sigma_data=1.0,  # latents times 0.18215 have a deviation of about 1
            )
        )

    # Batch × 4 and rate × 2: 17.2 → 16.6. β2 0.95: 16.6, as good; with it long runs are said to be
    # stabler. Neither decays nor warms up; LightningDiT does not clip either, which hurt once times
    # and direction were on.
    config.training.batch_size = 1024 if lightning else 256
    config.optimizer.learning_rate = 2e-4 if lightning else 1e-4
    config.optimizer.beta2 = 0.95 if lightning else 0.999
    with config.unlocked():
        config.optimizer.max_gradient_norm = 0.0

    # Decay 0.9999 per update (both), as in the paper's recipe of 256 images an update.
    config.ema.halflife_images = config.ema.halflife_images * config.training.batch_size // 256
    # LightningDiT's 800 epochs of 1,251 updates; SiT's 1,400 of 5,004.
    config.training.total_steps = 1_000_000 if lightning else 7_000_000

    with config.unlocked():
        if lightning:
            # 250 points of Euler are 249 steps. Guidance for u > 0.125 and shift 0.3 of u; its
            # scale, 6.7 on three of 32 channels, is of another autoencoder. This one is SiT's, on
            # all channels: to be swept.
            config.process.sampling_shift = 1 / 0.3
            sampler = dict(name="euler", num_steps=249)
            guidance = dict(kind="time_interval", scale=1.5, t_low=0.0, t_high=0.875)
        else:  # SiT's best, FID 2.06: 250 evaluations, where its code takes 499
            sampler = dict(
                name="sde", num_steps=250, diffusion="sigma", last="mean", last_size=0.04
            )
            guidance = dict(kind="constant", scale=1.5)
        config.sampling.sampler = ConfigDict(sampler)
        config.sampling.guidance = ConfigDict(guidance)
    return config
