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

from on_digits import ROOT, every, measured, print_table, trained

from diffit_jax.training.train import train

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
    print_table(results)


def note(
    results: dict[str, Any],
    seed: int,
    name: str,
    workdir: Path,
    step: int,
    settings: Mapping[str, Any],
) -> None:
    results.setdefault(name, {})[str(seed)] = measured(workdir, step, settings)
    print(name, results[name], flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
