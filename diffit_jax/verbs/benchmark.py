"""How fast a config trains on the devices at hand."""

import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from diffit_jax import models
from diffit_jax.models.model import training_flops
from diffit_jax.runtime import backend, distributed, parallel
from diffit_jax.runtime.console import Progress
from diffit_jax.tpu.chips import peak_flops
from diffit_jax.training.loop import batches_on
from diffit_jax.training.state import create_state, open_experiment, open_training_data
from diffit_jax.training.step import compile_train_step


@backend.pinned()
@backend.memory_for(backend.TRAINING_MEMORY)
def measure(
    config: ConfigDict, steps: int, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Compiles the training step of a config and times updates on its own data, the loader
    included.

    Args:
      config: as for training; nothing is written.
      steps: updates to time, after three that are not.
      devices: to use; None: all of all processes, which take part together.

    Returns:
      `device`, `devices`, `jax`: what ran; `compile_s`: seconds to trace and compile the step;
        `step_ms_median`, `step_ms_min`:
      milliseconds from one update to the next; `steps_per_s`, `images_per_s`: from the median;
      `data_wait_share`: share of the time spent waiting for a batch; `mfu`: share of the devices'
      bfloat16 peak, where it is known; `matmul_precision`: of float32 products;
      `attention`: how it is computed;
      `peak_memory_gb`: of the process on a CPU, else of this process's first device.
    """
    opened = open_experiment(config, devices)
    experiment, mesh, size = opened.experiment, opened.mesh, opened.experiment.training.batch_size
    source = distributed.first_then_all(lambda: open_training_data(experiment))
    distributed.check_agreement(
        {"config": config.to_json, "code version": distributed.code_version}
    )
    parallel.prove_rows(mesh, size)
    waits: list[float] = []
    waiting = functools.partial(_timed, waits)
    stream = batches_on(mesh, source, size, experiment.seed, waiting=waiting)
    state, batch = create_state(experiment, mesh), next(stream)
    train_step, collected, compile_s = compile_train_step(opened, state, batch)

    times: list[float] = []
    shown = distributed.is_first()
    with Progress("benchmark", steps + 3, shown=shown) as progress, distributed.lost_processes():
        for _ in range(steps + 3):
            with _timed(times):
                state, collected = train_step(state, collected, batch, opened.objective.frozen)
                batch = next(stream)
                jax.block_until_ready(state)
            progress.advance()
    median = statistics.median(times[3:])
    device = parallel.local_device(mesh)
    peak, flops = peak_flops(device), training_flops(experiment.model) * size / median / mesh.size
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "compile_s": compile_s,
        "step_ms_median": median * 1e3,
        "step_ms_min": min(times[3:]) * 1e3,
        "steps_per_s": 1 / median,
        "images_per_s": size / median,
        "data_wait_share": sum(waits[4:]) / sum(times[3:]),
        **({"mfu": flops / peak} if peak else {}),
        "matmul_precision": backend.matmul_precision(),
        "attention": models.attention_in_words(experiment.model, device.platform),
        "peak_memory_gb": _peak_memory(device) / 1e9,
    }


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Notes how long the block took."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def _peak_memory(device: jax.Device) -> int:
    """Bytes: of the device where it counts them, else the largest resident size of this process."""
    counted = device.memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return counted["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
