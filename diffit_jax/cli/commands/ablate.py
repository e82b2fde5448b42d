r"""Trains a config with one switch changed at a time, over seeds, and makes the table.

    diffit ablate --ablation configs/ablations/digits.py --workdir runs/ablation
    diffit ablate --ablation configs/ablations/digits.py --workdir runs/ablation \
        --row tmsa --seed 0

Interrupted, the same command resumes. The second runs one row and seed, on any machine;
--merge reads the results.jsonl of others.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import InceptionFlags

ABLATION = cli.define_path("ablation", "File of configs/ablations/, perhaps with :VARIANT.")
WORKDIR = cli.define_path(
    "workdir", "Directory of runs, results and the table, local or gs://; what is there stays."
)
ROW = flags.DEFINE_string("row", None, "The only row to run; default: all.")
SEED = flags.DEFINE_integer("seed", None, "The only seed to run; default: all of the ablation.")
RUN = flags.DEFINE_bool("run", True, "--norun only makes the table of the results that are there.")
MERGE = flags.DEFINE_list("merge", [], "Files results.jsonl of other machines for the table.")
REFERENCE = cli.define_path(
    "reference", "npz file of statistics, for ablations that FID decides.", to_read=True
)
INCEPTION = InceptionFlags(dinov2=False)
FEWER_DEVICES = cli.define_fewer_devices()
CLUSTER = cli.define_cluster()
flags.mark_flags_as_required(["ablation", "workdir"])


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation.evaluator import Comparison
    from diffit_jax.runtime import distributed
    from diffit_jax.training import ablate

    ablation = ablate.Ablation.load(ABLATION.value)
    comparison = None
    if REFERENCE.value:
        comparison = Comparison(REFERENCE.value, metrics=["fid"], **INCEPTION.value)
    if RUN.value:
        config = ablation.config_of(next(iter(ablation.rows)), ablation.seeds[0])
        ablate.ablate(
            ablation,
            workdir=WORKDIR.value,
            row=ROW.value,
            seed=SEED.value,
            comparison=comparison,
            devices=FEWER_DEVICES(config),
        )
    if distributed.is_primary():
        results = ablate.gather(ablation, WORKDIR.value, MERGE.value)
        path = ablate.write_table(ablation, results, WORKDIR.value)
        print(ablate.table(ablation, results), end="")
        print(f"wrote {path}")
