"""One to four steps on 8×8 handwritten digits: a flow map of the network of `digits_flow`.

`diffit convert --workdir runs/digits_flow --config digits_map --to_workdir runs/digits_map` makes
one of a trained flow. `:meanflow` and `:imf` are from scratch, the latter on `digits_latent`'s
network. Figures: configs/RECIPES.md.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

RECIPES = ("dmf", "meanflow", "imf")


def get_config(recipe: str = "dmf") -> ConfigDict:
    """Return the config of a recipe."""
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe!r} is unknown: use {', '.join(RECIPES)}")
    name = "digits_latent_flow" if recipe == "imf" else "digits_flow"
    config = run_path(str(Path(__file__).with_name(f"{name}.py")))["get_config"]()
    process = dict(config.process, name="flow_map")
    if recipe == "dmf":
        # The way down the U is told t, the way up r: one of four blocks.
        told = dict(end_time_in="blocks")
        process |= dict(share=0.5, pair_means=(0.4, -1.2), flow_times="own", map_loss="log")
        guidance = dict(guidance_omega=1.0, guidance_kappa=1 / 3)  # scale 1.5, as the flow has it
    elif recipe == "meanflow":
        told = dict(end_time_in="sum")
        process |= dict(share=0.25, pair_means=(-0.4, -0.4))
        guidance = dict(guidance_omega=1.0, guidance_kappa=1 / 3)
    else:
        told = dict(end_time_in="tokens", guidance_in="tokens", inner_head=2)
        process |= dict(share=0.5, pair_means=(-0.4, -0.4), tangent="predicted")
        guidance = dict(guidance_told=True, guidance_max=4.0)
    sampler = dict(name="map", num_steps=1)
    if recipe == "imf":
        sampler |= dict(told_scale=1.5, told_low=0.0, told_high=1.0)
    with config.unlocked():
        for key, value in told.items():
            config.model[key] = value
        config.process = ConfigDict(process | guidance)
        config.training.inner_weight = 1.0
        config.sampling.sampler = ConfigDict(sampler)
        config.sampling.guidance = ConfigDict(dict(kind="none"))  # it is inside
    return config
