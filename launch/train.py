"""Trains a config: python launch/train.py --config configs/digits.py --workdir runs/digits [--config.section.key=value …]"""

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://; a run that is in it is continued.")
CLUSTER = cli.define_cluster()
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    from diffit_jax.training.loop import train

    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, CLUSTER)
