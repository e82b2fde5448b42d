"""Images → ArrayRecord shards and a manifest, interrupted and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.images import encoded, image, odd_images, pets, write_folder
from support.processes import ROOT, command, environment

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, open_records
from diffit_jax.data.sources import DataSpec, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.ingest import prepare as prepare_module
from diffit_jax.ingest import shards
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.prepare import prepare


def contents(folder):
    """{name: bytes} of the finished files of a data set."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def everything(source):
    return source.read(np.arange(len(source)))


@pytest.fixture
def many(monkeypatch):
    """Shards of seven examples of 8×8 pixels."""
    monkeypatch.setattr(shards, "MOST_BYTES", 7 * (4 + 8 * 8 * 3))


def test_what_is_prepared_is_read_back_bit_for_bit(tmp_path, many):
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    manifest = prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    assert (manifest.count, manifest.classes) == (23, ("cat", "dog"))
    assert manifest.arrays["image"] == ArraySpec((8, 8, 3), "uint8")
    assert manifest.class_counts == (12, 11) and [s.count for s in manifest.shards] == [7, 7, 7, 2]
    read = open_dataset("pets", "train", tmp_path / "data", DataSpec((8, 8, 3), 2, "image"))
    order = [*range(0, 23, 2), *range(1, 23, 2)]  # by name: cats first
    expected = np.stack([image(number, 8, 8) for number in order])
    batch = everything(read)
    np.testing.assert_array_equal(batch["image"], expected)
    assert batch["label"].tolist() == [0] * 12 + [1] * 11 and batch["label"].dtype == np.int32
    mixed = np.random.default_rng(0).permutation(23)[:9]
    again = read.read(np.append(mixed, mixed[:2]))
    np.testing.assert_array_equal(again["image"], expected[np.append(mixed, mixed[:2])])


def test_processes_and_interruptions_leave_the_same_files(tmp_path, many, monkeypatch):
    """With two processes as with none; and after an end in the middle of each shard in turn."""
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "alone", workers=0)
    prepare(source, name="pets", data_dir=tmp_path / "two", workers=2)
    assert contents(tmp_path / "two/pets") == contents(tmp_path / "alone/pets")
    add, interruptions = shards.ShardWriter.add, 0
    while interruptions < 9:
        left = iter(range(8))  # a shard, and one example of the next

        def add_or_end(writer, *arguments, left=left, **arrays):
            if next(left, None) is None:
                raise KeyboardInterrupt
            add(writer, *arguments, **arrays)

        monkeypatch.setattr(shards.ShardWriter, "add", add_or_end)
        try:
            prepare(source, name="pets", data_dir=tmp_path / "cut", workers=0)
            break
        except KeyboardInterrupt:
            interruptions += 1
            names = {path.name for path in (tmp_path / "cut/pets").iterdir()}
            assert len([name for name in names if name.endswith("_record")]) == interruptions
            assert not any(name.endswith(("partial", "manifest.json")) for name in names)
    assert interruptions == 3
    ours, whole = contents(tmp_path / "cut/pets"), contents(tmp_path / "alone/pets")
    assert ours == whole


