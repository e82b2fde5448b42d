"""What sources hold, and which label each image has."""

import gzip
import io
import json
import pickle
import re
import tarfile

import numpy as np
import pytest
from support.images import encoded, image, pets, tar_bytes, write_folder, write_parquet, write_zip

from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError
from diffit_jax.ingest import locations
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.images import Loader, open_images

PETS = pets(12)
NAMES = sorted(PETS)
LABELS = [int(name.startswith("dog")) for name in NAMES]
FLAT = {name.replace("/", "_"): content for name, content in PETS.items()}


def loaded(index, preprocessing=Preprocessing()):
    """Pixels of every image, by this process."""
    with Loader(index, preprocessing, workers=0) as loader:
        return [one.pixels for one in loader.load(range(len(index)))]


def imagenet_tar(contents):
    """As ImageNet's own: a tar of each class in a tar."""
    classes = sorted({name.partition("/")[0] for name in contents})
    return tar_bytes(
        {
            f"{name}.tar": tar_bytes(
                {each.partition("/")[2]: contents[each] for each in contents if each[:3] == name}
            )
            for name in reversed(classes)
        }
    )


def containers(folder):
    """The same images in every container that has folders for classes."""
    reverse = dict(reversed(PETS.items()))
    (folder / "plain.tar").write_bytes(tar_bytes(reverse))
    (folder / "imagenet.tar").write_bytes(imagenet_tar(PETS))
    write_folder(folder / "folder", reverse | {"cat/notes.txt": b"x", "dog/.hidden.png": b"x"})
    (folder / "tars").mkdir()
    for name in ("dog", "cat"):
        part = {each.partition("/")[2]: PETS[each] for each in PETS if each.startswith(name)}
        (folder / "tars" / f"{name}.tar").write_bytes(tar_bytes(part))
    return {
        "folder": folder / "folder",
        "zip": write_zip(folder / "a.zip", reverse | {"__MACOSX/cat/00.png": b"x"}),
        "packed zip": write_zip(folder / "b.zip", PETS, method=8),
        "zip with a folder above": write_zip(
            folder / "c.zip", {f"set/train/{name}": PETS[name] for name in PETS}
        ),
        "tar": folder / "plain.tar",
        "tar of tars": folder / "imagenet.tar",
        "tars of classes": folder / "tars",
    }


def test_the_same_images_are_the_same_data_in_every_container(tmp_path):
    """In the same order with the same labels, whatever the order of files: class folders, zips,
    tars, ImageNet's tar of tars."""
    for kind, path in containers(tmp_path).items():
        index = open_images(path)
        tails = ["/".join(name.split("/")[-2:]) for name in index.names]
        assert tails == NAMES, kind
        assert index.classes == ("cat", "dog") and index.labels.tolist() == LABELS, kind
        contents = [locations.read(index.location(number)) for number in range(len(index))]
        assert contents == [PETS[name] for name in NAMES], kind
        assert not [text for text in index.messages if not text.startswith("passed over")]


def test_an_index_travels_to_other_processes(tmp_path):
    for path in containers(tmp_path).values():
        index = open_images(path)
        other = locations.Index.from_bytes(index.to_bytes())
        assert other.digest() == index.digest() and other.classes == index.classes
        assert [other.location(n) for n in range(12)] == [index.location(n) for n in range(12)]


def test_names_of_any_bytes_travel_too(tmp_path):
    raw = {f"{number}\udcff\udc80 ü.png": PETS[name] for number, name in enumerate(NAMES)}
    index = open_images(write_folder(tmp_path / "odd", raw))
    other = locations.Index.from_bytes(index.to_bytes())
    assert other.names == index.names == sorted(raw) and other.digest() == index.digest()


def test_parts_of_a_far_file_are_read_alone(tmp_path):
    """In a bucket: by ranges of its file system, without the rest of the tar or zip."""
    import fsspec

    system = fsspec.filesystem("memory")
    for name, path in containers(tmp_path).items():
        if path.is_file():
            index = open_images(path)
            content = path.read_bytes()
            system.pipe_file(f"/{path.name}", content)
            asked = []
            with pytest.MonkeyPatch.context() as patch:
                read = type(system).cat_file
                patch.setattr(
                    type(system),
                    "cat_file",
                    lambda self, path, start=None, end=None, asked=asked, read=read: (
                        asked.append(end - start) or read(self, path, start, end)
                    ),
                )
                places_there = [
                    index.location(number)._replace(path=f"memory://{path.name}")
                    for number in range(12)
                ]
                assert [locations.read(place) for place in places_there] == list(
                    map(PETS.get, NAMES)
                ), name
            assert max(asked) <= max(map(len, PETS.values())) + 2**11


def test_a_flat_folder_has_no_labels(tmp_path):
    index = open_images(write_folder(tmp_path / "flat", FLAT))
    assert index.labels is None and index.classes == ()
    assert index.messages == ("no labels: its images lie in one folder",)
    above = open_images(write_zip(tmp_path / "x.zip", {f"set/{name}": FLAT[name] for name in FLAT}))
    assert above.labels is None


