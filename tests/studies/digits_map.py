"""One to four steps on digits: flow maps of a trained flow and from scratch, over three seeds.

    python tests/studies/digits_map.py FOLDER [SEED …]

`digits_flow` is trained (the teacher), made a map by the verb `convert` and trained on (DMF).
`digits_map:meanflow` is trained from scratch for as many updates as both together, and `:imf`,
whose updates cost more on the latent network, for half of them. 1,000 samples each are compared in
pixels with the held-out digits. FOLDER keeps everything; started again, what is there stays.
Results are in configs/RECIPES.md.
"""

import json
import logging
import subprocess
import sys
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
TEACHER, MAP = 1_000, 1_000  # updates
RATE = 1e-3  # of the map that is made of the teacher
STEPS = (1, 2, 4)


def main(folder: Path, seeds: list[int]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        of_seed = folder / str(seed)
        teacher = trained("digits_flow", of_seed / "flow", seed, TEACHER)
        for steps in (*STEPS, 18):
            euler = {"sampler": "euler", "sampler.num_steps": steps}
            note(results, seed, f"flow, euler {steps}", teacher, TEACHER, euler)
        made = of_seed / "map"
        if not (made / "config.json").exists():
            config = ROOT / "configs" / "digits_map.py"
            command = f"convert --workdir {teacher} --config {config} --to_workdir {made}"
            subprocess.run([sys.executable, "-m", "diffit_jax", *command.split()], check=True)
        changed = json.loads((made / "config.json").read_text())
        changed["optimizer"] |= {"learning_rate": RATE, "warmup_steps": 100}
        changed["training"] |= every(MAP)
        (made / "config.json").write_text(json.dumps(changed))
        train(changed, workdir=made)
        runs = {"DMF": (made, MAP)}
        for name, updates in (("meanflow", TEACHER + MAP), ("imf", MAP)):
            runs[name] = trained(f"digits_map:{name}", of_seed / name, seed, updates), updates
        for name, (workdir, updates) in runs.items():
            for steps in STEPS:
                one = {"sampler.num_steps": steps}
                note(results, seed, f"{name}, {steps}", workdir, updates, one)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    for name, found in results.items():
        figures = (
            f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"
            for values in ([one[key] for one in found.values()] for key in KEYS)
            if len(values) > 1
        )
        print(f"| {name} | {' | '.join(figures)} |")


KEYS = ("frechet", "classifier_accuracy")


def every(updates: int) -> dict[str, int]:
    return {"total_steps": updates, "grid_steps": 0, "checkpoint_steps": 500}


def trained(config: str, workdir: Path, seed: int, updates: int) -> Path:
    name, _, variant = config.partition(":")
    given = f"--config={ROOT}/configs/{name}.py" + (f":{variant}" if variant else "")
    made = given_config(ConfigArgs.find([given])).to_dict()
    made["seed"] = seed
    made["training"] |= every(updates)
    train(made, workdir=workdir)
    return workdir


def note(
    results: dict[str, Any],
    seed: int,
    name: str,
    workdir: Path,
    step: int,
    settings: Mapping[str, Any],
) -> None:
    run = Run(workdir, checkpoint=step)
    samples = sample(run, seeds=range(1_000), overrides=settings)
    scores = score(samples, dataset="digits", data_dir="", overwrite=True)
    results.setdefault(name, {})[str(seed)] = {key: scores[key] for key in KEYS}
    print(name, results[name], flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