def test_a_killed_command_goes_on(tmp_path):
    """By SIGKILL in the middle; its helpers go with it, and half a shard is cleared away."""
    source = write_folder(tmp_path / "pets", pets(600, width=64, height=64))
    arguments = [
        sys.executable,
        ROOT / "launch/prepare.py",
        "--source",
        source,
        "--name",
        "pets",
        "--data_dir",
        tmp_path / "data",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(list(map(str, arguments)), env=environment(), cwd=tmp_path)
    folder, deadline = tmp_path / "data/pets", time.monotonic() + 60
    while not list(folder.glob(".*.partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "train.manifest.json").exists()
    flags = ["--source", source, "--name", "pets", "--data_dir", tmp_path / "data"]
    status, said = command("prepare", *flags, "--workers", "1", cwd=tmp_path)
    assert status == 0, said
    assert not list(folder.glob(".*.partial")) and len(open_records(folder, "train")) == 600
    status, said = command("prepare", *flags, cwd=tmp_path)  # nothing is left to do
    assert status == 0 and "600 examples" in said


def test_a_deleted_or_cut_shard_is_made_again(tmp_path, many):
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    folder = tmp_path / "data/pets"
    whole = contents(folder)
    (folder / "train-00001-of-00004.array_record").unlink()
    cut = folder / "train-00002-of-00004.array_record"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-00001-of-00004.array_record is damaged or not"):
        open_records(folder, "train")
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    assert contents(folder) == whole


def test_a_corrupt_shard_is_named_and_the_rest_stays_usable(tmp_path, many):
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    path = tmp_path / "data/pets/train-00001-of-00004.array_record"
    content = bytearray(path.read_bytes())
    place = content.find(image(14, 8, 8).tobytes()[:40])  # the first of its records
    content[place + 20] ^= 255
    path.write_bytes(content)
    read = open_records(tmp_path / "data/pets", "train")
    with pytest.raises(UserError, match=r"train-00001-of-00004.array_record is damaged"):
        read.read(np.arange(23))
    others = np.setdiff1d(np.arange(23), [7])
    assert len(read.read(others)["label"]) == 22


def test_odd_images_are_counted_and_broken_ones_named(tmp_path):
    """Twenty among two hundred: seven are skipped, thirteen handled."""
    odd = {f"odd/{name}": content for name, (content, _) in odd_images().items()}
    plain = {f"plain/{number}.png": encoded(image(number)) for number in range(180)}
    source = write_folder(tmp_path / "images", odd | plain)
    manifest = prepare(
        source,
        name="odd",
        data_dir=tmp_path / "data",
        preprocessing=Preprocessing("adm", 16),
        workers=0,
    )
    broken = {f"odd/{n}" for n, (_, becomes) in odd_images().items() if isinstance(becomes, str)}
    assert manifest.count == 193 and len(broken) == 7
    assert {name for name, _ in manifest.skipped} == broken and all(r for _, r in manifest.skipped)
    assert manifest.notes == {
        "16-bit": 1,
        "CMYK": 1,
        "animated: its first frame": 1,
        "enlarged": 1,
        "grey": 3,
        "misnamed": 1,
        "palette": 2,
        "transparent: on white": 2,
        "turned upright by EXIF": 1,
    }
    assert manifest.class_counts == (13, 180)


def test_mixed_sizes_need_a_crop(tmp_path):
    names = pets(12) | {"dog/99.png": encoded(image(0, 41, 32))}
    source = write_folder(tmp_path / "pets", names)
    with pytest.raises(UserError, match=r"dog/99.png is 41×32, the first image is 40×32: .*--crop"):
        prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    assert not (tmp_path / "data/pets/train.manifest.json").exists()


def test_another_source_does_not_go_into_the_same_data_set(tmp_path):
    first = write_folder(tmp_path / "a", pets(12))
    other = write_folder(tmp_path / "b", pets(14))
    prepare(first, name="pets", data_dir=tmp_path / "data", workers=0)
    with pytest.raises(UserError, match=r"holds split train of other data .*choose another --name"):
        prepare(other, name="pets", data_dir=tmp_path / "data", workers=0)
    with pytest.raises(UserError, match=r"of other data \(crop .*shape"):
        prepare(
            first,
            name="pets",
            data_dir=tmp_path / "data",
            preprocessing=Preprocessing("adm", 8),
            workers=0,
        )
    prepare(other, name="pets", data_dir=tmp_path / "data", split="test", workers=0)
    assert len(open_records(tmp_path / "data/pets", "test")) == 14


def test_a_full_disk_keeps_what_is_finished(tmp_path, many, monkeypatch):
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    close, left = shards.ShardWriter.close, iter(range(2))

    def close_or_fail(writer):
        if next(left, None) is None:
            raise RuntimeError("write() failed: No space left on device")  # as the library says it
        return close(writer)

    monkeypatch.setattr(shards.ShardWriter, "close", close_or_fail)
    with pytest.raises(UserError, match="make room, and run the same command again; 2 of 4 shards"):
        prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "MOST_BYTES", 7 * (4 + 8 * 8 * 3))
    assert prepare(source, name="pets", data_dir=tmp_path / "data", workers=0).count == 23


def test_a_disk_that_is_full_for_real(tmp_path):
    """The library says so itself, on the device that is always full."""
    writer = shards.ShardWriter.__new__(shards.ShardWriter)
    with pytest.raises((OSError, RuntimeError), match="No space left"):
        writer.__init__("/dev/full", records.layout(image=ArraySpec((64, 64, 3), "uint8")))
        for _ in range(100):
            writer.add(0, image=np.zeros((64, 64, 3), np.uint8))
        writer.close()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    source = write_folder(tmp_path / "pets", pets(12))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    path = tmp_path / "data/pets/train.manifest.json"
    whole = path.read_text()
    path.write_text(content)
    with pytest.raises(UserError, match=r"train.manifest.json is damaged .*delete it, and run"):
        open_records(tmp_path / "data/pets", "train")
    path.unlink()
    with pytest.raises(UserError, match="not complete yet: run the command that made it again"):
        open_records(tmp_path / "data/pets", "train")
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    assert path.read_text() == whole


def test_names_of_data_sets_stay_in_their_folder(tmp_path):
    for name in ("../up", "a/b", "", ".hidden", "digits", "synthetic"):
        with pytest.raises(UserError, match=r"data set name .* cannot be"):
            prepare(tmp_path, name=name, data_dir=tmp_path / "data")


def test_what_an_experiment_expects_is_checked(tmp_path):
    source = write_folder(tmp_path / "pets", pets(12, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    for wanted, message in [
        (DataSpec((16, 16, 3), 2, "image"), "images of .8, 8, 3., the model expects .16, 16, 3."),
        (DataSpec((8, 8, 3), 5, "image"), "has 2 classes, the model 5"),
        (DataSpec((1, 1, 4), 2, "latent"), "holds images: encode them"),
    ]:
        with pytest.raises(UserError, match=message):
            open_dataset("pets", "train", tmp_path / "data", wanted)
    with pytest.raises(UserError, match=r"there is no data set .*test.manifest.json: it has train"):
        open_dataset("pets", "test", tmp_path / "data")
    assert json.loads((tmp_path / "data/pets/train.manifest.json").read_text())["count"] == 12
    assert list(records.read_manifest(tmp_path / "data/pets", "train").arrays) == ["label", "image"]


def test_a_bucket_gets_the_same_files(tmp_path, many, monkeypatch):
    """Shards are written to scratch and uploaded; interrupted, it goes on. (A file system in memory
    stands for the bucket.)"""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("gs://").strip("/")

    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    monkeypatch.setattr("diffit_jax.runtime.files._SCHEMES", {"gs": "fsspec"})
    monkeypatch.setattr("diffit_jax.runtime.files.SETTLE_S", 0)
    source = write_folder(tmp_path / "pets", pets(23, width=8, height=8))
    prepare(source, name="pets", data_dir=tmp_path / "data", workers=0)
    close, left = shards.ShardWriter.close, iter(range(2))

    def close_or_end(writer):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return close(writer)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "close", close_or_end)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, name="pets", data_dir="gs://bucket/data", workers=0)
    prepare(source, name="pets", data_dir="gs://bucket/data", workers=0)
    theirs = {
        name.removeprefix("/bucket/data/pets/"): file.getvalue()
        for name, file in Bucket.store.items()
        if name.count("/") == 4
    }
    assert theirs == contents(tmp_path / "data/pets")


def test_a_part_is_held_out_by_its_pixels(tmp_path, many):
    """The same images whatever else there is, copies on one side; resumed to the same bytes."""
    source = write_folder(tmp_path / "pets", pets(60, width=8, height=8))
    first = sorted((source / "cat").iterdir())[0]
    copy = source / "dog" / f"copy{first.suffix}"
    copy.write_bytes(first.read_bytes())
    manifest = prepare(
        source, name="p", data_dir=tmp_path / "a", workers=0, holdout=0.3, preview=True
    )
    train, test = (everything(open_records(tmp_path / "a" / "p", s)) for s in ("train", "test"))
    assert manifest.count + len(test["image"]) == 61 and 8 < len(test["image"]) < 30
    sides = [{image.tobytes() for image in split["image"]} for split in (train, test)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 60
    assert (tmp_path / "a" / "p" / "train.preview.png").stat().st_size > 1000

    # More images move none.
    more = write_folder(tmp_path / "more", pets(90, width=8, height=8))
    prepare(more, name="p", data_dir=tmp_path / "b", workers=0, holdout=0.3)
    larger = {
        split: {i.tobytes() for i in everything(open_records(tmp_path / "b" / "p", split))["image"]}
        for split in ("train", "test")
    }
    assert sides[1] <= larger["test"] and sides[0] <= larger["train"]

    # A shard that is lost is made again, of both splits.
    before = contents(tmp_path / "a" / "p")
    for file in (tmp_path / "a" / "p").glob("test-0000[0-3]*"):
        file.unlink()
    prepare(source, name="p", data_dir=tmp_path / "a", workers=0, holdout=0.3)
    assert contents(tmp_path / "a" / "p") == before


def test_a_holdout_that_leaves_a_class_empty_leaves_nothing(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "pets", pets(14, width=8, height=8))
    for share, what in ((0.001, "no test image of class"), (0.9, "no training image of class")):
        monkeypatch.setattr(prepare_module, "is_held_out", lambda _, share: share > 0.5)
        with pytest.raises(UserError, match=f"--holdout leaves {what}") as error:
            prepare(source, name="p", data_dir=tmp_path / "d", workers=0, holdout=share)
        assert "\n" not in str(error.value)
        left = {path.name for path in (tmp_path / "d" / "p").iterdir() if path.suffix != ".lock"}
        assert not {name for name in left if not name.startswith(".")}, left
    with pytest.raises(UserError, match="leave out --split"):
        prepare(source, name="q", data_dir=tmp_path, split="test", holdout=0.1, workers=0)
