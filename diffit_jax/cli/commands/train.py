"""Trains a config, or resumes a run.

python launch/train.py --config configs/digits.py --workdir runs/digits
"""

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config(required=True)
WORKDIR = cli.define_path(
    "workdir", "Directory of the run, local or gs://; a run that is in it is continued."
)
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
