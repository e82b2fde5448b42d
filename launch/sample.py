"""Draws samples from a run or from released weights:

    python launch/sample.py --workdir runs/digits --seeds 0-63 --labels 3,5 --guidance.scale 1.5
    python launch/sample.py --weights diffit_256.safetensors --labels "golden retriever,88"

Interrupted, the same command goes on where it was.
"""

from absl import flags

from diffit_jax import cli

WORKDIR = cli.define_path("workdir", "Directory of the run, local or gs://.")
WEIGHTS = cli.define_path(
    "weights", "Released weights (safetensors, on a local or mounted disk) instead of a run."
)
CONFIG = cli.define_config(
    "Config whose process and sampling the weights are used with; default: "
    "configs/imagenet{256,512}_latent.py."
)
SEEDS = flags.DEFINE_string("seeds", "0-99", "Seed numbers, one sample each: 7, 0-63 or 0-9,20-29.")
LABELS = flags.DEFINE_string(
    "labels",
    None,
    "Labels given out in turn: 3, 0-9, names of ImageNet classes, or random; default: seed modulo "
    "the number of classes.",
)
OUTPUT = cli.define_path(
    "output",
    "npz file to write; default: samples_NxHxWxC.npz in the work directory or beside the weights, "
    "with what differs from the default.",
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace files of another request.")
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint",
    None,
    "With --workdir: step of an older checkpoint; default: the newest.",
    lower_bound=0,
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Use weights that have NaNs or infinities."
)
EMA_LENGTH = flags.DEFINE_float(
    "ema_length",
    None,
    "With --workdir: average the parameters over this share of training, from the run's snapshots "
    "(ema.power_lengths).",
)
CLUSTER = cli.define_cluster()

SAMPLING = cli.SamplingFlags()  # --sampler, --sampler.num_steps, --guidance.scale …


def main() -> None:
    from diffit_jax.runtime.ranges import parse_numbers
    from diffit_jax.sampling.networks import Run, Weights, config_for_weights
    from diffit_jax.verbs.sample import sample

    cli.require_one(workdir=WORKDIR.value, weights=WEIGHTS.value)
    if WORKDIR.value and CONFIG.value:
        cli.fail("--config goes with --weights: a work directory has a config of its own")
    if EMA_LENGTH.value is not None and not WORKDIR.value:
        cli.fail("--ema_length goes with --workdir: a file of weights holds one average")
    if CHECKPOINT.value is not None and not WORKDIR.value:
        cli.fail("--checkpoint goes with --workdir: a file of weights holds one state")
    if WORKDIR.value:
        source = Run(WORKDIR.value, EMA_LENGTH.value, CHECKPOINT.value, ALLOW_NONFINITE.value)
    else:
        config = config_for_weights(CONFIG.value, WEIGHTS.value)
        source = Weights(WEIGHTS.value, config, ALLOW_NONFINITE.value)
    seeds = parse_numbers("--seeds", SEEDS.value)
    path = sample(source, seeds, LABELS.value, OUTPUT.value, OVERWRITE.value, SAMPLING.value)
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main, CLUSTER)
