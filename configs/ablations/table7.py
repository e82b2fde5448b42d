"""Table 7: time as a token of its own, or mixed in (TMSA); `:ffhq64` is FFHQ-64, else CIFAR-10.

"Separate" is read as one more token in the same attention, which it keeps through a stage.
"""

PAPER = {"cifar10": (2.28, 1.95), "ffhq64": (2.59, 2.22)}


def get_ablation(variant: str = "cifar10") -> dict:
    """Return the ablation of "cifar10" or "ffhq64"."""
    separate, mixed = PAPER[variant]
    return dict(
        title=f"Table 7, {variant}: time as a token",
        config=f"../{variant}.py",
        rows={"separate": {"model.time_in": "token"}, "mixed (TMSA)": {}},
        paper={"separate": separate, "mixed (TMSA)": mixed},
    )
