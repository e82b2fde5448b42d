"""What power-cosine guidance loses by not running the unconditional pass where the scale is nearly 1.

  python tests/studies/skipped_guidance.py RUN [scale]      RUN: work directory of a latent experiment

Draws 64 samples with 250 DDPM steps and equal noise for each tolerance, and compares them with those of tolerance 0 without any skipping.
"""

import dataclasses
import sys

import jax
import numpy as np

from diffit_jax import experiment, parallel
from diffit_jax.generate import restore_variables
from diffit_jax.sampling import Sampler, default_labels


def main() -> None:
    workdir, scale = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 4.4
    loaded, mesh = experiment.build(experiment.read_config(workdir)), parallel.make_mesh()
    _, variables = restore_variables(workdir, loaded, parallel.replicated(mesh))
    seeds = np.arange(64)
    labels = default_labels(seeds, loaded.model.num_classes)
    drawn, evaluations = {}, {}
    for tolerance in (0.0, 1e-3, 0.03):
        settings = dataclasses.replace(
            loaded.sampling,
            sampler="ddpm",
            num_steps=250,
            guidance="power_cosine",
            guidance_scale=scale,
            guidance_power=4.0,
            skip_tolerance=tolerance,
            batch_size=64,
        )
        levels = loaded.process.steps("250").sqrt_recipm1_alphas_cumprod
        guided = np.sum(settings.guide.scales(loaded.process.time_of(levels), levels) != 1)
        evaluations[tolerance] = 250 + int(guided)
        drawn[tolerance] = Sampler(loaded, mesh, settings).draw(jax.device_put(variables, parallel.replicated(mesh)), seeds, labels)
    spread = drawn[0.0].std()
    print(f"scale {scale}; without skipping 500 evaluations; standard deviation of the samples {spread:.4f}")
    print("| tolerance | evaluations | saved | largest deviation | root mean square deviation |\n|---|---|---|---|---|")
    for tolerance, samples in drawn.items():
        difference = samples - drawn[0.0]
        count, rms = evaluations[tolerance], np.sqrt(np.mean(difference**2))
        print(f"| {tolerance:g} | {count} | {500 - count} ({(500 - count) / 5:.0f} %) | {np.abs(difference).max():.2e} | {rms:.2e} |")


if __name__ == "__main__":
    main()
