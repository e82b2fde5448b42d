"""Recipes on digits: EDM, ADM and flow matching with one network, budget and seeds.

`diffit ablate --ablation configs/ablations/flow.py --workdir runs/recipes`: 18 runs of about two
minutes on two CPU cores. Each is sampled by a first-order method with one evaluation a step, at
four numbers of steps. Table: configs/RECIPES.md.
"""

FLOW = {"process.name": "flow", "process.sigma_data": 0.75, "sampling.sampler.name": "euler"}
LOGIT_NORMAL = {**FLOW, "process.times": "logit_normal"}
DIRECTION = {**LOGIT_NORMAL, "process.direction_weight": 1.0}


def get_ablation() -> dict:
    """Return the ablation."""
    return dict(
        title="Digits, 8×8: recipes",
        config="../digits.py",
        seeds=(0, 1, 2),
        samples=1_000,
        metric="frechet",
        steps=(5, 10, 18, 50),
        overrides={
            "training.total_steps": 600,
            "training.grid_steps": 600,
            "training.checkpoint_steps": 600,
            "optimizer.warmup_steps": 100,
        },
        rows={
            "EDM": {"sampling.sampler.name": "euler"},
            "ADM": {
                "process.name": "ddpm",
                "process.variance": "fixed_large",
                "process.loss_type": "mse",
                "sampling.sampler.name": "ddim",
                "sampling.sampler.clip_denoised": True,  # as ADM's code does
            },
            "flow, uniform times": FLOW,
            "flow, logit-normal times": LOGIT_NORMAL,
            "+ direction loss": DIRECTION,
            "+ β2 0.95": {**DIRECTION, "optimizer.beta2": 0.95},
        },
    )