def test_labels_of_edms_layout(tmp_path):
    """`dataset.json` wins over folders, in a zip and in a folder; null is: no labels."""
    contents = {f"00000/img{n:08d}.png": PETS[name] for n, name in enumerate(NAMES)}
    labels = [[name, number % 5] for number, name in enumerate(contents)]
    index = open_images(write_zip(tmp_path / "edm.zip", contents, labels))
    assert index.labels.tolist() == [number % 5 for number in range(12)]
    assert index.classes == ("0", "1", "2", "3", "4")
    folder = write_folder(tmp_path / "edm", contents)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    assert open_images(folder).labels.tolist() == index.labels.tolist()
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_images(folder).labels is None


def test_webdataset_pairs_images_with_their_numbers(tmp_path):
    parts = [{}, {}]
    for number, name in enumerate(NAMES):
        key = f"{number:06d}"
        parts[number % 2] |= {f"{key}.cls": b"%d\n" % (number % 3), f"{key}.jpg": PETS[name]}
    for number, part in enumerate(parts):
        (tmp_path / f"train-{number}.tar").write_bytes(tar_bytes(part))
    (tmp_path / "val-0.tar").write_bytes(tar_bytes(parts[0]))
    index = open_images(tmp_path, "train")
    assert len(index) == 12 and index.classes == ("0", "1", "2")
    assert index.labels.tolist() == [0, 2, 1, 0, 2, 1, 1, 0, 2, 1, 0, 2]
    assert index.labels.tolist() == open_images(tmp_path / "train-*.tar").labels.tolist()
    contents = [locations.read(index.location(number)) for number in range(12)]
    assert contents == [PETS[NAMES[n]] for n in (*range(0, 12, 2), *range(1, 12, 2))]


def test_tables_of_the_hub(tmp_path):
    """Class names come from the metadata; a test split's labels of -1 are none."""
    pytest.importorskip("pyarrow")
    contents = {name: PETS[name] for name in NAMES}
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-0.parquet", contents, LABELS, ["tabby", "hound"])
    write_parquet(tmp_path / "data/test-0.parquet", contents, [-1] * 12, ["tabby", "hound"])
    index = open_images(tmp_path)
    assert index.classes == ("tabby", "hound") and index.labels.tolist() == LABELS
    assert [locations.read(index.location(n)) for n in range(12)] == list(contents.values())
    test = open_images(tmp_path, "test")
    assert test.labels is None and "as in test splits" in test.messages[0]


def test_what_tensorflow_datasets_has_prepared(tmp_path):
    """Without TensorFlow: pixels, labels and their names; other splits and formats are named."""
    try:
        import tensorflow_datasets.core  # noqa: F401
    except Exception as error:
        pytest.skip(f"tensorflow-datasets does not import here: {error}")
    digits = open_dataset("digits", "train", tmp_path)
    folder = next((tmp_path / "digits").iterdir())
    index = open_images(folder)
    with Loader(index, Preprocessing(channels=1), workers=0) as loader:
        found = np.stack([one.pixels for one in loader.load(range(0, len(index), 97))])
    np.testing.assert_array_equal(found, digits.images[::97])
    np.testing.assert_array_equal(index.labels, digits.labels)
    assert index.classes == tuple(map(str, range(10)))
    with pytest.raises(UserError, match="has no split 'validation': use --split test or train"):
        open_images(folder, "validation")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    locations.tfds_source.cache_clear()
    with pytest.raises(UserError, match=r"prepared as tfrecord, which cannot be read without Tens"):
        open_images(folder)


