"""Table 6 (CIFAR-10): where time enters."""


def get_ablation() -> dict:
    """Return the ablation; the last two rows are not the paper's."""
    return dict(
        title="Table 6, CIFAR-10: where time enters",
        config="../cifar10.py",
        rows={
            "F position bias": {"model.time_in": "bias"},
            "G MLP": {"model.time_in": "mlp"},
            "H TMSA": {},
            "added to the tokens": {"model.time_in": "add"},
            "adaLN": {"model.time_in": "adaln"},
        },
        paper={"F position bias": 3.97, "G MLP": 3.81, "H TMSA": 1.95},
    )
