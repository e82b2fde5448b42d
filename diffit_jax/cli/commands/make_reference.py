r"""Computes the statistics of a data set, the reference that evaluate compares samples with.

    diffit make_reference --dataset cifar10 --output cifar10.npz \
        --inception pt_inception-2015-12-05-6726825d.pth

Interrupted, the same command resumes.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import InceptionFlags, define_data_dir, define_samples

SAMPLES = define_samples("npz file with arr_0 (images), or folder of images.")
DATASET = flags.DEFINE_string("dataset", None, "Or the name of a data set.")
DATA_DIR = define_data_dir()
OUTPUT = cli.define_path("output", "npz file for the statistics.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a file that is there.")
INCEPTION = InceptionFlags()
CLUSTER = cli.define_cluster()
flags.mark_flag_as_required("output")


def main() -> None:
    """Run the command."""
    from diffit_jax.data.sources import open_dataset
    from diffit_jax.evaluation.features import Networks
    from diffit_jax.evaluation.images import DatasetImages, open_samples
    from diffit_jax.evaluation.make_reference import make_reference
    from diffit_jax.runtime import distributed, hub

    cli.require_one(samples=SAMPLES.value, dataset=DATASET.value)
    if SAMPLES.value:
        images = open_samples(hub.local(SAMPLES.value, "samples"))
    else:
        source = open_dataset(DATASET.value, "train", DATA_DIR.value or "")
        images = DatasetImages(source, f"data set {DATASET.value}, train")
    networks = INCEPTION.value
    batch = networks.pop("batch_per_device")
    path = make_reference(
        images,
        output=OUTPUT.value,
        networks=Networks(**networks),
        batch_per_device=batch,
        overwrite=OVERWRITE.value,
    )
    if distributed.is_primary():
        print(f"wrote {path}")
