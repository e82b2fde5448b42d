"""ImageNet at 256×256 with REPA: SiT's recipe of flow matching, aligned with DINOv2-B.

`--config configs/imagenet256_repa.py` is XL/2, `:L/2`, `:B/2` and `:S/2` after the name a smaller
one; `:XL/2:irepa` has iREPA's two switches. REPA is arXiv 2410.06940, iREPA 2512.10794; what they
measured, on SiT's transformer and not on this one: configs/RECIPES.md. The data hold the images
beside the latents: `diffit encode --keep image`.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

RECIPES = ("repa", "irepa")


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with `:irepa` behind it."""
    size, _, recipe = variant.partition(":")
    if recipe and recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown: use {', '.join(RECIPES)}")
    sit = run_path(str(Path(__file__).with_name("imagenet256_flow.py")))["get_config"]
    config = sit(f"{size}:sit")  # uniform times, batch 256, rate 1e-4
    settings = dict(
        kind="repa",
        encoder="dinov2_vitb14",
        encoder_weights="hf://facebook/dinov2-base",
        # Behind the 8th of 28 blocks (L: of 24), of the smaller networks the 4th of 12.
        depth=4 if size in ("S/2", "B/2") else 8,
        weight=0.5,  # 0.25 to 1 are as good
        stop_step=0,  # HASTE: 250,000 (B: 100,000)
    )
    if recipe == "irepa":
        settings |= dict(projector="conv", spatial_norm=0.6, weight=1.0)
    with config.unlocked():
        config.data.name = "imagenet256_latents_images"
        config.optimizer.max_gradient_norm = 1.0
        config.representation = ConfigDict(settings)
        config.training.total_steps = 4_000_000
        # 1.42 with guidance 1.8 on t in [0, 0.7].
        config.sampling.guidance = ConfigDict(
            dict(kind="time_interval", scale=1.8, t_low=0.0, t_high=0.7)
        )
    return config
