"""Scores samples of a small data set without a FID network: classifier, pixel distances.

diffit score --samples runs/digits/samples_1000x8x8x1.npz --dataset digits
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import define_data_dir, define_samples

SAMPLES = define_samples("npz file with images and labels, as diffit sample writes it.")
DATASET = flags.DEFINE_string("dataset", "digits", "Data set that the samples imitate.")
DATA_DIR = define_data_dir()
OUTPUT = cli.define_path(
    "output", "JSON file to write; default: NAME_OF_THE_SAMPLES.metrics.json beside them."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores of other samples.")
CLUSTER = cli.define_cluster()


def check() -> None:
    """Look whether there are samples."""
    cli.require_one(samples=SAMPLES.value)


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation.score import score
    from diffit_jax.evaluation.small import score_table
    from diffit_jax.runtime import distributed

    data_dir = DATA_DIR.value or ""
    # They are a matter of seconds for one process; of several the others wait.
    found = distributed.on_primary(
        lambda: score(
            SAMPLES.value,
            dataset=DATASET.value,
            data_dir=data_dir,
            output=OUTPUT.value,
            overwrite=OVERWRITE.value,
        )
    )
    if found:
        print(score_table(found))
