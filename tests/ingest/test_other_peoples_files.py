"""Archives, tables and labels as others make them: right data, or one line; never less unsaid."""

import io
import json
import os
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from support.images import encoded, image, pets, tar_bytes, write_folder, write_parquet, write_zip

from diffit_jax.data.records import read_manifest
from diffit_jax.data.sources import open_dataset
from diffit_jax.errors import UserError
from diffit_jax.ingest import locations
from diffit_jax.ingest.decoding import DecodeError, Preprocessing, decode
from diffit_jax.ingest.images import open_images
from diffit_jax.ingest.prepare import prepare

PETS = pets(12, width=8, height=8)
NAMES = sorted(PETS)


def contents(index):
    return [locations.read(index.location(number)) for number in range(len(index))]


def said(index):
    return " ".join(index.messages)


# --- Names and kinds


@pytest.mark.parametrize("above", ["", "pics\\", "a\\b\\"])
def test_separators_of_windows_are_separators(tmp_path, above):
    """In a zip, in a tar, in `dataset.json`, and in a folder that such a zip was unpacked to."""
    there = {above + name.replace("/", "\\"): PETS[name] for name in NAMES}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in there.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    (tmp_path / "a.tar").write_bytes(tar_bytes(there))
    folder = write_folder(tmp_path / "flat", {name: there[name] for name in there})
    sources = [tmp_path / "a.zip", tmp_path / "a.tar"] + ([] if above else [folder])
    for source in sources:
        index = open_images(source)
        assert index.classes == ("cat", "dog") and contents(index) == [PETS[n] for n in NAMES]
    labels = [[name, number % 3] for number, name in enumerate(there)]
    index = open_images(write_zip(tmp_path / "b.zip", there, labels))
    assert index.labels.tolist() == [number % 3 for number in range(12)]


def shards(folder, texts, names=("00000", "00001", "00002"), **more):
    for number, name in enumerate(names):
        part = {f"{number}{n:04d}.jpg": PETS[NAMES[n]] for n in range(5)}
        if texts:
            part |= {f"{number}{n:04d}.json": b"{}" for n in range(5)}
        (folder / f"{name}.tar").write_bytes(tar_bytes(part | more))
    return folder


@pytest.mark.parametrize(
    ("names", "texts", "classes"),
    [
        (("00000", "00001", "00002"), True, 0),
        (("00000", "00001", "00003"), False, 0),  # one failed to download
        (("part-1-of-3", "part-2-of-3", "part-3-of-3"), False, 0),
        (("red", "green", "blue"), True, 0),
        (("red", "green", "blue"), False, 3),
        (("n01440764", "n01443537", "n01484850"), False, 3),
    ],
)
def test_a_tar_is_a_class_only_where_that_is_plain(tmp_path, names, texts, classes):
    index = open_images(shards(tmp_path, texts, names))
    assert len(index.classes) == classes and len(index) == 15
    assert ("--tar_classes makes each tar a class" in said(index)) == (not classes)
    if not classes:
        assert open_images(tmp_path, tar_classes=True).classes == tuple(sorted(names))
    assert open_images(tmp_path, unlabelled=True).labels is None


