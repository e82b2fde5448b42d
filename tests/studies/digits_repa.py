"""Losses on tokens on digits: none, dispersive, SRA, REPA and REG, over three seeds.

    python tests/studies/digits_repa.py FOLDER [SEED …]

Each is trained by `configs/digits_repa.py` for 1,500 updates. 1,000 samples, of the averages after
500, 1,000 and 1,500 updates, without guidance and by 25 steps of Heun's method, are compared in
pixels with the held-out digits. FOLDER keeps everything; started again, what is there stays.
Results are in configs/RECIPES.md and tests/studies/digits_repa.json.
"""

import json
import logging
import sys
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
KINDS = ("none", "dispersive", "sra", "repa", "reg")
UPDATES = (500, 1_000, 1_500)
KEYS = ("frechet", "classifier_accuracy")


def main(folder: Path, seeds: list[int]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for kind in KINDS:
            workdir = folder / str(seed) / kind
            config = given_config(
                ConfigArgs.find([f"--config={ROOT}/configs/digits_repa.py:{kind}"])
            ).to_dict()
            config["seed"] = seed
            config["training"] |= {
                "total_steps": UPDATES[-1],
                "grid_steps": 0,
                "checkpoint_steps": 500,
                "keep_checkpoints": 4,
            }
            train(config, workdir=workdir)
            for updates in UPDATES:
                run = Run(workdir, checkpoint=updates)
                samples = sample(run, seeds=range(1_000), overrides={"guidance": "none"})
                scores = score(samples, dataset="digits", data_dir="", overwrite=True)
                of_kind = results.setdefault(f"{kind}, {updates}", {})
                of_kind[str(seed)] = {key: scores[key] for key in KEYS}
                print(kind, updates, of_kind, flush=True)
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    for name, found in results.items():
        figures = (
            f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"
            for values in ([one[key] for one in found.values()] for key in KEYS)
            if len(values) > 1
        )
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
