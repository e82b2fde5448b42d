r"""Finds the best settings of a network's samples, by ADM's suite, and measures those.

    diffit sweep --workdir runs/imagenet256 --sweep guidance.scale=1,1.5,2 \
        --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth

Interrupted, the same command resumes; with more values it only adds those.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import (
    DecodingFlags,
    InceptionFlags,
    NetworkFlags,
    SamplingFlags,
    ScoreFlags,
)

NETWORK = NetworkFlags()
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "What is varied: guidance.scale=1,1.5,2, also several keys (…,ema_length=0.05,0.1).",
)
SWEEP_COUNT = flags.DEFINE_integer("sweep_count", 5_000, "Samples of each point.")
COUNT = flags.DEFINE_integer(
    "count", None, "Samples of the best point at the end; default: 50,000; 0: none."
)
SCORES = ScoreFlags("sweep.json in the directory of the network", "another sweep")
INCEPTION = InceptionFlags()
DECODING = DecodingFlags()
CLUSTER = cli.define_cluster()

SAMPLING = SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …
flags.mark_flag_as_required("sweep")


def check() -> None:
    """Look whether the flags go together."""
    NETWORK.check()
    DECODING.check()
    if not SCORES.reference.value:
        cli.fail("--reference is missing: the samples of a network are measured against one")


def main() -> None:
    """Run the command."""
    from diffit_jax.evaluation import evaluate, sweep
    from diffit_jax.runtime import distributed
    from diffit_jax.sampling.request import SamplingOptions

    asked = SCORES.value(INCEPTION)
    options = SamplingOptions(SCORES.labels.value, SAMPLING.value, DECODING.decoding())
    # The sweep, then its best settings with the samples of a real measurement.
    swept = sweep.sweep(
        NETWORK.source,
        keys=sweep.parse(SWEEP.value),
        **asked,
        options=options,
        count=SWEEP_COUNT.value,
    )
    best = swept.best["settings"]
    if distributed.is_primary():
        print(sweep.table(swept))
        print(f"the best: {_command(best)}", flush=True)
    if COUNT.value == 0:
        return
    of_source, of_sampling = sweep.divided(best)
    scores = evaluate.evaluate(
        NETWORK.source(**of_source),
        **asked | {"output": None},
        options=dataclasses.replace(options, overrides={**SAMPLING.value, **of_sampling}),
        count=COUNT.value,
    )
    if distributed.is_primary():
        print(evaluate.table(scores))


def _command(best: Mapping[str, Any]) -> str:
    """Return the command that measures the best settings."""
    dropped, words, arguments = ("sweep", "sweep_count", "output", "count"), [], iter(sys.argv[1:])
    for argument in arguments:
        name, separator, _ = argument.lstrip("-").partition("=")
        if name not in dropped:
            words.append(argument)
        elif not separator:
            next(arguments, None)
    words += [f"--{key}={value}" for key, value in best.items()]
    words += [f"--count={COUNT.value}"] if COUNT.value else []
    return shlex.join(["diffit", "evaluate", *words])
