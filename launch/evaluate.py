"""Scores samples: python launch/evaluate.py --samples runs/digits/samples_1000x8x8x1.npz --dataset digits"""

from absl import flags

from diffit_jax import cli

SAMPLES = flags.DEFINE_string("samples", None, "npz file with arr_0 (images) and arr_1 (labels), as launch/sample.py writes it.")
DATASET = flags.DEFINE_string("dataset", "digits", "Data set that the samples imitate.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "Where prepared data sets live; empty: ~/tensorflow_datasets.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; default: metrics.json beside the samples.")
flags.mark_flag_as_required("samples")


def main() -> None:
    from diffit_jax.evaluation.score import evaluate, score_table

    print(score_table(evaluate(SAMPLES.value, DATASET.value, DATA_DIR.value, OUTPUT.value)))


if __name__ == "__main__":
    cli.run(main)
