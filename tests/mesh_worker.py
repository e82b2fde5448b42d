"""Ten updates and some samples of small models on one mesh after the other; run by
test_parallel.py in a process of its own.

python tests/mesh_worker.py OUTPUT DEVICES
NAME=data,fsdp,tensor,accumulation,devices[,only|,save|,resume|,half] …

With one of these there is only the latent run. With "save" it leaves a checkpoint after half of the
updates, beside OUTPUT; with "resume" it goes on from there, without samples; with "half" it
ends after half of the updates (of many processes on few cores, a step takes a second).

CLUSTER=host:port,processes,number in the environment makes it one of several processes, each with
so many DEVICES. POD, JSON as from `pods.arrangement`, lays the devices of requests of its size out
as those of a pod.
"""

import json
import os
import sys
from pathlib import Path

from support.processes import QUICK_TO_COMPILE

os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} --xla_force_host_platform_device_count={sys.argv[2]}"

import jax
import numpy as np
from support.configs import (
    small_config,
    small_flow_config,
    small_latent_config,
    small_map_config,
    small_token_config,
)
from support.pods import arranged

from diffit_jax.data.sources import batches
from diffit_jax.experiment.config import build
from diffit_jax.run.objective import objective_of
from diffit_jax.run.state import (
    Setup,
    abstract_state,
    create_state,
    open_training_data,
    restore_state,
    save_state,
)
from diffit_jax.runtime import distributed, parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.runtime.parallel import MeshShape
from diffit_jax.sampling.sampler import Sampler
from diffit_jax.training.loop import Watch
from diffit_jax.training.step import compile_train_step

POD = json.loads(os.environ.get("POD", "null"))
STEPS = 10
SEEDS = np.array([3, 1, 4, 15, 9, 2, 6, 5])
CONFIGS = {
    "image": small_config(
        model__channels=(16, 16),
        model__num_blocks=(1, 1),
        model__head_width=8,
        model__dropout=0.1,
        model__augment_labels=9,
        augmentation={"probability": 0.3},
    ),
    "flow": small_flow_config(),
    "map": small_map_config(),
    "reg": small_token_config("reg"),  # an encoder in the step, a projector, a class token
    "latent": small_latent_config(model__hidden_size=32, model__num_heads=4),
}


def run(
    config, shape: MeshShape, accumulation: int, devices, save=None, resume=None, steps=STEPS
) -> dict[str, np.ndarray]:
    """Losses, flattened first and last parameters, and samples with the averaged ones; and the last
    two after half of the updates too."""
    config = config.copy_and_resolve_references()
    config.training.update(batch_size=16, accumulation=accumulation)
    config.sampling.sampler.num_steps = 3
    experiment = build(config)
    mesh = parallel.make_mesh(devices, shape)
    if POD and mesh.devices.shape == tuple(POD["sizes"]):
        mesh = arranged(POD, devices)
    parallel.verify_batch_sharding(mesh, 16)
    Watch(experiment, mesh).report(1)  # of a device of this process, wherever it lies
    state = (
        restore_state(Checkpoints(resume), abstract_state(experiment, mesh))
        if resume
        else create_state(experiment, mesh, objective_of(experiment))
    )
    frozen = objective_of(experiment).load(experiment, mesh)
    start = int(state.step)
    flat = lambda tree: np.concatenate(
        [np.ravel(distributed.gather(leaf)) for leaf in jax.tree.leaves(tree)]
    )
    first, losses = flat(state.params), []
    mine = parallel.local_batch_indices(mesh, 16)
    data = batches(open_training_data(experiment), 16, experiment.seed, start, mine)
    batch = parallel.put_batch(mesh, next(data), 16)
    step, empty, _ = compile_train_step(
        Setup(experiment, mesh, objective_of(experiment)), state, batch
    )
    results = {"first": first}
    sampler = None if resume else Sampler(experiment, mesh)

    def inspect(name: str = "") -> dict[str, np.ndarray]:
        samples = (
            {}
            if resume
            else {f"{name}samples": sampler.draw(state.ema_variables, SEEDS, SEEDS % 10)}
        )
        return {f"{name}last": flat(state.params)} | samples

    for number in range(start, steps):
        if (
            number == STEPS // 2 and steps == STEPS and mesh.size == 1
        ):  # what others that end here are compared with
            results |= inspect("half_")
        if save and number == STEPS // 2:
            checkpoints = Checkpoints(save, keep=1)
            save_state(checkpoints, state, 16)
            checkpoints.wait()
        state, collected = step(state, empty, batch, frozen)
        losses.append(float(collected.compute()["loss"]))
        batch = parallel.put_batch(mesh, next(data), 16)
    return results | {"losses": np.array(losses)} | inspect()


def main() -> None:
    if "CLUSTER" in os.environ:
        coordinator, count, number = os.environ["CLUSTER"].split(",")
        distributed.initialize(distributed.Cluster(coordinator, int(count), int(number), 120))
    results = {}
    for request in sys.argv[3:]:
        name, _, numbers = request.partition("=")
        *sizes, last = numbers.split(",")
        option = (
            {last: Path(sys.argv[1]).parent / "checkpoints"} if last in ("save", "resume") else {}
        )
        data, fsdp, tensor, accumulation, devices = map(
            int, [*sizes, last] if last.isdigit() else sizes
        )
        for kind, config in CONFIGS.items():
            if kind != "latent" and not last.isdigit():
                continue
            if kind in ("flow", "map", "reg") and name not in ("one", "mixed"):
                continue  # their networks are the latent one's
            chosen = {"steps": STEPS // 2} if last == "half" else option
            outcome = run(
                config,
                MeshShape(data, fsdp, tensor),
                accumulation,
                jax.devices()[:devices],
                **chosen,
            )
            results |= {f"{name}/{kind}/{key}": value for key, value in outcome.items()}
            print(name, kind, outcome["losses"][-1], flush=True)
    if distributed.is_primary():
        np.savez(sys.argv[1], **results)


if __name__ == "__main__":
    main()
