"""How compile time grows with depth: the full-width (XL/2) training step at 4 and 28 blocks,
`scan_unroll=1`, nothing allocated.

  python tests/studies/compile_by_depth.py [batch size]

Each depth is compiled three times in turn, in one process, without any cache; the medians are
compared.
"""

import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from diffit_jax.experiment.config import build
from diffit_jax.run.state import abstract_state
from diffit_jax.runtime import parallel
from diffit_jax.training.step import make_train_step, step_metrics

ROOT = Path(__file__).parents[2]


def compile_seconds(depth: int, batch_size: int) -> float:
    sys.path.insert(0, str(ROOT / "configs"))
    import imagenet256_latent

    config = imagenet256_latent.get_config()
    config.model.depth, config.training.batch_size = depth, batch_size
    experiment = build(config)
    mesh = parallel.make_mesh()
    state = abstract_state(experiment, mesh)
    collected = parallel.abstract(mesh, jax.eval_shape(step_metrics(experiment).empty))
    shapes = {
        "latent": ((batch_size, *experiment.model.sample_shape), jnp.float32),
        "label": ((batch_size,), jnp.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    started = time.monotonic()
    jax.jit(make_train_step(experiment)).lower(state, collected, batch, {}).compile()
    return time.monotonic() - started


def main() -> None:
    batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    seconds: dict[int, list[float]] = {4: [], 28: []}
    for _ in range(3):
        for depth, times in seconds.items():
            times.append(compile_seconds(depth, batch_size))
            print(f"depth {depth}: {times[-1]:.2f} s", flush=True)
    medians = {depth: statistics.median(times) for depth, times in seconds.items()}
    print(
        f"medians: {medians[4]:.2f} s at 4 blocks, {medians[28]:.2f} s at 28; ratio "
        f"{medians[28] / medians[4]:.3f}"
    )


if __name__ == "__main__":
    main()
