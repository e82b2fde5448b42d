"""Table 3: width of the tokens and of the time token; `:ffhq64` is FFHQ-64, else CIFAR-10.

"Dimension" is read as the channels of all stages but the first. The paper prints its third pair
like the first; (512, 256) is what its text and its network say.
"""

VARIANTS = {
    "cifar10": ((128, 256, 256), (1.99, 2.13, 1.95)),
    "ffhq64": ((128, 256, 256, 256), (2.27, 2.41, 2.22)),
}


def get_ablation(variant: str = "cifar10") -> dict:
    """Return the ablation of "cifar10" or "ffhq64"."""
    channels, paper = VARIANTS[variant]
    wide = (128, *(512 for _ in channels[1:]))
    rows = {
        "time 512, tokens 512": {"model.channels": wide},
        "time 256, tokens 256": {"model.time_width": 256},
        "time 512, tokens 256": {},
    }
    return dict(
        title=f"Table 3, {variant}: width of time and tokens",
        config=f"../{variant}.py",
        rows=rows,
        paper=dict(zip(rows, paper, strict=True)),
    )
