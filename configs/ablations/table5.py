"""Table 5 (CIFAR-10): TMSA in the place of DDPM++'s attention; `:ve` is NCSN++, else VP.

The paper's rows without TMSA are EDM's, the least of three FIDs: configs/cifar10_songunet.py.
"""

PAPER = {"vp": (3.01, 2.76), "ve": (3.77, 3.49)}


def get_ablation(variant: str = "vp") -> dict:
    """Return the ablation of "vp" or "ve"."""
    without, with_tmsa = PAPER[variant]
    return dict(
        title=f"Table 5, CIFAR-10, {variant}: TMSA in DDPM++ and NCSN++",
        config=f"../cifar10_songunet.py:{variant}",
        rows={
            "their attention": {},
            "TMSA at 16×16": {"model.tmsa": "listed"},
            "TMSA everywhere": {"model.tmsa": "all"},
        },
        paper={"their attention": without, "TMSA everywhere": with_tmsa},
    )
