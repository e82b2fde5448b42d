"""Scores samples:

python launch/evaluate.py --samples runs/digits/samples_1000x8x8x1.npz --dataset digits
"""

from absl import flags

from diffit_jax import cli

SAMPLES = cli.define_path(
    "samples", "npz file with arr_0 (images) and arr_1 (labels), as launch/sample.py writes it."
)
DATASET = flags.DEFINE_string("dataset", "digits", "Data set that the samples imitate.")
DATA_DIR = cli.define_path(
    "data_dir", "Where prepared data sets live; default: ~/tensorflow_datasets."
)
OUTPUT = cli.define_path(
    "output", "JSON file to write; default: NAME_OF_THE_SAMPLES.metrics.json beside them."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores of other samples.")
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("samples")


def main() -> None:
    from diffit_jax.evaluation.small import score_table
    from diffit_jax.runtime import distributed
    from diffit_jax.verbs.evaluate import evaluate

    def score() -> dict:
        output = OUTPUT.value
        return evaluate(SAMPLES.value, DATASET.value, DATA_DIR.value or "", output, OVERWRITE.value)

    # These scores are a matter of seconds for one process; of several the others wait.
    scores = distributed.first_then_all(score, lambda: None)
    if scores:
        print(score_table(scores))


if __name__ == "__main__":
    cli.run(main, CLUSTER)
