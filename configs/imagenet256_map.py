"""ImageNet at 256×256 in one to four steps: a flow map of the paper's latent network.

`--config configs/imagenet256_map.py` is decoupled MeanFlow (DMF, arXiv 2510.24474), for a trained
flow of the same size: `diffit convert --workdir runs/flow --config imagenet256_map --to_workdir …`.
`:XL/2:meanflow` (2505.13447) and `:XL/2:imf` (2512.02012) are from scratch; `:L/2`, `:B/2`, `:S/2`
smaller ones. What their authors reached, on DiT's transformer and not on this one, is in
configs/RECIPES.md.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

RECIPES = ("dmf", "meanflow", "imf")


def get_config(variant: str = "XL/2") -> ConfigDict:
    """Return the config of a network of this size, perhaps with a recipe behind it."""
    size, _, recipe = variant.partition(":")
    recipe = recipe or "dmf"
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown: use {', '.join(RECIPES)}")
    config = run_path(str(Path(__file__).with_name("imagenet256_flow.py")))["get_config"](size)
    config.optimizer.learning_rate = 1e-4  # all three, constant
    config.optimizer.beta2 = 0.95
    process = dict(
        name="flow_map",
        path="linear",
        prediction="velocity",
        clock="t",  # 0 data, 1 noise; unscaled
        times="logit_normal",
        time_std=1.0,
        sigma_data=1.0,
    )
    if recipe == "dmf":
        # 20 of XL's 28 blocks are told t, the others r; the same share of smaller ones.
        told = dict(end_time_in="blocks")
        process |= dict(
            # The authors compute both terms of 256 images: as many evaluations.
            share=0.5,
            time_mean=0.0,
            pair_means=(0.4, -1.2),
            flow_times="own",
            map_loss="log",
            guidance_omega=1.0,  # w = 0.6 is ω 1, κ 0.6: as a scale 2.5
            guidance_kappa=0.6,
            guidance_low=0.0,
            guidance_high=0.7,
        )
        config.training.batch_size = 512
        config.training.total_steps = 400_000
        config.optimizer.max_gradient_norm = 1.0
    elif recipe == "meanflow":
        told = dict(end_time_in="sum")
        process |= dict(
            share=0.25,  # of r < t: FID of B/4 329 without, 61.1 with a quarter, 63.1 a half
            pair_means=(-0.4, -0.4),
            adaptive_power=1.0,  # 79.8 with 0, 64.0 with 0.5, 61.1 with 1
            adaptive_epsilon=0.01,
            guidance_omega=0.2,  # XL/2's; as a scale 2.5
            guidance_kappa=0.92,
            guidance_low=0.0,
            guidance_high=0.75,
        )
        config.training.batch_size = 256
        config.training.total_steps = 1_200_000  # 240 epochs
    else:
        # The authors' network has no modulation and a head of eight blocks; here the inner head of
        # internal guidance predicts the velocity.
        told = dict(
            end_time_in="tokens", guidance_in="tokens", inner_head=config.model.depth * 2 // 7
        )
        process |= dict(
            share=0.5,
            pair_means=(-0.4, -0.4),
            tangent="predicted",
            guidance_told=True,
            guidance_max=8.0,
            guidance_beta=1.0,
        )
        config.training.batch_size = 1024
        config.training.total_steps = 800_000  # 640 epochs
        config.optimizer.warmup_steps = 12_510  # 10 epochs
    config.ema.halflife_images = 6931 * config.training.batch_size  # 0.9999 an update
    sampler = dict(name="map", num_steps=2 if recipe == "dmf" else 1)
    if recipe == "imf":  # XL/2's at one step; 4.0 in [0.36, 0.64] at two
        sampler |= dict(told_scale=8.0, told_low=0.42, told_high=0.62)
        with config.unlocked():
            config.training.inner_weight = 1.0
    with config.unlocked():
        for name, value in told.items():
            config.model[name] = value
        config.process = ConfigDict(process)
        config.sampling.sampler = ConfigDict(sampler)
        config.sampling.guidance = ConfigDict(dict(kind="none"))  # it is inside
    return config
