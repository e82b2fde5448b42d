"""Which rows of a batch a process holds: on every topology each row once, in its place, and proven
at the start of a run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import pods
from support.configs import small_latent_config

from diffit_jax.data.sources import ShuffledBatches, SyntheticSource
from diffit_jax.errors import UserError
from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape
from diffit_jax.training.train import train

ESTIMATES = json.loads((Path(__file__).parents[1] / "golden" / "estimates.json").read_text())
# With how many batches one contiguous block for each process would read in all: what there was
# before.
BLOCKS = {
    "v5e:4x4": 2.0,
    "v5e:16x16": 4.5,
    "v5p:2x2x4": 3.25,
    "v5p:4x4x4": 1.5,
    "v6e:4x4": 2.0,
    "v5e:8x8": 1.0,
    "v5e:2x2": 1.0,
}
TOPOLOGIES = [
    *[
        (topology, MeshShape(-1, -1), 1)
        for topology in sorted(
            BLOCKS.keys() | {each[0] for each in next(iter(ESTIMATES.values())).values()}
        )
    ],
    ("v5e:8x8", MeshShape(-1, 4, 2), 1),
    ("v5p:2x2x4", MeshShape(-1, 2, 4), 1),
    ("v5e:4x4", MeshShape(-1, 8), 2),
    ("v5e:8x8", MeshShape(-1, -1, 2), 2),
    ("v6e:4x4", MeshShape(-1, -1), 4),
]


def rows_by_hand(mesh, batch_size):
    """process → rows of its devices: place (d, f) of the mesh holds share number d · fsdp + f of
    the batch."""
    data, fsdp, _ = mesh.devices.shape
    fraction = batch_size // (data * fsdp)
    rows = {}
    for (d, f, _), device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).update(
            range((d * fsdp + f) * fraction, (d * fsdp + f + 1) * fraction)
        )
    return {process: np.array(sorted(each)) for process, each in rows.items()}


@pytest.mark.parametrize(("topology", "shape", "num_slices"), TOPOLOGIES, ids=str)
def test_rows_of_all_processes_are_the_batch(topology, shape, num_slices):
    """Every process has the rows of its devices; together, without `tensor`, they have each row
    once, not several batches."""
    mesh = pods.pod_mesh(topology, shape, num_slices)
    batch_size = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    expected = rows_by_hand(mesh, batch_size)
    ours = {
        process: parallel.local_batch_indices(mesh, batch_size, process) for process in expected
    }
    for process, by_hand in expected.items():
        np.testing.assert_array_equal(ours[process], by_hand)
    everyones = np.concatenate(list(ours.values()))
    assert set(everyones.tolist()) == set(range(batch_size))
    if mesh.shape["tensor"] == 1:
        assert len(everyones) == batch_size
    if num_slices == 1 and shape == MeshShape(-1, -1):
        assert (
            sum(rows[-1] + 1 - rows[0] for rows in ours.values()) == BLOCKS[topology] * batch_size
        )


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_processes_read_exactly_the_batch(topology):
    """Each process's part of a batch that spans two epochs, put together by row, is the batch that
    one process reads."""
    mesh, source = pods.pod_mesh(topology), SyntheticSource((2, 2, 1), 10, num_examples=50)
    whole = ShuffledBatches(source, 32, seed=3)
    for step in (0, 1, 4):
        together = np.zeros_like(whole[step]["image"])
        for process in range(4):
            mine = parallel.local_batch_indices(mesh, 32, process)
            part = ShuffledBatches(source, 32, seed=3, rows=mine)[step]
            together[mine] = part["image"]
            np.testing.assert_array_equal(part["label"], whole[step]["label"][mine])
        np.testing.assert_array_equal(together, whole[step]["image"])


def test_rows_in_any_order_are_read_in_that_order():
    source = SyntheticSource((2, 2, 1), 10, num_examples=5)
    whole = ShuffledBatches(source, 8, seed=0)[1]["image"]
    order = np.array([7, 0, 3])
    np.testing.assert_array_equal(
        ShuffledBatches(source, 8, seed=0, rows=order)[1]["image"], whole[order]
    )
    with pytest.raises(ValueError, match="rows 0 to 8 are not in a batch of 8"):
        ShuffledBatches(source, 8, seed=0, rows=np.array([0, 8]))


def two_devices(swapped=False):
    devices = jax.devices()[:2]
    return jax.sharding.Mesh(
        np.array(devices[::-1] if swapped else devices).reshape(2, 1, 1), parallel.AXES
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_batches_are_put_where_they_belong(swapped):
    mesh = two_devices(swapped)
    parallel.verify_batch_sharding(mesh, 6)
    batch = parallel.put_batch(mesh, {"x": np.arange(12.0).reshape(6, 2)}, 6)["x"]
    np.testing.assert_array_equal(batch, np.arange(12.0).reshape(6, 2))
    np.testing.assert_array_equal(jax.jit(jnp.sum)(batch[:, 0]), 30)
    (second,) = [
        shard for shard in batch.addressable_shards if shard.device == mesh.devices[1, 0, 0]
    ]
    np.testing.assert_array_equal(second.data[:, 0], [6, 8, 10])


@pytest.mark.parametrize("count", [5, 7, 12, 0])
def test_a_wrong_size_is_an_error_not_a_bigger_batch(count):
    with pytest.raises(
        ValueError, match=f"x has {count} rows, but this process holds 6 of the 6 of a batch"
    ):
        parallel.put_batch(two_devices(), {"x": np.zeros((count, 2))}, 6)


@pytest.mark.parametrize(
    ("wrong", "count"),
    [
        (lambda rows: rows[::-1], 3),
        (lambda rows: np.roll(rows, 1), 3),
        (lambda rows: np.where(rows == 4, 5, rows), 1),
    ],
    ids=["reversed", "shifted", "one twice"],
)
def test_rows_in_wrong_places_end_the_run_before_it_writes(wrong, count, tmp_path, monkeypatch):
    """The process is named, in one line."""
    right = parallel.put_batch
    monkeypatch.setattr(
        parallel,
        "put_batch",
        lambda mesh, batch, size: right(mesh, jax.tree.map(wrong, batch), size),
    )
    with pytest.raises(
        UserError,
        match=rf"process 0 has {count} of 3 rows of the batch in wrong places on device \d",
    ) as error:
        parallel.verify_batch_sharding(two_devices(), 6)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="rows of the batch in wrong places"):
        train(small_latent_config(), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arrays_go_through_the_mesh_batch_by_batch():
    """Seven rows in batches of four: each once, in order, without the copies that fill the last."""
    mesh = parallel.make_mesh()
    arrays = {
        "x": np.arange(14.0, dtype=np.float32).reshape(7, 2),
        "n": np.arange(7, dtype=np.int32),
    }
    seen = []

    def function(batch):
        seen.append(batch["x"].shape)
        return {"twice": 2 * batch["x"], "both": (batch["n"], batch["x"][:, 0])}

    parts = list(parallel.map_batches(function, mesh, 4, arrays))
    assert seen == [(4, 2), (4, 2)] and [len(part["twice"]) for part in parts] == [4, 3]
    np.testing.assert_array_equal(np.concatenate([p["twice"] for p in parts]), 2 * arrays["x"])
    np.testing.assert_array_equal(np.concatenate([p["both"][0] for p in parts]), arrays["n"])
