"""Identifies a file or folder: a run, weights, a data set, a reference, samples, an autoencoder.

diffit info runs/digits
diffit info diffit_256.safetensors
"""

from diffit_jax import cli

PATH = cli.define_path("path", "What is asked about; --path may be left out.", to_read=True)
cli.define_positional("path")


def check() -> None:
    """Look whether there is a path."""
    cli.require_one(path=PATH.value)


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation.info import info

    print("\n".join(info(PATH.value)))


def takes_devices() -> bool:
    """Return False: nothing is computed."""
    return False
