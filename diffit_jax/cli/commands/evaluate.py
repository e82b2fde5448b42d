r"""Computes FID and the rest of ADM's suite, of a file or folder of images, or of a network.

    diffit evaluate --samples samples_50000x256x256x3.npz \
        --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth

`--workdir` or `--weights` in place of `--samples` draws the samples. Small data sets are scored
without a network by diffit score; diffit make_reference makes a reference, diffit sweep
looks for the best settings.

If interrupted, run the same command again to resume.
"""

import dataclasses

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import (
    DecodingFlags,
    InceptionFlags,
    NetworkFlags,
    SamplingFlags,
    ScoreFlags,
    define_samples,
)

SAMPLES = define_samples(
    "npz file with arr_0 (images), as diffit sample writes it, or folder of images."
)
NETWORK = NetworkFlags()  # or a network, whose samples are drawn and measured
SCORES = ScoreFlags("NAME_OF_THE_SAMPLES.metrics.json beside them", "the scores of other samples")
INCEPTION = InceptionFlags()
COUNT = flags.DEFINE_integer(
    "count", None, "How many of the first samples; default: all, or 50,000 of a network."
)
SEEDS = flags.DEFINE_string(
    "seeds",
    None,
    "Seed numbers of a network's samples: 0-49999, or several ranges (0-49999,50000-99999), each "
    "of which is measured by itself; the lowest FID counts.",
)
BY_CLASS = flags.DEFINE_bool(
    "by_class",
    False,
    "Compare class by class too: FID, precision, recall, coverage, diversity, balance. The "
    "reference has to hold labels, as diffit make_reference writes them.",
)
DECODING = DecodingFlags()
CLUSTER = cli.define_cluster()

SAMPLING = SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …


def check() -> None:
    """Look whether the flags go together."""
    of_network = NETWORK.workdir.value, NETWORK.weights.value
    cli.require_one(samples=SAMPLES.value, workdir=of_network[0], weights=of_network[1])
    given = ["labels"] * bool(SCORES.labels.value) + ["vae"] * DECODING.given
    given += ["seeds"] * bool(SEEDS.value) + list(SAMPLING.value)
    if given and not any(of_network):
        cli.fail(
            f"--{given[0]} goes with --workdir or --weights: samples that are there are as they are"
        )
    NETWORK.check(required=False)
    DECODING.check()
    if not SCORES.reference.value:
        cli.fail(
            "--reference is missing: samples are measured against one; those of a small data set "
            "are scored without by diffit score"
        )
    INCEPTION.check()


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation import evaluate
    from diffit_jax.runtime import distributed
    from diffit_jax.runtime.console import parse_ranges
    from diffit_jax.sampling.request import SamplingOptions

    asked = SCORES.value(INCEPTION)
    asked["comparison"] = dataclasses.replace(asked["comparison"], by_class=BY_CLASS.value)
    scores = evaluate.evaluate(
        SAMPLES.value or NETWORK.source(),
        **asked,
        options=SamplingOptions(SCORES.labels.value, SAMPLING.value, DECODING.decoding()),
        count=COUNT.value,
        seeds=parse_ranges("--seeds", SEEDS.value) if SEEDS.value else None,
    )
    if distributed.is_primary():
        print(evaluate.table(scores))
