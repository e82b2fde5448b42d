"""The mesh: the same numbers on every one, nothing held whole by a device, and clear errors."""

import math
import shutil
import subprocess

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from support import warm
from support.configs import config_of, small_config, small_latent_config
from support.pods import WORKER, pod_runs
from support.processes import environment

from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models.placement import ParamMetadata
from diffit_jax.run.state import TrainState, abstract_state
from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape
from diffit_jax.training.train import train

# data, fsdp, tensor, accumulation, devices; see mesh_worker.py
MESHES = {
    "one": "1,1,1,1,1",
    "data": "8,1,1,1,8,only",
    "fsdp": "1,8,1,1,8,save",
    "mixed": "2,2,2,1,8",
}  # tests/studies/meshes.py has more
RESUMED = {"on four": "1,4,1,1,4,resume", "on one": "1,1,1,1,1,resume"}


def assert_same_run(ours, reference, kind):
    """Losses within 1e-5, parameters within 1e-3 of the distance travelled, samples within 1e-4 of
    their largest value.

    Measured 2e-7, 2e-6 and 2e-5: only the order of sums differs. The random numbers are the same,
    so fresh parameters are bit for bit.
    """
    ours, reference = (
        {key: run[f"{kind}/{key}"] for key in ("losses", "first", "last", "samples")}
        for run in (ours, reference)
    )
    np.testing.assert_array_equal(ours["first"], reference["first"])
    np.testing.assert_allclose(ours["losses"], reference["losses"], rtol=1e-5)
    travelled = np.linalg.norm(reference["last"] - reference["first"])
    assert np.linalg.norm(ours["last"] - reference["last"]) < 1e-3 * travelled
    np.testing.assert_allclose(
        ours["samples"],
        reference["samples"],
        rtol=0,
        atol=1e-4 * np.abs(reference["samples"]).max(),
    )


def half_of(run):
    """What a run had come to after half of its updates."""
    halves = {
        key.replace("half_", ""): value
        for key, value in run.items()
        if "half_" in key or key.endswith("first")
    }
    return halves | {
        key: value[: len(value) // 2] for key, value in run.items() if key.endswith("losses")
    }


def part(results, name):
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in results.items()
        if key.startswith(f"{name}/")
    }


@pytest.fixture(scope="session")
def mesh_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="session")
def mesh_runs(mesh_folder):
    """The results of mesh_worker.py on eight virtual devices."""
    output = mesh_folder / "runs.npz"
    requests = [f"{name}={numbers}" for name, numbers in (MESHES | RESUMED).items()]
    command = [warm.python(), str(WORKER), str(output), "8", *requests]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env=environment(8)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(output) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "latent") for name in MESHES if name != "one"),
        ("mixed", "image"),
        ("mixed", "flow"),
        ("mixed", "map"),
        ("mixed", "reg"),
    ],
)
def test_ten_updates_and_samples_are_the_same_on_every_mesh(mesh_runs, name, kind):
    assert_same_run(part(mesh_runs, name), part(mesh_runs, "one"), kind)


