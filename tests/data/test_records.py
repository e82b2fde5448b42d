"""Reading prepared data: concurrent, bounded, resumable."""

import itertools
import threading

import numpy as np
import pytest
from support.configs import small_latent_config
from support.processes import ROOT

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, RecordSource, open_records
from diffit_jax.data.sources import batches, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.ingest import shards
from diffit_jax.run.objective import Objective
from diffit_jax.training.train import train

COUNT, SHAPE = 300, (2, 4, 4, 8)


def moments(number):
    return np.full(SHAPE, number, np.float16) + np.arange(8, dtype=np.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 moments in ten shards, written without a source."""
    folder = tmp_path_factory.mktemp("data") / "latents"
    arrays = records.layout(moments=ArraySpec(SHAPE, "float16"))
    plan = shards.Shards(folder, "train", count=COUNT, arrays=arrays, identity={}, per_shard=30)
    plan.begin()
    for shard in range(plan.total):
        with plan.writing(shard) as writer:
            for number in plan.numbers(shard):
                writer.add(number % 5, moments=moments(number))
    classes = tuple("abcde")
    metadata = {"source": {}, "crop": {}}
    plan.finish(classes, lambda sums: metadata)
    return folder


def test_rows_come_in_the_order_that_is_asked_for(folder):
    source = open_records(folder, "train")
    assert source.image_shape == (4, 4, 4) and len(source) == COUNT and source.num_classes == 5
    wanted = np.random.default_rng(0).integers(0, COUNT, 77)
    batch = source.read(wanted)
    np.testing.assert_array_equal(batch["moments"], np.stack([moments(n) for n in wanted]))
    assert batch["moments"].dtype == np.float16 and batch["moments"].flags.writeable
    np.testing.assert_array_equal(batch["label"], wanted % 5)
    assert source.read(np.array([], np.int64))["moments"].shape == (0, *SHAPE)


@pytest.mark.parametrize("shards_of_batch", [1, 3, 10])
def test_all_reads_of_a_batch_are_under_way_at_once(folder, monkeypatch, shards_of_batch):
    """Sixty rows from one shard, a few, or all: no read ends before all have begun (the barrier
    would break)."""
    reads = min(60, 30 * shards_of_batch)
    barrier, fetch = threading.Barrier(reads, timeout=20), RecordSource._fetch

    def slow(source, path, rows):
        assert len(rows) == 1
        barrier.wait()
        threading.Event().wait(0.01)  # as if it were far away
        return fetch(source, path, rows)

    monkeypatch.setattr(RecordSource, "_fetch", slow)
    rng, source = np.random.default_rng(0), open_records(folder, "train")
    for _ in range(2):
        wanted = rng.permutation(30 * shards_of_batch)[:reads]
        np.testing.assert_array_equal(source.read(wanted)["label"], wanted % 5)


def test_what_is_near_is_read_by_few(folder, monkeypatch):
    """After the first batch, which cannot know; and by many again when it is slow."""
    fetch, calls, delay = RecordSource._fetch, [], threading.Event()

    def noted(source, path, rows):
        calls.append(len(rows))
        if delay.is_set():
            threading.Event().wait(0.01 * len(rows))
        return fetch(source, path, rows)

    monkeypatch.setattr(RecordSource, "_fetch", noted)
    source, counts = open_records(folder, "train"), []
    for far in (False, False, True, True):
        (delay.set if far else delay.clear)()
        calls.clear()
        source.read(np.arange(30))  # of one shard
        counts.append(len(calls))
    assert counts == [30, 2, 2, 30]


def test_resuming_in_the_middle_gives_the_same_batches(folder):
    source = open_records(folder, "train")
    whole = list(itertools.islice(batches(source, 64, seed=3), 9))
    later = list(itertools.islice(batches(open_records(folder, "train"), 64, 3, first_step=5), 4))
    for one, other in zip(whole[5:], later, strict=True):
        np.testing.assert_array_equal(one["moments"], other["moments"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_reading_ahead_stops(folder, monkeypatch):
    """Memory is bounded: while nobody takes batches, a handful are read, and no more."""
    read, begun = RecordSource.read, []

    def noted(source, indices):
        begun.append(len(indices))
        return read(source, indices)

    monkeypatch.setattr(RecordSource, "read", noted)
    stream = batches(open_records(folder, "train"), 64, seed=0)
    next(stream)
    settled = 0
    for _ in range(50):  # until nothing more is begun
        before = len(begun)
        threading.Event().wait(0.02)
        settled = settled + 1 if len(begun) == before else 0
        if settled == 10:
            break
    assert settled == 10 and len(begun) <= 8


def test_a_shard_of_other_records_is_named(folder, tmp_path):
    """Another file under the name of a shard: its records have another size."""
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-00004-of-00010.array_record"
    other = shards.ShardWriter(path, records.layout(image=ArraySpec((3,), "uint8")))
    for _ in range(30):
        other.add(0, image=np.zeros(3, np.uint8))
    other.close()
    source = open_records(tmp_path, "train")
    assert len(source.read(np.arange(100))["label"]) == 100
    with pytest.raises(UserError, match=r"train-00004-of-00010.* is damaged .*has 7 bytes"):
        source.read(np.arange(130))
    (tmp_path / "train-00003-of-00010.array_record").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00003-of-00010.* is damaged"):
        open_records(tmp_path, "train").read(np.array([95]))


def test_processes_that_decode_import_no_jax():
    """They are started for every core: half a second and 200 MB each."""
    for name in ("ingest/decoding", "ingest/locations", "data/records", "ingest/images"):
        text = (ROOT / f"diffit_jax/{name}.py").read_text()
        assert "import jax" not in text and "from jax" not in text


def test_a_record_may_have_three_arrays(tmp_path):
    """Latents, features and tokens of captions beside a label: all come to the training step."""
    rng, count = np.random.default_rng(0), 20
    values = {
        "moments": rng.normal(size=(count, 1, 8, 8, 8)).astype(np.float16),
        "features": rng.normal(size=(count, 4, 6)).astype(np.float32),
        "tokens": rng.integers(0, 30_000, (count, 7)),
    }
    arrays = records.layout(
        **{name: ArraySpec(value.shape[1:], value.dtype.name) for name, value in values.items()}
    )
    plan = shards.Shards(
        tmp_path / "many", "train", count=count, arrays=arrays, identity={}, per_shard=6
    )
    plan.begin()
    for shard in range(plan.total):
        with plan.writing(shard) as writer:
            for number in plan.numbers(shard):
                writer.add(number % 10, **{name: value[number] for name, value in values.items()})
    metadata = {"source": {}, "crop": {}, "autoencoder": {}}
    plan.finish(tuple("abcdefghij"), lambda sums: metadata)
    source = open_dataset("many", "train", tmp_path)
    order = rng.permutation(count)
    batch = source.read(order)
    assert set(batch) == {"label", *values} and source.image_shape == (8, 8, 4)
    for name, value in values.items():
        np.testing.assert_array_equal(batch[name], value[order])
        assert batch[name].dtype == value.dtype and batch[name].flags.writeable

    class OfFeatures(Objective):
        def __call__(self, experiment, variables, frozen, examples, *, key_B, **more):
            assert {"features", "tokens"} <= set(examples)
            loss_B, terms = super().__call__(
                experiment, variables, frozen, examples, key_B=key_B, **more
            )
            return loss_B + examples["features"].mean((1, 2)), terms

    config = small_latent_config(data__name="many", training__total_steps=2)
    config.data.data_dir = str(tmp_path)
    assert int(train(config, workdir=tmp_path / "run", objective=OfFeatures()).skipped) == 0


def test_other_arrays_than_the_plans_are_refused(tmp_path):
    arrays = records.layout(image=ArraySpec((2, 2, 3), "uint8"))
    writer = shards.ShardWriter(tmp_path / "shard", arrays)
    for values in ({}, {"moments": np.zeros(3)}, {"image": np.zeros((2, 3, 3), np.uint8)}):
        with pytest.raises(
            ValueError, match=r"a record has label, image, not|image is \(2, 3, 3\)"
        ):
            writer.add(0, **values)
    writer.abandon()
