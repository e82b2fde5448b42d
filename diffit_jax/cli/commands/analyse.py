r"""Shows what attention does at each noise level, and when each frequency settles.

    diffit analyse --workdir runs/digits
    diffit analyse --weights diffit_256.safetensors --images 4 --output analysis_256

Writes a folder: report.md, analysis.npz and pictures.
"""

from absl import flags

from diffit_jax import cli
from diffit_jax.cli.shared import NetworkFlags

NETWORK = NetworkFlags()
OUTPUT = cli.define_path(
    "output", "Folder to write; default: analysis in the work directory or beside the weights."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an analysis that is there.")
IMAGES = flags.DEFINE_integer("images", 8, "Samples that are followed.")
STEPS = flags.DEFINE_integer("steps", 18, "Noise levels on the way.")
QUERY = flags.DEFINE_list(
    "query", ["0.5", "0.5"], "Row and column of the query that is drawn, in shares of the side."
)
FROZEN = flags.DEFINE_float(
    "frozen", 0.5, "Where on the way time stands still in the comparisons: 0 noise, 1 data."
)
CLUSTER = cli.define_cluster()


def check() -> None:
    """Look whether the flags go together."""
    NETWORK.check()


def main() -> None:
    """Run the command."""
    from diffit_jax.sampling.analysis.analyse import analyse

    try:
        row, column = map(float, QUERY.value)
    except ValueError:
        cli.fail(f"--query {','.join(QUERY.value)} must be two numbers: --query=0.5,0.5")
    folder = analyse(
        NETWORK.source(),
        output=OUTPUT.value,
        images=IMAGES.value,
        steps=STEPS.value,
        query=(row, column),
        frozen=FROZEN.value,
        overwrite=OVERWRITE.value,
    )
    print(f"wrote {folder}")
