"""Figure 7b (ImageNet-256): TMSA or DiT's modulation in the body of DiT-XL, a million updates.

The paper draws curves between 14 and 24, without figures. Samples are unguided, which such values
suggest; the paper does not say it. The body is the latent DiffiT's, with its position bias.
"""


def get_ablation() -> dict:
    """Return the ablation."""
    return dict(
        title="Figure 7b, ImageNet-256: TMSA or adaLN",
        config="../imagenet256_latent.py",
        overrides={"training.total_steps": 1_000_000, "sampling.guidance.kind": "none"},
        seeds=(0,),
        rows={"adaLN": {"model.time_in": "adaln"}, "TMSA": {}},
    )
