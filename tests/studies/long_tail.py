"""Rare classes: digits with a tail of 10:1, drawn as they are, by the root of their number, alike.

    python tests/studies/long_tail.py FOLDER

Each class has fewer training images than the one before, from 140 down to 14, evenly in the
logarithm. Each rule trains 600 updates from seed 0; 1,000 samples, 100 of each class, are
compared in pixels with all 1,437 training digits, class by class. FOLDER keeps runs and
`results.json`; started again, what is there stays. Results are in configs/ABLATIONS.md.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffit_jax.data.sources import open_dataset
from diffit_jax.evaluation.classes import by_class
from diffit_jax.evaluation.small import pixel_features
from diffit_jax.experiment.config import given_config
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.prepare import prepare
from diffit_jax.runtime.config_files import ConfigArgs
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

ROOT = Path(__file__).resolve().parents[2]
COUNTS = np.rint(np.geomspace(140, 14, 10)).astype(int)
RULES = ("natural", "square_root", "balanced")
SEEDS = (0,)
COMMON, RARE = slice(0, 5), slice(5, 10)
MEASURES = ("accuracy", "recall", "precision", "coverage", "fid")


def make_data(folder: Path) -> None:
    """Write the long-tailed training images as PNG files, and prepare them."""
    if (folder / "data" / "long_tail").exists():
        return
    digits = open_dataset("digits", "train", str(folder / "data"))
    everything = digits.read(np.arange(len(digits)))
    for label, count in enumerate(COUNTS):
        of_class = everything["image"][everything["label"] == label][:count]
        for number, image in enumerate(of_class):
            path = folder / "images" / str(label) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    grey = Preprocessing("none", 0, 1)
    where = str(folder / "data")
    prepare(folder / "images", name="long_tail", data_dir=where, preprocessing=grey, workers=0)


def measure(folder: Path, rule: str, seed: int) -> dict[str, list[float]]:
    """Train by a rule, and measure each class: a list over the ten for each measure."""
    keys = {
        "seed": seed,
        "data.name": "long_tail",
        "data.data_dir": folder / "data",
        "data.class_sampling": rule,
        "training.total_steps": 600,
        "training.grid_steps": 600,
        "training.checkpoint_steps": 600,
        "optimizer.warmup_steps": 100,
    }
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    config = given_config(ConfigArgs.find([f"--config={ROOT / 'configs' / 'digits.py'}", *words]))
    run = folder / f"{rule}-{seed}"
    train(config, workdir=run)
    with np.load(sample(run, seeds=range(1_000))) as made:
        samples, labels = pixel_features(made["arr_0"]), made["arr_1"]
    digits = open_dataset("digits", "train", str(folder / "data"))
    real = digits.read(np.arange(len(digits)))
    found = by_class(pixel_features(real["image"]), real["label"], samples, labels)
    of_class = [found["classes"][str(label)] for label in range(10)]
    return {name: [one[name] for one in of_class] for name in MEASURES}


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folder = Path(sys.argv[1]).resolve()
    make_data(folder)
    place = folder / "results.json"
    results = json.loads(place.read_text()) if place.exists() else {}
    for seed in SEEDS:
        for rule in RULES:
            if f"{rule}-{seed}" not in results:
                results[f"{rule}-{seed}"] = measure(folder, rule, seed)
                place.write_text(json.dumps(results, indent=1))
    print(f"| | {' | '.join(f'{name}, common | rare' for name in MEASURES)} |")
    for rule in RULES:
        cells = []
        for name in MEASURES:
            values = np.mean([results[f"{rule}-{seed}"][name] for seed in SEEDS], axis=0)
            cells += [f"{values[COMMON].mean():.3f}", f"{values[RARE].mean():.3f}"]
        print(f"| {rule} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
