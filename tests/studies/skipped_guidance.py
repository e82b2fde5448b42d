"""What power-cosine guidance loses by not running the unconditional pass where the scale is nearly
1.

  python tests/studies/skipped_guidance.py RUN [scale]      RUN: work directory of a latent
  experiment

Draws 64 samples with 250 DDPM steps and equal noise for each tolerance, and compares them with
samples whose every step runs both passes.
"""

import dataclasses
import sys

import numpy as np
from etils import epath

from diffit_jax.diffusion.guidance import PowerCosine
from diffit_jax.run import workdir as workdirs
from diffit_jax.run.state import setup_experiment
from diffit_jax.sampling.request import restore_variables
from diffit_jax.sampling.sampler import Sampler, default_labels


@dataclasses.dataclass(frozen=True)
class NeverSkipped(PowerCosine):
    """With the float after 1 in place of 1."""

    def scales(self, time: np.ndarray, step_sigma: np.ndarray) -> np.ndarray:
        scales = super().scales(time, step_sigma)
        return np.where(scales == 1, np.nextafter(np.float32(1), np.float32(2)), scales)


def main() -> None:
    workdir, scale = epath.Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 4.4
    setup = setup_experiment(workdirs.read_config(workdir), to_train=False)
    loaded, mesh = setup.experiment, setup.mesh
    _, variables = restore_variables(workdir, setup)
    seeds = np.arange(64)
    labels = default_labels(seeds, loaded.model.num_classes)
    levels = loaded.process.schedule_for("250").sqrt_recipm1_alphas_cumprod

    def draw(guidance: PowerCosine) -> tuple[np.ndarray, int]:
        """(samples, unconditional evaluations)"""
        ancestral = loaded.sampling.overridden({"sampler": "ddpm", "sampler.num_steps": 250})
        sampling = dataclasses.replace(ancestral, guidance=guidance, batch_per_device=64)
        samples = Sampler(loaded.with_sampling(sampling), mesh).draw(variables, seeds, labels)
        scales = guidance.scales(loaded.process.time_of(levels), levels)
        return samples, int(np.sum(scales != 1))

    exact, count = draw(NeverSkipped(scale, skip_tolerance=0.0))
    print(
        f"scale {scale}; without skipping {count} unconditional evaluations, samples' standard "
        f"deviation {exact.std():.4f}"
    )
    print(
        "| tolerance | evaluations of 500 | unconditional ones saved | largest deviation | root "
        "mean square |\n|---|---|---|---|---|"
    )
    for tolerance in (0.0, 1e-3, 0.03):
        samples, count = draw(PowerCosine(scale, skip_tolerance=tolerance))
        difference = samples - exact
        rms = np.sqrt(np.mean(difference**2))
        print(
            f"| {tolerance:g} | {250 + count} | {1 - count / 250:.0%} | "
            f"{np.abs(difference).max():.2e} | {rms:.2e} |"
        )


if __name__ == "__main__":
    main()
