"""Trains a config, or resumes a run.

    diffit train --config digits --workdir runs/digits
    diffit train --workdir runs/digits

The second resumes the run with the config that it has. Keys that do not change its numbers can be
set again: --config.training.total_steps=3000.
"""

from absl import flags

from diffit_jax import cli

WORKDIR = cli.define_path(
    "workdir", "Directory of the run, local or gs://; a run that is in it is continued."
)
CONFIG = cli.define_config(required=True, run=lambda: WORKDIR.value)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps of which to write a profiler trace: 10 or 10-15."
)
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime.console import parse_numbers
    from diffit_jax.training.train import train

    steps = PROFILE_STEPS.value and parse_numbers("--profile_steps", PROFILE_STEPS.value)
    train(
        CONFIG.value,
        workdir=WORKDIR.value,
        profile_steps=(steps[0], steps[-1]) if steps else None,
        devices=FEWER_DEVICES(CONFIG.value),
    )
