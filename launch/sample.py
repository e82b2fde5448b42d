"""Draws samples from a run or from released weights:

    python launch/sample.py --workdir runs/digits --seeds 0-63 --labels 3,5 --guidance_scale 1.5
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

# These override the config's section `sampling`, where each is explained (diffit_jax/sections.py).
OVERRIDES = [
    flags.DEFINE_string("sampler", None, "ddpm, ddim, euler, heun or dpm_solver."),
    flags.DEFINE_integer("num_steps", None, "Steps of the sampler."),
    flags.DEFINE_string("respacing", None, "Steps of ddpm and ddim: 250, 10,10,5 or ddim50."),
    flags.DEFINE_float("eta", None, "Randomness of ddim."),
    flags.DEFINE_bool(
        "clip_denoised",
        None,
        "Clip the estimate of the clean sample to [-1, 1] (ddpm, ddim; not for latents).",
    ),
    flags.DEFINE_string(
        "guidance", None, "none, constant, power_cosine, interval or autoguidance."
    ),
    flags.DEFINE_float(
        "guidance_scale", None, "1 is no guidance, more follows the label more closely."
    ),
    flags.DEFINE_float("guidance_power", None, "Exponent of power_cosine."),
    flags.DEFINE_float("guidance_sigma_low", None, "Lower end of interval, in noise levels."),
    flags.DEFINE_float("guidance_sigma_high", None, "Upper end of interval."),
    flags.DEFINE_integer("guide_channels", None, "So many first channels are guided; 0: all."),
    flags.DEFINE_float(
        "skip_tolerance", None, "No second evaluation where the scale is within this of 1."
    ),
    flags.DEFINE_float("churn_amount", None, "Fresh noise of heun (S_churn); 0: none."),
    flags.DEFINE_float(
        "churn_sigma_low", None, "Lowest noise level at which heun adds noise (S_min)."
    ),
    flags.DEFINE_float("churn_sigma_high", None, "Highest (S_max)."),
    flags.DEFINE_float(
        "churn_noise", None, "Standard deviation of that noise (S_noise); 1 is nominal."
    ),
    cli.define_path("guide_workdir", "Directory of the weaker network's run, for autoguidance."),
    flags.DEFINE_string("pixel_rounding", None, "To uint8: edm or adm."),
    flags.DEFINE_integer(
        "batch_size", None, "Samples per call of the sampler, over all devices; -16: 16 on each."
    ),
]


def main() -> None:
    from diffit_jax.runtime.ranges import parse_numbers
    from diffit_jax.verbs.sample import Run, Weights, sample

    cli.require_one(workdir=WORKDIR.value, weights=WEIGHTS.value)
    if WORKDIR.value and CONFIG.value:
        cli.fail("--config goes with --weights: a work directory has a config of its own")
    if EMA_LENGTH.value is not None and not WORKDIR.value:
        cli.fail("--ema_length goes with --workdir: a file of weights holds one average")
    if CHECKPOINT.value is not None and not WORKDIR.value:
        cli.fail("--checkpoint goes with --workdir: a file of weights holds one state")
    source = (
        Run(WORKDIR.value, EMA_LENGTH.value, CHECKPOINT.value, ALLOW_NONFINITE.value)
        if WORKDIR.value
        else Weights(
            WEIGHTS.value,
            cli.config_for_weights(CONFIG.value, WEIGHTS.value),
            ALLOW_NONFINITE.value,
        )
    )
    overrides = {flag.name: flag.value for flag in OVERRIDES if flag.value is not None}
    path = sample(
        source,
        parse_numbers("--seeds", SEEDS.value),
        LABELS.value,
        OUTPUT.value,
        OVERWRITE.value,
        **overrides,
    )
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main, CLUSTER)
