"""Measures the training step of a config, or of all combinations of a few settings:

python launch/benchmark.py --config configs/digits.py
python launch/benchmark.py --config configs/imagenet256_latent.py --matrix
"""

import json

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config(required=True)
STEPS = flags.DEFINE_integer("steps", 50, "Updates to time.", lower_bound=1)
MATRIX = flags.DEFINE_bool(
    "matrix", False, "Batch size x rematerialisation x attention: measures each, shows the best."
)
BATCH_SIZES = flags.DEFINE_string(
    "batch_sizes", "", "With --matrix: images per update, such as 64,128; else half, once, twice."
)
REMATS = flags.DEFINE_list("remats", [], "With --matrix: some of none, dots, full.")
ATTENTIONS = flags.DEFINE_list(
    "attentions", [], "With --matrix: some of auto, xla, cudnn (GPUs), pallas (TPUs)."
)
JSON = cli.define_path("json", "File to write the figures to.")
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()


def main() -> None:
    from diffit_jax.runtime import distributed, files, ranges
    from diffit_jax.verbs import benchmark, matrix

    if MATRIX.value:
        figures = matrix.matrix(
            CONFIG.value,
            steps=STEPS.value,
            batches=BATCH_SIZES.value and ranges.parse_numbers("--batch_sizes", BATCH_SIZES.value),
            remats=REMATS.value,
            attentions=ATTENTIONS.value,
            fewer_devices=flags.FLAGS.fewer_devices,
        )
    else:
        figures = benchmark.measure(CONFIG.value, STEPS.value, FEWER_DEVICES(CONFIG.value))
        if not distributed.is_first():
            return
        for name, value in figures.items():
            print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if JSON.value:
        files.replace_in_words(JSON.value, (json.dumps(figures, indent=2) + "\n").encode())


def run() -> None:
    # The processes of a matrix need the devices for themselves.
    cli.run(main, CLUSTER, takes_devices=lambda: not MATRIX.value)
