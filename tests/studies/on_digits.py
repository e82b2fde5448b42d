"""What studies on digits share: runs of a config over seeds, their scores, and tables of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffit_jax.evaluation.score import score
from diffit_jax.experiment.config import given_config
from diffit_jax.runtime.config_files import ConfigArgs
from diffit_jax.sampling.request import Run
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("frechet", "classifier_accuracy")


def every(updates: int) -> dict[str, int]:
    """Settings of training for so many updates, without grids."""
    return {"total_steps": updates, "grid_steps": 0, "checkpoint_steps": 500}


def trained(config: str, workdir: Path, seed: int, updates: int, **training: int) -> Path:
    """Train a config of configs/, NAME or NAME:VARIANT; `training`: further settings."""
    name, _, variant = config.partition(":")
    given = f"--config={ROOT}/configs/{name}.py" + (f":{variant}" if variant else "")
    made = given_config(ConfigArgs.find([given])).to_dict()
    made["seed"] = seed
    made["training"] |= every(updates) | training
    train(made, workdir=workdir)
    return workdir


def measured(workdir: Path, step: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """Score 1,000 samples of a checkpoint, drawn with these settings."""
    run = Run(workdir, checkpoint=step)
    samples = sample(run, seeds=range(1_000), overrides=settings)
    scores = score(samples, dataset="digits", data_dir="", overwrite=True)
    return {key: scores[key] for key in KEYS}


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of means and standard errors over seeds, of results by name and seed."""
    for name, found in results.items():
        figures = (
            f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"
            for values in ([one[key] for one in found.values()] for key in KEYS)
            if len(values) > 1
        )
        print(f"| {name} | {' | '.join(figures)} |")
