"""Losses on tokens, on 8×8 handwritten digits: the network of `digits_latent_flow`.

`--config configs/digits_repa.py` is REPA, `:reg`, `:sra`, `:self_flow`, `:dispersive` or `:none`
after the name another loss, or none. The encoder stands in for DINOv2: it is small, and was trained
on digits' labels (tests/studies/digits_encoder.py). Figures: configs/RECIPES.md.
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from diffit_jax.errors import UserError

KINDS = ("repa", "reg", "sra", "self_flow", "dispersive", "none")


def get_config(kind: str = "repa") -> ConfigDict:
    """Return the config with a loss of this kind."""
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} is unknown: use {', '.join(KINDS)}")
    config = run_path(str(Path(__file__).with_name("digits_latent_flow.py")))["get_config"]()
    settings = dict(kind=kind)
    if kind != "none":
        settings |= dict(depth=1)  # of four blocks, as 8 of 28
    if kind in ("repa", "reg"):
        settings |= dict(encoder="digits", encoder_dtype="float32", projector_width=256)
    if kind in ("sra", "self_flow"):
        settings |= dict(teacher_depth=3)
    if kind == "dispersive":
        settings |= dict(group=32)
    with config.unlocked():
        if kind == "reg":
            config.model.class_token = 64  # the stand-in's width
        config.representation = ConfigDict(settings)
    return config
