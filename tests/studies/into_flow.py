"""A flow made of a DDPM network, on digits: how well it draws after 0, 100 … updates.

    python tests/studies/into_flow.py FOLDER

`digits_latent` is trained and exported, turned into a flow by the verb `convert`, and fine-tuned as
`digits_latent_flow` says with a quarter of its learning rate. 1,000 samples each, guidance 1.5, are
compared in pixels with the held-out digits. FOLDER keeps everything; started again, what is there
stays. Results are in configs/RECIPES.md.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from on_digits import ROOT, measured

from diffit_jax.experiment.config import given_config
from diffit_jax.runtime.config_files import ConfigArgs
from diffit_jax.sampling.convert import workdir_to_weights
from diffit_jax.training.train import train

UPDATES = (0, 100, 200, 400, 800)
SAMPLERS: dict[str, dict[str, Any]] = {
    "euler, 50 evaluations": {"sampler": "euler", "sampler.num_steps": 50},
    "euler, 10 evaluations": {"sampler": "euler", "sampler.num_steps": 10},
}


def main(folder: Path) -> None:
    start, flow, weights = folder / "ddpm", folder / "flow", folder / "ddpm.safetensors"
    train(
        given_config(ConfigArgs.find([f"--config={ROOT}/configs/digits_latent.py"])), workdir=start
    )
    if not weights.exists():
        workdir_to_weights(start, weights=weights)
    results = {"DDPM, its own sampler, 100 evaluations": measured(start, 3_000, {})}
    for name in (50, 10):
        ddim = {"sampler": "ddim", "sampler.num_steps": name}
        results[f"DDPM, ddim, {name} evaluations"] = measured(start, 3_000, ddim)
    if not (flow / "config.json").exists():
        config = ROOT / "configs" / "digits_latent_flow.py"
        command = f"-m diffit_jax convert --weights {weights} --config {config} --to_workdir {flow}"
        subprocess.run([sys.executable, *command.split()], check=True)
    for updates in UPDATES:
        changed = json.loads((flow / "config.json").read_text())
        changed["optimizer"]["learning_rate"] = 5e-4
        changed["training"] |= {"total_steps": max(updates, 1), "checkpoint_steps": 100,
                                "keep_checkpoints": 10, "grid_steps": 0}  # fmt: skip
        if updates:
            (flow / "config.json").write_text(json.dumps(changed))
            train(changed, workdir=flow)
        for name, settings in SAMPLERS.items():
            results[f"flow, {updates} updates, {name}"] = measured(flow, updates, settings)
    text = "".join(
        f"| {name} | {one['frechet']:.3f} | {one['classifier_accuracy']:.3f} |\n"
        for name, one in results.items()
    )
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]))
