"""The paper's ablations in small: digits in pixels, 600 updates, three seeds.

`diffit ablate --ablation configs/ablations/digits.py --workdir runs/ablation`: 24 runs of
about a minute on two CPU cores. Tables: configs/ABLATIONS.md.
"""


def get_ablation() -> dict:
    """Return the ablation."""
    return dict(
        title="Digits, 8×8: one switch at a time",
        config="../digits.py",
        seeds=(0, 1, 2),
        samples=1_000,
        metric="frechet",
        overrides={
            "training.total_steps": 600,
            "training.grid_steps": 600,
            "training.checkpoint_steps": 600,
            "optimizer.warmup_steps": 100,
            "evaluation.loss_examples": 360,  # the whole test split
        },
        rows={
            "tmsa, positional, window 4": {},
            "time in the position bias (T6, F)": {"model.time_in": "bias"},
            "time in the MLP (T6, G)": {"model.time_in": "mlp"},
            "time as a token (T7)": {"model.time_in": "token"},
            "Fourier embedding (T8)": {"model.time_embedding": "fourier"},
            "window 2 (Fig. 8)": {"model.window": 2},
            "window 8 (Fig. 8)": {"model.window": 8},
            "no convolution in Eq. 9": {"model.resblock_conv": False},
        },
    )
