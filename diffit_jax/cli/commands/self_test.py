"""Measures ADM's published samples and compares the figures with the published ones.

diffit self_test --folder ref_batches --inception pt_inception-2015-12-05-6726825d.pth
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import InceptionFlags

FOLDER = cli.define_path(
    "folder", "Folder with ADM's published samples and reference.", to_read=True
)
INCEPTION = InceptionFlags(dinov2=False)
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("folder")


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation import self_test
    from diffit_jax.runtime import distributed

    asked = INCEPTION.value
    rows = self_test.self_test(
        FOLDER.value, inception=asked["inception"], batch_per_device=asked["batch_per_device"]
    )
    if distributed.is_primary():
        print(self_test.table(rows))
    if not all(row["passed"] for row in rows):
        cli.fail("the figures are not the published ones (see above)")
