"""Draws samples from a run: python launch/sample.py --workdir runs/digits --seeds 0-63 [--labels 3,5] [--guidance_scale 1.5]"""

from absl import flags

from diffit_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://.")
SEEDS = flags.DEFINE_string("seeds", "0-99", "Seed numbers, one image each: 7, 0-63 or 0-9,20-29.")
LABELS = flags.DEFINE_string("labels", None, "Labels given out in turn: 3, 0-9 or 3,5; default: seed modulo the number of classes.")
OUTPUT = flags.DEFINE_string("output", None, "npz file to write; default: samples_NxHxWxC.npz in the work directory.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Overrides the config: 1 is no guidance, more follows the label more closely.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Overrides the config: steps of the sampler.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Overrides the config: images per call of the sampler, over all devices.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    from diffit_jax.sampling import sample

    overrides = {"guidance_scale": GUIDANCE_SCALE.value, "num_steps": NUM_STEPS.value, "batch_size": BATCH_SIZE.value}
    path = sample(
        WORKDIR.value,
        cli.parse_numbers("--seeds", SEEDS.value),
        None if LABELS.value is None else cli.parse_numbers("--labels", LABELS.value),
        OUTPUT.value,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run(main)