def cifar(binary, count=4):
    """(files of a small CIFAR-10, pixels of the five batches, labels)."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, count, 3072), dtype=np.uint8)
    labels = np.arange(6 * count).reshape(6, count) % 10
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    words = [f"class{number}" for number in range(10)]
    files = {}
    for name, part, numbers in zip(names, pixels, labels, strict=True):
        if binary:
            rows = np.concatenate([numbers[:, None].astype(np.uint8), part], axis=1)
            files[f"cifar-10-batches-bin/{name}.bin"] = rows.tobytes()
        else:
            batch = {b"data": part, b"labels": numbers.tolist(), b"batch_label": b"x"}
            files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
    if binary:
        files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*words, ""]).encode()
    else:
        meta = {b"label_names": [word.encode() for word in words]}
        files["cifar-10-batches-py/batches.meta"] = pickle.dumps(meta, protocol=2)
    images = pixels.reshape(6, count, 3, 32, 32).transpose(0, 1, 3, 4, 2)
    return files, images, labels


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "python"])
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_cifars_archives(tmp_path, binary, packed):
    files, images, labels = cifar(binary)
    if packed:
        path = tmp_path / "cifar-10.tar.gz"
        path.write_bytes(gzip.compress(tar_bytes(files)))
    else:
        path = write_folder(tmp_path, files) / next(iter(files)).partition("/")[0]
    train = open_images(path)
    np.testing.assert_array_equal(np.stack(loaded(train)), images[:5].reshape(-1, 32, 32, 3))
    assert train.labels.tolist() == labels[:5].ravel().tolist()
    assert train.classes[3] == "class3"
    with pytest.raises(UserError, match="has 4 images, a data set needs 10"):
        open_images(path, "test")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("what", [Evil(), np.array([Evil()], object)], ids=["call", "objects"])
def test_a_pickle_runs_nothing(tmp_path, what, capsys):
    files, _, _ = cifar(binary=False)
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({b"data": what, b"labels": []}, 2)
    path = tmp_path / "cifar-10.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(files)))
    with pytest.raises(UserError, match="which is not loaded"):
        open_images(path)
    assert "executed" not in capsys.readouterr().out


def test_images_of_other_processes_come_in_order(tmp_path):
    """And what is broken among them is named, whoever decodes."""
    contents = {f"{n:03d}.png": encoded(image(n, 9, 7)) for n in range(40)}
    contents |= {"005.png": b"", "017.png": b"<html>"}
    index = open_images(write_folder(tmp_path, contents))
    with Loader(index, Preprocessing(), workers=2) as loader:
        found = list(loader.load(range(40)))
    assert [one.number for one in found] == list(range(40))
    assert {one.number: one.reason[:10] for one in found if one.pixels is None} == {
        5: "empty file",
        17: "Unidentifi",
    }
    for one in found:
        if one.pixels is not None:
            np.testing.assert_array_equal(one.pixels, image(one.number, 9, 7))


def bad_sources(folder):
    """Message → source."""
    few = {name: PETS[name] for name in NAMES[4:7]}
    half = [[name, 0] for name in NAMES[:7]]
    extra = [[name, 0] for name in [*NAMES, "fish/1.png", "fish/2.png"]]
    with tarfile.open(folder / "gzip.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("cat/1.png")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    whole = write_zip(folder / "whole.zip", PETS).read_bytes()
    (folder / "half.zip").write_bytes(whole[: len(whole) // 2])
    (folder / "half.tar").write_bytes(b"x" * 3000)
    (folder / "a.tfrecord").write_bytes(b"x")
    (folder / "a.txt").write_bytes(b"x")
    lists = folder / "lists.zip"
    write_zip(lists, PETS, [[name, [0, 1]] for name in NAMES])
    cls = {f"{n}.png": PETS[name] for n, name in enumerate(NAMES)} | {"0.cls": b"cat"}
    (folder / "words.tar").write_bytes(tar_bytes(cls | {f"{n}.cls": b"1" for n in range(1, 12)}))
    (folder / "fewer.tar").write_bytes(tar_bytes(cls))
    return {
        r"dataset.json has no label of 5 images \(dog": write_zip(folder / "a.zip", PETS, half),
        r"names 2 images that are not there \(fish/1.png, fish/2.png\)": write_zip(
            folder / "b.zip", PETS, extra
        ),
        "lists.zip.*must be whole numbers": lists,
        "has no images": write_folder(folder / "empty", {"a/readme.txt": b""}),
        "has 3 images, a data set needs 10": write_folder(folder / "few", few),
        "has one class only, 'cat'": write_folder(
            folder / "one", {f"cat/{number}.png": b"" for number in range(20)}
        ),
        r"has 1 images beside its folders \(x.png\)": write_folder(
            folder / "mixed", PETS | {"x.png": b""}
        ),
        r"has folders without an image \(fish\)": write_folder(
            folder / "gap", PETS | {"fish/readme.txt": b""}
        ),
        r"has folders of splits \(train, val\), not of classes": write_folder(
            folder / "splits",
            {f"{('train', 'val')[n % 2]}/cat/{n}.png": PETS[NAMES[n]] for n in range(12)},
        ),
        "there is no .*nothing: name a folder": folder / "nothing",
        "there is no file .*none-": folder / "none-*.tar",
        "is compressed.*gunzip it first": folder / "gzip.tar.gz",
        "half.zip is not a whole zip file": folder / "half.zip",
        "half.tar is not a whole tar file": folder / "half.tar",
        "holds TFRecords.*file_format='array_record'": folder / "a.tfrecord",
        "a.txt is neither a folder nor a zip, tar or Parquet file": folder / "a.txt",
        r"the .cls of 0.png is 'cat', not a number": folder / "words.tar",
        r"11 images have no .cls beside them": folder / "fewer.tar",
    }


def test_bad_sources_get_one_line(tmp_path):
    for message, path in bad_sources(tmp_path).items():
        with pytest.raises(UserError) as error:
            open_images(path)
        assert re.search(message, str(error.value)), f"{message} → {error.value}"
        assert "\n" not in str(error.value)


def test_unlabelled_takes_what_labels_would_refuse(tmp_path):
    mixed = write_folder(tmp_path / "mixed", PETS | {"x.png": PETS[NAMES[0]]})
    assert len(open_images(mixed, unlabelled=True)) == 13
    one = write_folder(tmp_path / "one", {f"cat/{n}.png": PETS[NAMES[n]] for n in range(12)})
    assert open_images(one, unlabelled=True).labels is None
