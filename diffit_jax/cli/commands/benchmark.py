"""Measures the training step of a config, of all combinations of a few settings, or beside PyTorch.

diffit benchmark --config configs/digits.py
diffit benchmark --config configs/imagenet256_latent.py --sweep batch,remat
diffit benchmark --config configs/imagenet256_latent.py:S/2 --beside_torch python
"""

import functools
import json
import os

from absl import flags

from diffit_jax import cli
from diffit_jax.errors import UserError

CONFIG = cli.define_config(required=True)
STEPS = flags.DEFINE_integer("steps", 50, "Updates to time.", lower_bound=1)
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Settings to compare, each in a process of its own: batch,remat,attention with their usual "
    "values, or batch=64,128,attention=xla,cudnn.",
)
BESIDE_TORCH = flags.DEFINE_string(
    "beside_torch",
    None,
    "A Python that has PyTorch: time a latent network, updates and evaluations, in turns with the "
    "same one there.",
)
JSON = cli.define_path("json", "File to write the figures to.")
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime import console, distributed, files
    from diffit_jax.training import benchmark

    if SWEEP.value and BESIDE_TORCH.value:
        raise UserError("--sweep and --beside_torch exclude each other: give one")
    if SWEEP.value:
        figures = benchmark.matrix(
            CONFIG.value,
            steps=STEPS.value,
            sweep=console.parse_sweep(SWEEP.value, benchmark.KNOWN),
            fewer_devices=flags.FLAGS.fewer_devices,
        )
    else:
        if BESIDE_TORCH.value:  # both libraries share a GPU's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            measure = functools.partial(benchmark.beside_torch, python=BESIDE_TORCH.value)
        else:
            measure = benchmark.measure
        figures = measure(CONFIG.value, steps=STEPS.value, devices=FEWER_DEVICES(CONFIG.value))
        if not distributed.is_primary():
            return
        for name, value in figures.items():
            print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if JSON.value:
        files.replace_with_notice(JSON.value, (json.dumps(figures, indent=2) + "\n").encode())


def takes_devices() -> bool:
    """Return False for a sweep, whose processes need the devices for themselves.

    And beside PyTorch, which needs some of their memory.
    """
    return not SWEEP.value and not BESIDE_TORCH.value
