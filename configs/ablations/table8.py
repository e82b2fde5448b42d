"""Table 8: embedding of the noise level; `:ffhq64` is FFHQ-64, else CIFAR-10.

Fourier features are EDM's, 16 · N(0, 1): the paper does not state its own.
"""

PAPER = {"cifar10": (2.02, 1.95), "ffhq64": (2.37, 2.22)}


def get_ablation(variant: str = "cifar10") -> dict:
    """Return the ablation of "cifar10" or "ffhq64"."""
    fourier, positional = PAPER[variant]
    return dict(
        title=f"Table 8, {variant}: time embedding",
        config=f"../{variant}.py",
        rows={"Fourier": {"model.time_embedding": "fourier"}, "positional": {}},
        paper={"Fourier": fourier, "positional": positional},
    )