def assert_goes_on(ours, saved):
    """The second half of a run that was saved on eight devices, on another mesh: losses within 1e-5
    (measured 2e-7)."""
    losses = saved["latent/losses"]
    assert len(ours["latent/losses"]) == len(losses) // 2
    np.testing.assert_allclose(ours["latent/losses"], losses[len(losses) // 2 :], rtol=1e-5)
    travelled = np.linalg.norm(saved["latent/last"] - saved["latent/first"])
    assert np.linalg.norm(ours["latent/last"] - saved["latent/last"]) < 1e-3 * travelled


@pytest.mark.parametrize("name", RESUMED)
def test_saved_on_eight_devices_and_resumed_on_fewer(mesh_runs, name):
    assert_goes_on(part(mesh_runs, name), part(mesh_runs, "fsdp"))


def test_two_processes_are_one_mesh(mesh_runs, mesh_folder, tmp_path):
    """Five updates and samples of 2 processes x 4 devices, whose rows have gaps, are those of one
    device; and they go on from what eight devices saved."""
    shutil.copytree(mesh_folder / "checkpoints", tmp_path / "checkpoints")
    results = pod_runs(
        "v5p:2x2x2", 2, tmp_path / "runs.npz", "pair=1,8,1,1,8,half", "resumed=1,8,1,1,8,resume"
    )
    assert len(results["pair/latent/losses"]) == 5
    assert_same_run(part(results, "pair"), half_of(part(mesh_runs, "one")), "latent")
    assert_goes_on(part(results, "resumed"), part(mesh_runs, "fsdp"))


def bytes_per_device(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), parallel.AXES)


@pytest.mark.parametrize("config", ["imagenet256_latent", "imagenet512_latent"])
def test_full_size_state_is_divided_by_fsdp(config):
    """Parameters, optimizer state and average of XL/2 over eight devices: at most 1.1 / 8 of the
    whole on each. Nothing is allocated."""
    experiment = build(config_of(config))
    state = abstract_state(experiment, abstract_mesh(1, 8, 1))
    held = (state.params, state.opt_state, state.ema)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    assert total == pytest.approx(4 * 4 * 561e6, rel=0.01)
    assert bytes_per_device(held) <= 1.1 * total / 8


def test_rules_reach_every_place_where_parameters_are():
    """A kernel, its moments and its average lie alike; heads and hidden channels are divided by
    `tensor`."""
    state = abstract_state(build(small_latent_config()), abstract_mesh(1, 2, 2))
    attention = lambda tree: tree["blocks"]["attention"]["qkv_kernel"].sharding.spec
    assert (
        attention(state.params)
        == attention(state.ema)
        == PartitionSpec(None, "fsdp", None, "tensor", None)
    )
    # Moments of this kernel and, in a model as wide as its time token, of the time projection.
    moments = [
        leaf
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.shape == state.params["blocks"]["attention"]["qkv_kernel"].shape
    ]
    assert len(moments) == 4 and all(
        leaf.sharding.spec == attention(state.params) for leaf in moments
    )
    assert state.params["blocks"]["mlp_out"]["kernel"].sharding.spec == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert state.params["final"]["bias"].sharding.spec == PartitionSpec(None)


def test_local_rows_and_batch_sizes():
    mesh = parallel.make_mesh()
    assert (
        parallel.local_batch_indices(mesh, 6).tolist() == [0, 1, 2, 3, 4, 5]
        and parallel.next_batch_size(mesh, 5) == 6
    )
    with pytest.raises(
        UserError,
        match=r"training\.batch_size 12 does not divide over 2 devices in 4 parts "
        r".training.accumulation.",
    ):
        parallel.check_batch_size(mesh, 12, "training.batch_size", parts=4)


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        (dict(), 8, (8, 1, 1)),
        (dict(fsdp=4), 8, (2, 4, 1)),
        (dict(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2)),
        (dict(data=1, tensor=-1), 4, (1, 1, 4)),
        (dict(data=-1, fsdp=-1), 1, (1, 1, 1)),
        (dict(data=-1, fsdp=-1), 8, (1, 8, 1)),
        (dict(data=-1, fsdp=-1), 12, (1, 12, 1)),
        (dict(data=-1, fsdp=-1, tensor=2), 512, (16, 16, 2)),
    ],
)
def test_minus_one_fills(shape, devices, expected):
    assert MeshShape(**shape).sizes(devices) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"data": 3}}, "data 3 × fsdp 1 × tensor 1, which does not make 2 devices"),
        ({"mesh": {"fsdp": 3}}, "which does not make 2 devices"),
        ({"mesh": {"data": -1, "tensor": -1}}, "one may be -1, or data and fsdp"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp is 0: it must be at least 1, or -1"),
        ({"mesh": {"expert": 2}}, "config key mesh.expert is unknown"),
        ({"mesh": {"num_slices": 2}}, "mesh.num_slices is 2, but the devices form 1"),
        ({"mesh": {"num_slices": 4}}, "mesh.data is 2, which 4 slices do not divide"),
        (
            {"mesh": {"tensor": 2}, "model__head_width": 8},
            "mesh.tensor is 2, which does not divide the 1 heads",
        ),
        ({"training__accumulation": 3}, "batch_size 8 does not divide over 2 devices in 3 parts"),
    ],
)
def test_impossible_meshes_write_nothing(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(small_config(**change), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_axis_that_divides_nothing_is_refused():
    """Fifteen-wide parameters cannot be cut in two."""
    params = {
        "norm": {"scale": jax.ShapeDtypeStruct((15,), np.float32)},
        "out": {"kernel": jax.ShapeDtypeStruct((3, 15), np.float32)},
    }
    metadata = {"out/kernel": ParamMetadata((None, "fsdp"), True)}
    for axis, mesh in (("fsdp", abstract_mesh(1, 2, 1)), ("tensor", abstract_mesh(1, 1, 2))):
        with pytest.raises(
            UserError, match=f"mesh.{axis} is 2, but no rule divides a parameter over it"
        ):
            parallel.check_axes(mesh, params, metadata)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Three updates with parameters divided over two devices, three more with copies on both: as if
    it had been one mesh."""
    whole = train(small_latent_config(), workdir=tmp_path / "whole")
    train(
        small_latent_config(
            mesh={"data": 1, "fsdp": 2}, training__total_steps=3, training__grid_steps=3
        ),
        workdir=tmp_path / "run",
    )
    state = train(small_latent_config(training__accumulation=2), workdir=tmp_path / "run")
    assert isinstance(state, TrainState) and int(state.step) == 6
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(whole.ema), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
