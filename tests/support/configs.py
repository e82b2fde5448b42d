"""Small experiments that compile in seconds, and the configs of the project."""

import runpy
from typing import Any

from ml_collections import ConfigDict
from support.processes import ROOT

CONFIGS = ROOT / "configs"


def config_of(name: str, *arguments: Any) -> ConfigDict:
    """The config in a file of `configs/`."""
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arguments)


def small_config(**overrides) -> ConfigDict:
    """A conditional 8×8 experiment that trains in seconds; `overrides` are keys
    with `__` between their parts."""
    config = ConfigDict(
        {
            "seed": 0,
            "data": {"name": "synthetic"},
            "model": {
                "name": "image_diffit",
                "image_size": 8,
                "image_channels": 1,
                # One stage: a third of the time to compile; tests of the network have more.
                "channels": (8,),
                "num_blocks": (2,),
                "window": 4,
                "time_width": 16,
                "head_width": 8,
                "num_classes": 10,
                "scan_unroll": 1,
            },
            "process": {"name": "edm"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
            "ema": {"halflife_images": 64},
            "training": {
                "batch_size": 8,
                "label_dropout": 0.1,
                "total_steps": 6,
                "log_steps": 2,
                "grid_steps": 0,  # a sampler takes as long to compile as a step
                "checkpoint_steps": 2,
                "keep_checkpoints": 3,
                "grid_images": 4,
            },
            "sampling": {
                "sampler": {"name": "heun", "num_steps": 3},
                "guidance": {"kind": "constant", "scale": 1.5},
                "batch_per_device": 2,
            },
        }
    )
    return _override(config, overrides)


def small_latent_config(**overrides) -> ConfigDict:
    """A latent DDPM experiment on random latents that trains in seconds; `overrides` as above."""
    config = small_config()
    config.data = ConfigDict({"name": "synthetic", "autoencoder": "sd-vae-ft-ema"})
    config.model = ConfigDict(
        {
            "name": "latent_diffit",
            "input_size": 8,
            "input_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 10,
        }
    )
    config.process = ConfigDict({"name": "ddpm"})
    config.sampling = ConfigDict(
        {
            "sampler": {"name": "ddpm", "num_steps": 4},
            "guidance": {"kind": "power_cosine", "scale": 4.4},
            "batch_per_device": 2,
        }
    )
    return _override(config, overrides)


def small_flow_config(**overrides) -> ConfigDict:
    """The same as a flow with an inner head, all its losses, and guidance of both kinds."""
    config = small_latent_config(model__learn_sigma=False, model__inner_head=1)
    config.process = ConfigDict(
        {"name": "flow", "times": "logit_normal", "direction_weight": 1.0, "shift": 1.5}
    )
    config.sampling.sampler = ConfigDict({"name": "sde", "num_steps": 4})
    config.sampling.guidance = ConfigDict(
        {"kind": "internal", "scale": 1.4, "label_scale": 1.35, "label_t_high": 0.7}
    )
    return _override(config, overrides)


def small_map_config(**overrides) -> ConfigDict:
    """A flow map with everything in it: iMF's loss, tokens, and two labels in five dropped."""
    config = small_latent_config(
        model__learn_sigma=False,
        model__inner_head=1,
        model__end_time_in="tokens",
        model__guidance_in="tokens",
        model__qk_norm=True,
        training__label_dropout=0.4,
    )
    config.process = ConfigDict(
        {
            "name": "flow_map",
            "times": "logit_normal",
            "share": 0.5,
            "tangent": "predicted",
            "guidance_told": True,
        }
    )
    config.sampling.sampler = ConfigDict({"name": "map", "num_steps": 2, "told_scale": 2.0})
    config.sampling.guidance = ConfigDict({"kind": "none"})
    return _override(config, overrides)


def small_token_config(kind: str, **overrides) -> ConfigDict:
    """A flow with a loss on its tokens, `representation.kind`."""
    config = small_latent_config(model__learn_sigma=False)
    config.process = ConfigDict({"name": "flow"})
    config.sampling.sampler = ConfigDict({"name": "heun", "num_steps": 4})
    config.sampling.guidance = ConfigDict({"kind": "constant", "scale": 1.5})
    settings: dict[str, Any] = {"kind": kind}
    if kind != "none":
        settings["depth"] = 1
    if kind in ("repa", "reg"):
        settings |= {"encoder": "digits", "projector_width": 32}
    if kind in ("sra", "self_flow"):
        settings["teacher_depth"] = 2
    if kind == "dispersive":
        settings["group"] = 4
    if kind == "reg":
        config.model.class_token = 64
    config.representation = ConfigDict(settings)
    config.evaluation = ConfigDict()
    return _override(config, overrides)


def _override(config: ConfigDict, overrides: dict) -> ConfigDict:
    for key, value in overrides.items():
        *parents, name = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return config
