"""Does this installation train as it should? Compares 300 updates with a reference curve.

diffit check
"""

from absl import flags

from diffit_jax import cli

CURVE = cli.define_path("curve", "Reference curve, a file of configs/curves; default: digits.json.")
CONFIG = cli.define_config("File with get_config(), where the curve's data lie elsewhere.")
STEPS = flags.DEFINE_integer("steps", 300, "Updates to train.", lower_bound=1)
WORKDIR = cli.define_path("workdir", "Directory of the run; default: one that is deleted.")
FEWER_DEVICES = cli.define_fewer_devices()


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime import config_files
    from diffit_jax.training.check import check, table
    from diffit_jax.training.loggers import Curve

    curve = Curve.read(CURVE.value or config_files.own("curves/digits.json", "--curve"))
    checked = check(
        curve, config=CONFIG.value, steps=STEPS.value, workdir=WORKDIR.value, devices=FEWER_DEVICES
    )
    print(table(checked))
    if checked.from_same_seed is not None:
        print(f"at most {checked.from_same_seed:.2%} from the curve of the same seed")
    if checked.outside:
        first = checked.outside[0]
        cli.fail(
            f"after {checked.updates[first]} updates the loss is {checked.loss[first]:.4f}, not in "
            f"{checked.low[first]:.4f} to {checked.high[first]:.4f}: something here computes "
            "otherwise; compare the versions with constraints.txt, try JAX_PLATFORMS=cpu, and "
            "JAX_DEFAULT_MATMUL_PRECISION=highest"
        )
    print(f"inside the band at all {len(checked.updates)} reports")
