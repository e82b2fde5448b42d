"""Ten updates and samples of both networks on every mesh of eight devices, and in parts of a batch,
against those on one device: PYTHONPATH=tests python tests/studies/meshes.py

tests/runtime/test_parallel.py has bounds, for three of them. Found on a CPU with jax 0.10.2 (the
largest difference of losses, of parameters by the distance travelled, of samples by their largest):

    image   data             1.3e-07  2.6e-06  2.5e-06
    image   fsdp             1.3e-07  2.8e-06  1.2e-06
    image   data and fsdp    1.3e-07  2.7e-06  2.5e-06
    image   fsdp and tensor  1.2e-07  2.5e-06  1.2e-06
    image   mixed            1.2e-07  2.2e-06  1.2e-06
    image   parts            1.2e-07  2.5e-06  1.5e-05
    image   parts, divided   2.3e-07  2.5e-06  7.8e-06
    latent  data             1.2e-07  7.3e-07  5.4e-08
    latent  fsdp             1.2e-07  7.1e-07  5.4e-08
    latent  data and fsdp    1.2e-07  7.3e-07  5.4e-08
    latent  fsdp and tensor  2.2e-07  7.2e-07  5.4e-08
    latent  mixed            2.2e-07  7.0e-07  5.4e-08
    latent  parts            1.2e-07  7.3e-07  5.4e-08
    latent  parts, divided   1.8e-07  7.3e-07  5.4e-08
    latent  four processes            1.2e-06
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from support import warm
from support.pods import WORKER, pod_runs
from support.processes import environment

# data, fsdp, tensor, accumulation, devices
MESHES = {
    "one": "1,1,1,1,1",
    "data": "8,1,1,1,8",
    "fsdp": "1,8,1,1,8",
    "data and fsdp": "4,2,1,1,8",
    "fsdp and tensor": "1,4,2,1,8",
    "mixed": "2,2,2,1,8",
    "parts": "2,1,1,4,2",
    "parts, divided": "2,2,1,2,4",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "runs.npz"
        requests = [f"{name}={numbers}" for name, numbers in MESHES.items()]
        command = [warm.python(), str(WORKER), str(output), "8", *requests]
        subprocess.run(command, check=True, env=environment(8), stdout=subprocess.DEVNULL)
        with np.load(output) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        # Where every process has gaps in its rows; five updates, of the latent network.
        four = pod_runs("v5p:2x2x4", 4, output, "four=1,16,1,1,16,half")
    half, first = found["one/latent/half_last"], found["one/latent/first"]
    away = np.linalg.norm(four["four/latent/last"] - half) / np.linalg.norm(half - first)
    print(f"latent  four processes            {away:8.1e}")
    for kind in ("image", "latent"):
        one = {part: found[f"one/{kind}/{part}"] for part in ("losses", "first", "last", "samples")}
        travelled = np.linalg.norm(one["last"] - one["first"])
        for name in MESHES:
            run = {part: found[f"{name}/{kind}/{part}"] for part in one}
            assert np.array_equal(run["first"], one["first"])
            loss = np.max(np.abs(run["losses"] / one["losses"] - 1))
            last = np.linalg.norm(run["last"] - one["last"]) / travelled
            samples = np.abs(run["samples"] - one["samples"]).max() / np.abs(one["samples"]).max()
            print(f"{kind:7} {name:16} {loss:8.1e} {last:8.1e} {samples:8.1e}")


if __name__ == "__main__":
    main()