def test_links_in_a_tar_are_the_images_that_they_name(tmp_path):
    def link(archive, name, target, kind):
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, target
        archive.addfile(entry)

    with tarfile.open(tmp_path / "l.tar", "w") as archive:
        link(archive, "p/cat/early.png", "00.png", tarfile.SYMTYPE)
        for name in NAMES:
            entry = tarfile.TarInfo(f"p/{name}")
            entry.size = len(PETS[name])
            archive.addfile(entry, io.BytesIO(PETS[name]))
        link(archive, "p/cat/hard.png", "p/cat/00.png", tarfile.LNKTYPE)
        link(archive, "p/dog/again.png", "p/cat/hard.png", tarfile.LNKTYPE)
        link(archive, "p/dog/up.png", "../cat/00.png", tarfile.SYMTYPE)
        link(archive, "p/dog/lost.png", "/elsewhere/x.png", tarfile.SYMTYPE)
        link(archive, "p/dog/ring.png", "ring.png", tarfile.SYMTYPE)
        pipe = tarfile.TarInfo("p/dog/pipe.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    index = open_images(tmp_path / "l.tar")
    assert len(index) == 16 and index.labels.tolist() == [0] * 8 + [1] * 8
    read = dict(zip(index.names, contents(index), strict=True))
    linked = ("cat/early", "cat/hard", "dog/again", "dog/up")
    assert all(read[f"p/{name}.png"] == PETS["cat/00.png"] for name in linked)
    assert "2 links to what is not there, 1 pipes or devices" in said(index)


@pytest.mark.parametrize("inner", [False, True])
def test_a_damaged_or_cut_tar_is_refused(tmp_path, inner):
    """As `tar tf` does, and where its end is missing, wherever it is cut."""
    content = tar_bytes(PETS)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        headers = [member.offset for member in archive]
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    damaged = {
        "header": content[: headers[7]] + b"\x55" * 512 + content[headers[7] + 512 :],
        "first header": b"\x55" * 512 + content[512:],
        "a bit of a header": content[: headers[7]] + b"\x01" + content[headers[7] + 1 :],
        "cut in a header": content[: headers[7] + 100],
        "cut between two": content[: headers[7]],
        "cut in an image": content[: headers[7] + 600],
        "without its end": content[:end],
        "two in a row": content[: end + 1024] + content,
    }
    for name, each in damaged.items():
        whole = tar_bytes({"cat.tar": each, "dog.tar": content}) if inner else each
        (tmp_path / "x.tar").write_bytes(whole)
        with pytest.raises(UserError, match=r"is not a whole tar file .*: fetch it again"):
            open_images(tmp_path / "x.tar")
            raise AssertionError(name)


def test_what_is_there_is_taken_as_it_is_and_only_the_rest_is_a_pattern(tmp_path):
    folder = write_folder(tmp_path / "pics [2024]", PETS)
    assert open_images(folder).classes == ("cat", "dog")
    one = open_images(folder / "*t", unlabelled=True, fewest=1)
    assert one.names == [name[4:] for name in NAMES[:6]]
    write_zip(folder / "a*b?.zip", PETS)
    assert len(open_images(folder / "a*b?.zip")) == 12
    for number in range(2):
        (folder / f"x{number}.tar").write_bytes(tar_bytes({f"{number}/{n}": PETS[n] for n in PETS}))
    assert len(open_images(folder / "x[0-9].tar")) == 24
    with pytest.raises(UserError, match="only the last part of a path may be a pattern"):
        open_images(tmp_path / "*/cat")


def test_images_are_known_by_their_first_bytes(tmp_path):
    """In every container; what is none is counted by suffix."""
    kinds = {"a.jfif": "jpeg", "b": "png", "c.dat": "webp", "d.avif": "avif", "e.1": "gif"}
    kinds |= {"f.scan": "tiff", "g.pic": "bmp", "h.x": "jpeg2000", "i.JPE": "jpeg"}
    good = {f"cat/{name}": encoded(image(1, 8, 8), kind) for name, kind in kinds.items()}
    good |= {f"dog/{name}": content for name, content in PETS.items()}
    others = {"cat/notes": b"words", "dog/x.heic": b"\0\0\0\x18ftypheic", "dog/y.heic": b"BM"}
    others |= {"dog/list.csv": b"\xff\xd8\xff", "more.tar.gz": b"\x1f\x8b", "inside.zip": b"PK"}
    everything = good | others
    (tmp_path / "x.tar").write_bytes(tar_bytes(everything))
    folder = write_folder(tmp_path / "x", everything)
    write_zip(tmp_path / "x.zip", everything)
    for source in (folder, tmp_path / "x.tar", tmp_path / "x.zip"):
        index = open_images(source)
        assert len(index) == len(good) and index.classes == ("cat", "dog")
        counted = "2 .heic, 1 .csv, 1 .tar.gz, 1 .zip, 1 without a suffix"
        assert index.messages == (f"passed over, as no images: {counted}",)
    empty = write_folder(tmp_path / "none", {"a.zip": b"PK", "b.zip": b"PK"})
    with pytest.raises(UserError, match=r"has no images .*, but 2 \.zip: name"):
        open_images(empty)


def test_pipes_are_never_opened(tmp_path):
    folder = write_folder(tmp_path / "x", PETS)
    for name in ("cat/a.png", "dog/b"):
        os.mkfifo(folder / name)
    os.symlink("/nowhere", folder / "dog/lost.png")
    index = open_images(folder)
    assert len(index) == 12 and "2 pipes or devices, 1 links to what is not there" in said(index)
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match="is a pipe or device: name a folder"):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize("target", [".", "..", "../../x"])
def test_a_link_that_leads_back_up_is_named(tmp_path, target):
    folder = write_folder(tmp_path / "x", PETS)
    os.symlink(target, folder / "cat/again")
    with pytest.raises(UserError, match=r"again.* is a folder within itself"):
        open_images(folder, unlabelled=True)


