"""Measures samples. Those of a small data set, without a pretrained network:

    python launch/evaluate.py --samples runs/digits/samples_1000x8x8x1.npz --dataset digits

By ADM's suite, from an npz file, a folder of pictures or a network:

    python launch/evaluate.py --samples samples_50000x256x256x3.npz \\
        --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth

`--workdir` or `--weights` in place of `--samples` draws what is measured; `--sweep
guidance.scale=1,1.5,2` looks for the best settings first; `--make_reference` makes a reference of a
data set.

Interrupted, the same command goes on where it was.
"""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.sampling import DecodingFlags, NetworkFlags, SamplingFlags

SAMPLES = cli.define_path(
    "samples",
    "npz file with arr_0 (images), as launch/sample.py writes it, or folder of pictures.",
    to_read=True,
)
NETWORK = NetworkFlags()  # or a network, whose samples are drawn and measured
DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "Data set that the samples imitate, for scores without a network (default: digits); with "
    "--make_reference the one to measure.",
)
DATA_DIR = cli.define_path(
    "data_dir", "Where prepared data sets live; default: ~/tensorflow_datasets.", to_read=True
)
REFERENCE = cli.define_path(
    "reference", "npz file of statistics: ADM's, EDM's or our own.", to_read=True
)
INCEPTION = cli.define_path(
    "inception",
    "Weights of the FID network: pytorch-fid's or torch-fidelity's .pth, or safetensors; "
    "random: to try the way to figures that then have no meaning.",
    to_read=True,
    words=("random",),
)
METRICS = flags.DEFINE_list(
    "metrics",
    None,
    "Of fid, sfid, inception_score, precision, recall and kid; default: all but kid that the "
    "reference serves.",
)
RESIZE = flags.DEFINE_enum(
    "resize",
    "tf1",
    ["tf1", "pytorch_fid"],
    "How pictures come to 299 pixels: as ADM's suite has it.",
)
COUNT = flags.DEFINE_integer(
    "count",
    None,
    "How many of the first samples; default: all, or 50,000 of a network; 0: --sweep alone.",
)
SEEDS = flags.DEFINE_string(
    "seeds",
    None,
    "Seed numbers of a network's samples: 0-49999, or several ranges (0-49999,50000-99999), each "
    "of which is measured by itself; the lowest FID counts.",
)
LABELS = flags.DEFINE_string(
    "labels", None, "Of a network's samples, see launch/sample.py: random is ADM's rule."
)
MAKE_REFERENCE = cli.define_path(
    "make_reference", "Instead: npz file for the statistics of all --samples, or of --dataset."
)
SELF_TEST = cli.define_path(
    "self_test",
    "Instead: folder with ADM's published samples and reference, to compare figures.",
    to_read=True,
)
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "First find the best of some settings of a network's samples: guidance.scale=1,1.5,2, also of "
    "several keys (…,ema_length=0.05,0.1), with few samples of each; then --count of the best.",
)
SWEEP_COUNT = flags.DEFINE_integer("sweep_count", 5_000, "Samples of each point of --sweep.")
OUTPUT = cli.define_path(
    "output", "JSON file to write; default: NAME_OF_THE_SAMPLES.metrics.json beside them."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the scores of other samples.")
INCEPTION_BATCH = flags.DEFINE_integer(
    "inception_batch", 32, "Pictures in the FID network at once, on each device.", lower_bound=1
)
DECODING = DecodingFlags()
CLUSTER = cli.define_cluster()

SAMPLING = SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …


def main() -> None:
    cli.require_one(
        samples=SAMPLES.value,
        workdir=NETWORK.workdir.value,
        weights=NETWORK.weights.value,
        self_test=SELF_TEST.value,
        **({"dataset": DATASET.value} if MAKE_REFERENCE.value else {}),
    )
    of_networks = ["labels"] * bool(LABELS.value) + ["vae"] * bool(DECODING.decoding())
    of_networks += ["seeds"] * bool(SEEDS.value) + ["sweep"] * bool(SWEEP.value)
    of_networks += list(SAMPLING.value)
    if of_networks and not (NETWORK.workdir.value or NETWORK.weights.value):
        cli.fail(
            f"--{of_networks[0]} goes with --workdir or --weights: samples that are there are "
            "as they are"
        )
    if COUNT.value == 0 and not SWEEP.value:
        cli.fail("--count 0 goes with --sweep: measure at least two samples")
    if SELF_TEST.value:
        _self_test()
    elif MAKE_REFERENCE.value:
        _make_reference()
    elif REFERENCE.value:
        (_sweep if SWEEP.value else _evaluate)()
    elif not SAMPLES.value:
        cli.fail("--reference is missing: the samples of a network are measured against one")
    else:
        _score()


def _score() -> None:
    """The scores of a small data set."""
    from diffit_jax.evaluation.small import score_table
    from diffit_jax.runtime import distributed
    from diffit_jax.verbs.score import score

    def scores() -> dict:
        dataset, data_dir = DATASET.value or "digits", DATA_DIR.value or ""
        return score(SAMPLES.value, dataset, data_dir, OUTPUT.value, OVERWRITE.value)

    # They are a matter of seconds for one process; of several the others wait.
    found = distributed.first_then_all(scores, lambda: None)
    if found:
        print(score_table(found))


def _evaluate() -> None:
    """ADM's suite."""
    from diffit_jax.runtime import distributed
    from diffit_jax.runtime.ranges import parse_ranges
    from diffit_jax.verbs import evaluate

    if DATASET.value:
        cli.fail("--dataset goes without --reference, or with --make_reference: leave out one")
    scores = evaluate.evaluate(
        SAMPLES.value or NETWORK.source(),
        REFERENCE.value,
        _inception(),
        METRICS.value,
        RESIZE.value,
        COUNT.value,
        OUTPUT.value,
        OVERWRITE.value,
        LABELS.value,
        SAMPLING.value,
        DECODING.decoding(),
        INCEPTION_BATCH.value,
        parse_ranges("--seeds", SEEDS.value) if SEEDS.value else None,
    )
    if distributed.is_first():
        print(evaluate.table(scores))


def _sweep() -> None:
    """The best of some settings, and their scores with all samples."""
    from diffit_jax.runtime import distributed
    from diffit_jax.verbs import evaluate, sweep

    if SEEDS.value:
        cli.fail("--seeds and --sweep do not go together: a sweep takes the seeds from 0 on")
    keys = sweep.parse(SWEEP.value)
    swept = sweep.sweep(
        NETWORK.source,
        keys,
        REFERENCE.value,
        _inception(),
        OUTPUT.value,
        METRICS.value,
        SWEEP_COUNT.value,
        OVERWRITE.value,
        LABELS.value,
        SAMPLING.value,
        DECODING.decoding(),
        INCEPTION_BATCH.value,
        RESIZE.value,
    )
    best = swept.best["settings"]
    if distributed.is_first():
        print(sweep.table(swept))
        print(f"the best: {_command(best)}", flush=True)
    if COUNT.value == 0:
        return
    of_source, of_sampling = sweep.divided(best)
    scores = evaluate.evaluate(
        NETWORK.source(**of_source),
        REFERENCE.value,
        _inception(),
        METRICS.value,
        RESIZE.value,
        COUNT.value,
        labels=LABELS.value,
        overrides={**SAMPLING.value, **of_sampling},
        decoding=DECODING.decoding(),
        batch_per_device=INCEPTION_BATCH.value,
        overwrite=OVERWRITE.value,
    )
    if distributed.is_first():
        print(evaluate.table(scores))


def _command(best: Mapping[str, Any]) -> str:
    """This command with the best settings in place of the sweep."""
    dropped, words, arguments = ("sweep", "sweep_count", "output", "count"), [], iter(sys.argv[1:])
    for argument in arguments:
        name, separator, _ = argument.lstrip("-").partition("=")
        if name not in dropped:
            words.append(argument)
        elif not separator:
            next(arguments, None)
    words += [f"--{key}={value}" for key, value in best.items()]
    words += [f"--count={COUNT.value}"] if COUNT.value else []
    return shlex.join(["python", "launch/evaluate.py", *words])


def _make_reference() -> None:
    from diffit_jax.data.sources import open_dataset
    from diffit_jax.evaluation.pictures import DatasetPictures, open_pictures
    from diffit_jax.runtime import distributed, hub
    from diffit_jax.verbs.make_reference import make_reference

    if SAMPLES.value:
        pictures = open_pictures(hub.local(SAMPLES.value, "samples"))
    elif DATASET.value:
        source = open_dataset(DATASET.value, "train", DATA_DIR.value or "")
        pictures = DatasetPictures(source, f"data set {DATASET.value}, train")
    else:
        cli.fail("--make_reference measures --samples or --dataset")
    batch = INCEPTION_BATCH.value
    path = make_reference(
        pictures,
        MAKE_REFERENCE.value,
        _inception(),
        RESIZE.value,
        OVERWRITE.value,
        batch_per_device=batch,
    )
    if distributed.is_first():
        print(f"wrote {path}")


def _self_test() -> None:
    from diffit_jax.runtime import distributed
    from diffit_jax.verbs import self_test

    rows = self_test.self_test(
        SELF_TEST.value, _inception(), batch_per_device=INCEPTION_BATCH.value
    )
    if distributed.is_first():
        print(self_test.table(rows))
    if not all(row["passed"] for row in rows):
        cli.fail("the figures are not the published ones (see above)")


def _inception() -> str:
    if not INCEPTION.value:
        cli.fail(
            "--inception is missing: name the weights of the FID network, such as pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    return INCEPTION.value


if __name__ == "__main__":
    cli.run(main, CLUSTER)
