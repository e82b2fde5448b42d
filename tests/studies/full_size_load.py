"""Memory and time of loading full-size weights (561 M parameters): writes a file of random numbers,
loads it in a fresh process.

python tests/studies/full_size_load.py [directory with 2.3 GB of room]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.memory import MEASURE

from diffit_jax.interop import official, tensors
from diffit_jax.models.diffit.latent import LatentDiffiT, named_size


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        path, module, rng = (
            Path(folder) / "random.safetensors",
            LatentDiffiT(32, **named_size("XL/2")),
            np.random.default_rng(0),
        )
        arrays = tensors.nested(
            {
                leaf.path: rng.standard_normal(leaf.shape, np.float32)
                for leaf in official.leaves_of(module)
            }
        )
        started = time.monotonic()
        official.save(path, module, arrays, index_buffers=True)
        print(f"wrote {path.stat().st_size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s")
        del arrays
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        peak, total, largest = map(int, result.stdout.split())
        print(f"loaded in {time.monotonic() - started:.1f} s")
        print(
            f"peak anonymous memory {peak / 1e9:.3f} GB; parameters {total / 1e9:.3f} GB, largest "
            f"stacked array {largest / 1e9:.3f} GB"
        )
        bound = total + 2 * largest
        print(
            f"bound, parameters + two stacked arrays: {bound / 1e9:.3f} GB: "
            f"{'kept' if peak <= bound else 'BROKEN'}"
        )


if __name__ == "__main__":
    main()