def test_the_second_image_of_a_sample_is_told(tmp_path):
    parts = {}
    for number in range(10):
        parts |= {f"{number}.cls": b"%d" % (number % 2), f"{number}.0.png": PETS[NAMES[number]]}
        parts |= {f"{number}.1.png": PETS[NAMES[number]]} if number < 3 else {}
    (tmp_path / "x.tar").write_bytes(tar_bytes(parts))
    assert "3 images beside the first one of their sample" in said(open_images(tmp_path / "x.tar"))
    assert len(open_images(tmp_path / "x.tar", unlabelled=True)) == 13


def test_the_same_name_in_two_shards_is_two_images(tmp_path):
    for shard in ("a", "b"):
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(PETS))
    index = open_images(tmp_path)
    assert len(index) == len(set(index.names)) == 24 and index.classes == ("cat", "dog")


def saved(folder, rows=12, names=("a", "b"), kind="stream"):
    """As `datasets.Dataset.save_to_disk` writes it, in two files."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    files = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    state = {"_data_files": [{"filename": name} for name in files], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    cells = [{"bytes": PETS[NAMES[n % 12]], "path": None} for n in range(rows)]
    table = pa.table({"image": cells, "label": [n % 2 for n in range(rows)]})
    for name, part in zip(files, (table[: rows // 2], table[rows // 2 :]), strict=True):
        opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(folder / name), "wb") as file, opened(file, table.schema) as stream:
            stream.write_table(part, max_chunksize=4)
    return folder


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_what_save_to_disk_wrote_is_read(tmp_path, kind):
    pytest.importorskip("pyarrow")
    index = open_images(saved(tmp_path / "one", kind=kind))
    assert index.classes == ("a", "b") and index.labels.tolist() == [0, 1] * 6
    assert contents(index) == [PETS[name] for name in NAMES]
    for split in ("train", "test"):
        saved(tmp_path / "dict" / split)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(open_images(tmp_path / "dict", "test")) == 12
    with pytest.raises(UserError, match="has no split 'dev': use --split test or train"):
        open_images(tmp_path / "dict", "dev")
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"00001-of-00002.arrow is not there: save it again"):
        open_images(tmp_path / "one")


# --- Labels


def parquet(path, labels, names=None, kind=None):
    import pyarrow as pa
    import pyarrow.parquet

    cells = [{"bytes": PETS[NAMES[n % 12]], "path": ""} for n in range(12)]
    columns = {"image": cells}
    if labels is not None:
        columns["label"] = pa.array(labels, kind)
    table = pa.table(columns)
    if names:
        feature = {"_type": "ClassLabel", "names": names}
        info = {"info": {"features": {"label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["cat", "dog"] * 6, None, ("cat", "dog")),
        ([True, False] * 6, None, ("0", "1")),
        ([1.0, 0.0] * 6, None, ("0", "1")),
        ([0, 5] * 6, None, ("0", "1", "2", "3", "4", "5")),  # unused ones are told by the summary
        ([0, 1] * 6, ["a", "b", "c"], ("a", "b", "c")),
        ([None] * 12, None, "no labels: all are missing"),
        ([-1] * 12, None, "no labels: all are -1"),
        ([0, 1, None] * 4, None, r"has 4 images without a label \(-1, or none\) among others"),
        ([0, 1, -1] * 4, None, "has 4 images without a label"),
        (["cat", "dog", None] * 4, None, "has 4 images without a label"),
        ([0, 1, 2, 3] * 3, ["a", "b"], "is 2, and there are names of 2 classes"),
        ([0, 10**12] * 6, None, "would have 1000000000001 classes, more than its 12 images"),
        ([0, 1] * 6, [*map(str, range(13))], "would have 13 classes, more than its 12 images"),
        ([0, -7] * 6, None, "is -7, and count from 0"),
        ([0.5, 1.0] * 6, None, "'0.5', neither a number nor a name"),
        ([[0], [1]] * 6, None, "neither a number nor a name"),
        ([f"a dog on a {n}" for n in range(12)], None, "are they captions"),
        (["", "a"] * 6, None, ("", "a")),
    ],
)
def test_labels_of_tables_are_classes_or_one_line(tmp_path, labels, names, expected):
    pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "x.parquet", labels, names)
    if isinstance(expected, tuple):
        index = open_images(path)
        assert index.classes == expected
        given = [expected.index(one) if isinstance(one, str) else int(one) for one in labels]
        assert index.labels.tolist() == given
    elif expected.startswith("no labels"):
        index = open_images(path)
        assert index.labels is None and expected in said(index)
    else:
        with pytest.raises(UserError, match=expected):
            open_images(path)
        assert len(open_images(path, unlabelled=True)) == 12


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (dict(labels=None), "b.parquet: the column of labels is not there, in a.parquet it is lab"),
        (dict(labels=[0, 1] * 6, names=["y", "x"]), "the names of its 2 classes are not those of"),
        (dict(labels=["x", "y"] * 6), "b.parquet: the names of its 0 classes|others are texts"),
    ],
)
def test_tables_that_disagree_are_refused(tmp_path, second, message):
    pytest.importorskip("pyarrow")
    parquet(tmp_path / "s/a.parquet", [0, 1] * 6, ["x", "y"])
    parquet(tmp_path / "s/b.parquet", **second)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "s")


@pytest.mark.parametrize("text", [b"1234567890", b"-3", b"1.5", b"", b"9" * 100])
def test_numbers_in_cls_files_are_classes_or_one_line(tmp_path, text):
    parts = {f"{n}.png": PETS[NAMES[n]] for n in range(10)}
    parts |= {f"{n}.cls": text if n == 4 else b"0" for n in range(10)}
    (tmp_path / "x.tar").write_bytes(tar_bytes(parts))
    with pytest.raises(UserError, match=r"4\.png"):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, 2**40] for name in NAMES], "would have 1099511627777 classes"),
        ([[name, True] for name in NAMES], "must be whole numbers"),
        ([[NAMES[0], 1], *([name, 0] for name in NAMES)], "cat/00.png has the labels 1 and 0"),
        ([[name, [0, 1]] for name in NAMES], "must be whole numbers"),
    ],
)
def test_labels_of_dataset_json_are_classes_or_one_line(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        open_images(write_zip(tmp_path / "x.zip", PETS, labels))


def test_splits_of_one_data_set_have_one_numbering(tmp_path):
    def write(name, **classes):
        contents = {}
        for label, count in classes.items():
            contents |= {f"{label}/{n}.png": PETS[NAMES[n % 12]] for n in range(count)}
        return write_folder(tmp_path / name, contents)

    def make(source, split="train", name="x", **more):
        prepare(source, name=name, split=split, data_dir=tmp_path / "data", workers=0, **more)

    make(write("train", ant=8, bee=8, cow=4))
    make(write("test", bee=6, cow=6), "test")
    manifest = read_manifest(tmp_path / "data/x", "test")
    assert manifest.classes == ("ant", "bee", "cow") and manifest.class_counts == (0, 6, 6)
    make(tmp_path / "test", "test")  # again: nothing to do, and nothing refused
    with pytest.raises(UserError, match=r"classes that split train .* has not \(dodo\)"):
        make(write("other", bee=6, dodo=6), "dev")
    numbers = write_zip(tmp_path / "n.zip", PETS, [[n, i % 3] for i, n in enumerate(NAMES)])
    make(numbers, "dev")
    assert read_manifest(tmp_path / "data/x", "dev").classes == ("ant", "bee", "cow")
    # What an earlier version has numbered by its own names is not trained with.
    path = tmp_path / "data/x/test.manifest.json"
    path.write_text(path.read_text().replace('"ant"', '"bee"', 1).replace('"bee"', '"ant"', 2))
    with pytest.raises(UserError, match=r"in split test, and .* in split train: delete test"):
        open_dataset("x", "test", tmp_path / "data")


# --- Earlier work


def test_images_that_changed_under_their_names_are_made_anew(tmp_path, caplog):
    caplog.set_level("INFO")

    def make():
        prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
        return open_dataset("x", "train", tmp_path / "data").read(np.arange(12))["image"]

    source = write_folder(tmp_path / "x", PETS | {"cat/00.png": b""})
    prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
    write_folder(source, PETS)
    np.testing.assert_array_equal(make()[0], image(0, 8, 8))  # what was empty before
    same = make()
    for name in PETS:  # copied: other times and inodes, the same images
        content = (source / name).read_bytes()
        (source / name).unlink()
        (source / name).write_bytes(content)
    caplog.clear()
    np.testing.assert_array_equal(make(), same)
    assert "looked at again" in caplog.text and "have changed" not in caplog.text
    changed = source / "dog/05.png"
    facts = os.stat(changed)
    changed.write_bytes(encoded(image(77, 8, 8)))
    np.testing.assert_array_equal(make()[NAMES.index("dog/05.png")], image(77, 8, 8))
    # Of the same size, time and inode: the sample that is read again notices.
    content = changed.read_bytes()
    facts = os.stat(changed)
    with open(changed, "r+b") as file:
        file.write(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    caplog.clear()
    make()
    assert "touched since" in caplog.text


def test_a_zip_is_known_by_its_own_sums(tmp_path, caplog):
    caplog.set_level("INFO")
    source = write_zip(tmp_path / "x.zip", PETS)
    for _ in range(2):  # written anew with the same images: nothing is to be looked at
        prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
        source.unlink()
        write_zip(source, PETS)
    assert "touched since" not in caplog.text
    other = bytearray(PETS["cat/00.png"])
    other[-20] ^= 1  # the same size
    write_zip(source, PETS | {"cat/00.png": bytes(other)})
    prepare(source, name="x", data_dir=tmp_path / "data", workers=0)
    assert "it is made anew" in caplog.text
    assert read_manifest(tmp_path / "data/x", "train").skipped[0][0] == "cat/00.png"


# --- Pixels without a known range


@pytest.mark.parametrize("kind", [np.int32, np.float32, np.uint32])
def test_levels_of_an_unknown_range_are_refused(kind):
    from PIL import Image

    levels = np.arange(64).reshape(8, 8).astype(kind)
    picture = Image.fromarray(levels.view(np.int32) if kind is np.uint32 else levels)
    with pytest.raises(DecodeError, match="have no known range"):
        decode(encoded(picture, "tiff"), Preprocessing())


def test_sixteen_bits_have_a_range(tmp_path):
    levels = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    for kind in ("png", "tiff"):
        pixels, notes = decode(encoded(levels, kind), Preprocessing())
        assert "16-bit" in notes
        np.testing.assert_array_equal(pixels[..., 0], np.rint(levels / 257))


def test_reasons_are_the_same_each_time():
    """No addresses of objects: manifests of two runs are equal, byte for byte."""
    with pytest.raises(DecodeError) as error:
        decode(b"no image at all", Preprocessing())
    assert " at 0x" not in str(error.value) and "cannot identify" in str(error.value)


def test_the_hubs_tables_still_name_their_classes(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", PETS, [0, 1] * 6, ["tabby", "hound"])
    assert open_images(tmp_path / "a.parquet").classes == ("tabby", "hound")


def test_a_bucket_is_asked_once_for_a_folder(monkeypatch):
    """For names, kinds and what tells a file from a later one of its name."""
    import fsspec

    system = fsspec.filesystem("memory")
    for name, content in PETS.items():
        system.pipe_file(f"/listed/{name}", content)
    asked, ls = [], type(system).ls
    monkeypatch.setattr(
        type(system), "ls", lambda self, path, **more: asked.append(path) or ls(self, path, **more)
    )
    monkeypatch.setattr(type(system), "info", lambda *_, **__: pytest.fail("asked for one file"))
    cats = {entry.name: entry for entry in locations.listed("memory://listed/cat")}
    assert sorted(cats) == [name[4:] for name in NAMES[:6]] and asked == ["/listed/cat"]
    first = cats["00.png"].stamp()
    assert all(entry.kind == "file" and entry.stamp() for entry in cats.values())
    assert {entry.kind for entry in locations.listed("memory://listed")} == {"folder"}
    system.pipe_file("/listed/cat/00.png", PETS["dog/01.png"])
    again = {entry.name: entry.stamp() for entry in locations.listed("memory://listed/cat")}
    assert again["00.png"] != first and again["02.png"] == cats["02.png"].stamp()


def test_a_broken_block_of_exif_costs_no_image():
    """As `--noupright` reads it; the rest of the file is whole."""
    whole = encoded(image(3, 8, 8))
    for block in (b"garbage", b"MM\0*\0\0\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01"):
        chunk = len(block).to_bytes(4, "big") + b"eXIf" + block
        chunk += zlib.crc32(b"eXIf" + block).to_bytes(4, "big")
        pixels, _ = decode(whole[:33] + chunk + whole[33:], Preprocessing())
        np.testing.assert_array_equal(pixels, image(3, 8, 8))


@pytest.mark.parametrize("form", ["0000{0}/img0000{0}{1:03}.png", "0000{0}/0000{0}{1:04}.png"])
def test_numbered_parts_of_a_set_are_no_classes(tmp_path, form):
    """EDM's layout without its `dataset.json`, and what img2dataset writes as files, or as tars
    with a folder each."""
    parts = [{form.format(p, n): PETS[NAMES[n]] for n in range(6)} for p in range(3)]
    contents_ = {name: content for part in parts for name, content in part.items()}
    folder = write_folder(tmp_path / "x", contents_)
    write_zip(tmp_path / "x.zip", {f"set/{name}": one for name, one in contents_.items()})
    for source in (folder, tmp_path / "x.zip"):
        index = open_images(source)
        assert index.labels is None and "numbered parts of one set" in said(index)
    (tmp_path / "tars").mkdir()
    for number, part in enumerate(parts):
        (tmp_path / "tars" / f"0000{number}.tar").write_bytes(tar_bytes(part))
    assert open_images(tmp_path / "tars").labels is None


def test_numbered_folders_of_classes_stay_classes(tmp_path):
    """Of digits, and of class numbers with zeros in front."""
    for form in ("{0}/{1}.png", "0000{0}/{1:05}.png", "0000{0}/n0144_{1}.png"):
        parts = {form.format(p, n + 20): PETS[NAMES[n]] for p in range(3) for n in range(6)}
        index = open_images(write_folder(tmp_path / str(len(form)) / "x", parts))
        assert len(index.classes) == 3, form
