"""Pods played on this machine: meshes whose devices lie, and belong to processes, as those of a TPU
topology."""

import json
import os
import subprocess

import numpy as np
from jax.sharding import Mesh
from support.processes import ROOT, environment, free_port

from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
WORKER = ROOT / "tests" / "mesh_worker.py"


def pod_mesh(topology, shape=MeshShape(-1, -1), num_slices=1):
    """The mesh of a topology's own devices, which only have numbers and processes."""
    from diffit_jax.preflight.compiler import topology_devices

    shape = MeshShape(shape.data, shape.fsdp, shape.tensor, num_slices)
    return parallel.make_mesh(topology_devices(topology, num_slices), shape)


def arrangement(topology, shape=MeshShape(-1, -1), num_slices=1):
    """JSON: the sizes of the pod's mesh, and for each place on it (process, number among the
    devices of that process)."""
    mesh = pod_mesh(topology, shape, num_slices)
    devices = list(mesh.devices.flat)
    of_process = {}
    for device in sorted(devices, key=lambda device: device.id):
        of_process.setdefault(device.process_index, []).append(device.id)
    places = [
        (device.process_index, of_process[device.process_index].index(device.id))
        for device in devices
    ]
    return {"sizes": list(mesh.devices.shape), "places": places}


def arranged(layout, devices):
    """A mesh of other devices in an `arrangement`; if they are all of one process, runs of them
    stand for those of a process."""
    per_process = 1 + max(number for _, number in layout["places"])
    groups = {}
    for position, device in enumerate(
        sorted(devices, key=lambda device: (device.process_index, device.id))
    ):
        groups.setdefault(position // per_process, []).append(device)
    placed = np.array(
        [groups[process][number] for process, number in layout["places"]], dtype=object
    )
    return Mesh(placed.reshape(layout["sizes"]), parallel.AXES)


def pod_runs(topology, processes, output, *requests):
    """What mesh_worker.py's first process writes, of several whose devices lie as those of a
    topology do."""
    from support import warm

    port = free_port()
    pod = arrangement(topology)
    command = [
        warm.python(),
        str(WORKER),
        str(output),
        str(len(pod["places"]) // processes),
        *requests,
    ]
    clusters = [f"127.0.0.1:{port},{processes},{number}" for number in range(processes)]
    environments = [environment(CLUSTER=cluster, POD=json.dumps(pod)) for cluster in clusters]
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=each)
        for each in environments
    ]
    for process in running:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
    with np.load(output) as arrays:
        return {name: arrays[name] for name in arrays.files}
