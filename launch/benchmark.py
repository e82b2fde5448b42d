"""Measures the training step of a config:

python launch/benchmark.py --config configs/digits.py
"""

import json

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config(required=True)
STEPS = flags.DEFINE_integer("steps", 50, "Updates to time.", lower_bound=1)
JSON = cli.define_path("json", "File to write the figures to.")
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()


def main() -> None:
    from diffit_jax.runtime import distributed, files
    from diffit_jax.verbs import benchmark

    figures = benchmark.measure(CONFIG.value, STEPS.value, FEWER_DEVICES(CONFIG.value))
    if not distributed.is_first():
        return
    for name, value in figures.items():
        print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if JSON.value:
        files.replace_in_words(JSON.value, (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, CLUSTER)
