"""Makes configs/curves: how the small experiments train, of three seeds, and an image of it.

    python tests/studies/reference_curves.py digits digits_latent chain
    python tests/studies/reference_curves.py --draw

About ten minutes for each on two cores. `chain` takes its data from runs/chain, which
`bash launch/quickstart.sh chain` has made. Interrupted, the same command goes on.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from diffit_jax.runtime import config_files
from diffit_jax.training.loggers import Curve, read_figures

ROOT = Path(__file__).parents[2]
CURVES = ROOT / "configs" / "curves"
SEEDS = (0, 1, 2)
EVERY = 20  # updates between reports
SCORED = {"digits": 300, "digits_latent": 600, "chain": 400}  # updates between scores
SAMPLES = 360  # as many as there are held-out digits
SCORES = {"classifier_accuracy": "accuracy of a classifier", "frechet": "Fréchet distance (pixels)"}


def command(verb, *flags):
    subprocess.run([sys.executable, f"launch/{verb}.py", *map(str, flags)], cwd=ROOT, check=True)


def config_of(name):
    """(the flag's value, the config, flags of data and of decoding)."""
    more = "runs/chain" if name == "chain" else ""
    path = f"configs/{name}.py"
    if not more:
        return path, config_files.load(str(ROOT / path)), ["--dataset", "digits"], []
    data = ["--dataset", "digits32", "--data_dir", f"{more}/data"]
    given = config_files.load(f"{ROOT / path}:{ROOT / more}")
    return f"{path}:{more}", given, data, ["--vae", f"{more}/autoencoder"]


def make(name):
    file, config, data, decoding = config_of(name)
    every, losses, scores = SCORED[name], {}, {score: {} for score in SCORES}
    steps = list(range(every, config.training.total_steps + 1, every))
    for seed in SEEDS:
        workdir = ROOT / "runs" / "curves" / f"{name}-{seed}"
        keys = dict(log_steps=EVERY, checkpoint_steps=every, keep_every_steps=every)
        keys |= dict(grid_steps=config.training.total_steps)
        flags = [f"--config.training.{key}={value}" for key, value in keys.items()]
        if "evaluation" in config:
            flags += ["--config.evaluation.steps=0", "--config.evaluation.loss_steps=0"]
        command("train", "--config", file, "--workdir", workdir, f"--config.seed={seed}", *flags)
        found = read_figures(workdir)["loss"]
        losses[seed] = [round(loss, 5) for loss in found.values()]
        for score in SCORES:
            scores[score][seed] = []
        for step in steps:
            place, measured = workdir / f"{step}.npz", workdir / f"{step}.metrics.json"
            if not measured.exists():
                chosen = ["--checkpoint", step, "--seeds", f"0-{SAMPLES - 1}"]
                command("sample", "--workdir", workdir, *chosen, "--output", place, *decoding)
                command("score", "--samples", place, *data, "--output", measured)
            figures = json.loads(measured.read_text())
            for score in SCORES:
                scores[score][seed].append(round(figures[score], 4))
    plain = json.loads(config.to_json())
    plain.pop("evaluation", None)
    if name == "chain":
        plain["data"]["data_dir"] = "runs/chain/data"
    device = jax.devices()[0].device_kind
    made_on = f"{device}, jax {jax.__version__}"
    curve = Curve(plain, made_on, list(found), losses, steps, scores)
    CURVES.mkdir(exist_ok=True)
    (CURVES / f"{name}.json").write_text(json.dumps(dataclasses.asdict(curve)) + "\n")


def draw():
    """Losses on the left, scores on the right, a row for each experiment."""
    names = [name for name in SCORED if (CURVES / f"{name}.json").exists()]
    figure, axes = plt.subplots(len(names), 3, figsize=(11, 2.7 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        curve = Curve.read(CURVES / f"{name}.json")
        low, high = curve.band(curve.updates[-1])
        row[0].fill_between(curve.updates, low, high, color="0.85", label="band")
        for seed, losses in curve.loss.items():
            row[0].plot(curve.updates, losses, linewidth=0.8, label=f"seed {seed}")
        row[0].set(title=f"{name}: training loss", yscale="log", xlabel="updates")
        row[0].legend(fontsize=8)
        for axis, (score, title) in zip(row[1:], SCORES.items(), strict=True):
            for seed, values in curve.scores[score].items():
                axis.plot(curve.score_updates, values, marker="o", markersize=3, label=seed)
            axis.set(title=f"{name}: {title}", xlabel="updates", xlim=(0, None))
            axis.set_ylim((None, 1.02) if "accuracy" in score else (0, None))
        row[0].set_ylim(0.8 * np.min(list(curve.loss.values())), None)
    figure.tight_layout()
    figure.savefig(CURVES / "curves.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SCORED, []])
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    for name in given.names:
        make(name)
    draw()


if __name__ == "__main__":
    main()
