"""Converts weights and work directories.

released file → work directory, to sample from or to train on (--num_classes 37: on other data):
    diffit convert --weights diffit_256.safetensors --to_workdir runs/imagenet256
the same as a flow, to fine-tune (at equal noise levels it is the network that it was):
    diffit convert --weights diffit_256.safetensors --config imagenet256_flow --to_workdir runs/flow
flow → a flow map, to train for one to four steps (where both its times are equal, the same flow):
    diffit convert --workdir runs/flow --config imagenet256_map --to_workdir runs/map
work directory → a file that the released code loads (averages of the newest checkpoint):
    diffit convert --workdir runs/imagenet256 --to_weights diffit.safetensors
work directory → one with the other parametrisation of TMSA, optimizer state and all:
    diffit convert --workdir runs/256 --to_workdir runs/slim --parametrisation slim
"""

from absl import flags

from diffit_jax import cli

WEIGHTS = cli.define_path(
    "weights",
    "Released weights to convert (safetensors: a file or hf://owner/name/path).",
    to_read=True,
)
WORKDIR = cli.define_path("workdir", "Work directory to convert.")
TO_WORKDIR = cli.define_path("to_workdir", "Work directory to write; it must not hold a run.")
TO_WEIGHTS = cli.define_path("to_weights", "File of weights to write.")
CONFIG = cli.define_config(
    "Of the new run; its model takes the sizes of the file or run. With --weights, default: "
    "configs/imagenet{256,512}_latent.py; with --workdir it makes a flow map of a flow."
)
INPUT_SIZE = flags.DEFINE_integer(
    "input_size",
    None,
    "With --weights: side of the latents of the new run, if not that of the file.",
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "With --weights: classes of the new run, for training on other data: its label table is a new "
    "one.",
    lower_bound=1,
)
PARAMETRISATION = flags.DEFINE_enum(
    "parametrisation", None, ["released", "slim"], "Of the new work directory; default: as it was."
)
ALLOW_NONFINITE = flags.DEFINE_bool(
    "allow_nonfinite", False, "Convert weights that have NaNs or infinities."
)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "With --to_weights: replace a file that is there."
)
INDEX_BUFFERS = flags.DEFINE_bool(
    "index_buffers", False, "With --to_weights: write the released code's index buffers too."
)


def check() -> None:
    """Look whether the flags go together."""
    cli.require_one(weights=WEIGHTS.value, workdir=WORKDIR.value)
    cli.require_one(to_workdir=TO_WORKDIR.value, to_weights=TO_WEIGHTS.value)
    if TO_WEIGHTS.value and WEIGHTS.value:
        cli.fail(
            "--weights to --to_weights would copy a file: name --to_workdir, or convert a --workdir"
        )
    if TO_WEIGHTS.value and PARAMETRISATION.value:
        cli.fail(
            "--parametrisation goes with --to_workdir: a file of weights is always in the released "
            "one"
        )
    if TO_WORKDIR.value and INDEX_BUFFERS.value:
        cli.fail("--index_buffers goes with --to_weights")
    changes = INPUT_SIZE.value is not None or NUM_CLASSES.value is not None
    if changes and not WEIGHTS.value:
        cli.fail("--input_size and --num_classes go with --weights: a work directory keeps its own")
    if CONFIG.named and WORKDIR.value and (TO_WEIGHTS.value or PARAMETRISATION.value):
        cli.fail(
            "--config with --workdir makes a flow map, in --to_workdir: leave out --to_weights and "
            "--parametrisation, or --config"
        )


def main() -> None:
    """Run the command."""
    from diffit_jax.runtime import hub
    from diffit_jax.sampling import convert
    from diffit_jax.sampling.request import config_for_weights

    slim = {None: None, "released": False, "slim": True}[PARAMETRISATION.value]
    if TO_WEIGHTS.value:
        convert.workdir_to_weights(
            WORKDIR.value,
            weights=TO_WEIGHTS.value,
            index_buffers=INDEX_BUFFERS.value,
            allow_nonfinite=ALLOW_NONFINITE.value,
            overwrite=OVERWRITE.value,
        )
    elif WEIGHTS.value:
        weights = str(hub.local(WEIGHTS.value, "--weights"))
        config = config_for_weights(CONFIG.value, weights, INPUT_SIZE.value)
        convert.weights_to_workdir(
            weights,
            workdir=TO_WORKDIR.value,
            config=config,
            input_size=INPUT_SIZE.value,
            slim=bool(slim),
            allow_nonfinite=ALLOW_NONFINITE.value,
            num_classes=NUM_CLASSES.value,
        )
    elif CONFIG.named:
        convert.flow_to_map(
            WORKDIR.value,
            target=TO_WORKDIR.value,
            config=CONFIG.value.to_dict(),
            allow_nonfinite=ALLOW_NONFINITE.value,
        )
    else:
        convert.workdir_to_workdir(
            WORKDIR.value, target=TO_WORKDIR.value, slim=slim, allow_nonfinite=ALLOW_NONFINITE.value
        )
    print(f"wrote {TO_WORKDIR.value or TO_WEIGHTS.value}")
