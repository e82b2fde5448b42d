"""Measures the training step of a config, or of all combinations of a few settings.

python launch/benchmark.py --config configs/digits.py
python launch/benchmark.py --config configs/imagenet256_latent.py --sweep batch,remat
"""

import json

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config(required=True)
STEPS = flags.DEFINE_integer("steps", 50, "Updates to time.", lower_bound=1)
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Settings to compare, each in a process of its own: batch,remat,attention with their usual "
    "values, or batch=64,128,attention=xla,cudnn.",
)
JSON = cli.define_path("json", "File to write the figures to.")
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime import console, distributed, files
    from diffit_jax.training import benchmark

    if SWEEP.value:
        figures = benchmark.matrix(
            CONFIG.value,
            steps=STEPS.value,
            sweep=console.parse_sweep(SWEEP.value, benchmark.KNOWN),
            fewer_devices=flags.FLAGS.fewer_devices,
        )
    else:
        figures = benchmark.measure(
            CONFIG.value, steps=STEPS.value, devices=FEWER_DEVICES(CONFIG.value)
        )
        if not distributed.is_primary():
            return
        for name, value in figures.items():
            print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if JSON.value:
        files.replace_with_notice(JSON.value, (json.dumps(figures, indent=2) + "\n").encode())


def takes_devices() -> bool:
    """Return False for a sweep, whose processes need the devices for themselves."""
    return not SWEEP.value
