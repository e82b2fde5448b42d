"""Estimates memory and time of a config on a TPU pod, without having one.

diffit preflight --config configs/digits.py --topology v5e:4x4
"""

import dataclasses
import json
import os

# The TPU compiler works together with jax's CPU backend, and looks for no TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# Else it complains, in lines of its own, that it does not know which machine this is.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

from absl import flags

from diffit_jax import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chip and grid of a slice, such as v5e:16x16 or v5p:4x4x8."
)
NUM_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "Slices, connected by the data-centre network.", lower_bound=1
)
BATCH = flags.DEFINE_integer(
    "batch_per_chip", None, "Instead of the config's batch size: images per chip.", lower_bound=1
)
PROGRAMS = flags.DEFINE_list(
    "programs",
    None,
    "Which programs to compile: train, sample, analyse; encode, decode (of the published "
    "autoencoder), inception (the FID network), dinov2 (ViT-L/14); encoder (of section "
    "representation); default: train and sample, and those of the config's section evaluation.",
)
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Settings to compare, such as batch,remat or batch=4,8,16,num_heads=16,9,mesh=fsdp=4,fsdp=16.",
)
EXPLAIN = flags.DEFINE_bool("explain", False, "Add a paragraph of advice.")
CALIBRATE = flags.DEFINE_bool(
    "calibrate", False, "Instead: estimates of large matrix products against the peak."
)
JSON = cli.define_path("json", "File to write the figures to.")
flags.mark_flag_as_required("topology")


def main() -> None:
    """Run the command."""
    from diffit_jax.preflight import preflight, report
    from diffit_jax.runtime import files

    config, topology, num_slices = CONFIG.value, TOPOLOGY.value, NUM_SLICES.value
    if config is not None and BATCH.value is not None:
        config = preflight.with_batch(config, topology, num_slices, BATCH.value)
    fits = True
    if CALIBRATE.value:
        answer = preflight.calibrate(topology)
        print(report.render_products(answer))
    elif config is None:
        cli.fail("--config is missing: name a file with get_config()")
    elif SWEEP.value:
        answer = preflight.sweep(config, topology, num_slices, preflight.parse_sweep(SWEEP.value))
        fits = answer.best is not None
    else:
        answer = preflight.preflight(
            config, topology=topology, num_slices=num_slices, programs=PROGRAMS.value
        )
        fits = answer.fits
        print(report.render(answer))
        if EXPLAIN.value:
            print("\n" + report.explain(answer))
    if JSON.value:
        text = json.dumps(dataclasses.asdict(answer), indent=2) + "\n"
        files.replace_with_notice(JSON.value, text.encode())
    if not fits:
        cli.fail("it does not fit (see above)")
