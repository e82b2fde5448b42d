"""Damaged files: small ones of each kind that is read, mutations of them, and what readers make of
each: the right data, one line, an image that is named as broken; or a fault.

`python tests/studies/fuzz.py` tries thousands."""

import collections
import hashlib
import io
import json
import shutil
import signal
import struct
import tarfile
import zipfile

import numpy as np
import safetensors.numpy
from etils import epath
from support.golden import GOLDEN
from support.images import encoded, image, pets, tar_bytes, write_folder, write_parquet, write_zip

from diffit_jax.data import records
from diffit_jax.errors import UserError
from diffit_jax.evaluation.images import NpzImages
from diffit_jax.evaluation.reference import Reference
from diffit_jax.ingest.decoding import DecodeError, Preprocessing, decode
from diffit_jax.ingest.images import Loader, open_images
from diffit_jax.ingest.prepare import prepare
from diffit_jax.interop import diffusers
from diffit_jax.interop.torch_files import TorchFile
from diffit_jax.interop.weight_files import DIGEST, NO_DIGEST, WeightFiles
from diffit_jax.run import workdir as workdirs

PETS = pets(12, width=8, height=8)
SECONDS = 10  # that a file may take
PLAIN = Preprocessing()


class Broken(str):
    """Why an image is left out, by name."""


# --- Readers: (suffix, content, function of a path to all that is in it, by name)


def of_source(path):
    index = open_images(epath.Path(path))
    found = {"classes": index.classes, "labels": index.labels.tolist(), "names": index.names}
    with Loader(index, PLAIN, workers=0) as loader:
        for one in loader.load(range(len(index))):
            whole = one.pixels is not None
            found[f"image {one.number}"] = one.pixels if whole else Broken(one.reason)
    return found


def of_npz(path):
    images = NpzImages(epath.Path(path), labelled=True)
    found = {"labels": images.labels()}
    return found | {"images": np.concatenate([*images.batches(5)])}


def of_reference(path):
    found = Reference.load(epath.Path(path), {"mu": 6, "mu_s": 4})
    arrays = {f"{name} {n}": one for name, pair in found.statistics.items() for n, one in
              enumerate(pair)}  # fmt: skip
    return arrays | {"protocol": json.dumps(found.protocol)}


def of_weights(path):
    with WeightFiles(path, "a|b|c") as file:
        return {name: file.tensor(name) for name in file.shapes}


def of_torch(path):
    with TorchFile(path) as file:
        return {name: np.array(file.tensor(name)) for name in file.shapes}


def of_image(path):
    with open(path, "rb") as file:
        return {"pixels": decode(file.read(), PLAIN)[0]}


def of_manifest(path):
    source = records.open_records(epath.Path(path).parent, "train")
    batch = source.read(np.arange(len(source)))
    return batch | {"classes": source.manifest.classes, "counts": source.manifest.class_counts}


def of_vae_config(path):
    return {"module": repr(diffusers.read_config(epath.Path(path)))}


def of_run_config(path):
    return {"config": json.dumps(workdirs.read_config(epath.Path(path).parent))}


def contents(folder):
    """{kind: (name of the file, its bytes, reader, (start, end) of its payload)}."""
    rng = np.random.default_rng(0)
    write_zip(folder / "stored.zip", PETS, [[name, n % 3] for n, name in enumerate(PETS)])
    jpegs = {name.replace("png", "jpg"): encoded(image(n, 8, 8), "jpeg")
             for n, name in enumerate(PETS)}  # fmt: skip
    write_zip(folder / "packed.zip", jpegs, method=zipfile.ZIP_DEFLATED)
    write_parquet(folder / "x.parquet", PETS, [n % 2 for n in range(12)], ["cat", "dog"])
    arrays = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in "abc"}
    plain = safetensors.numpy.save(arrays, {"format": "pt"})
    data = plain[8 + int.from_bytes(plain[:8], "little") :]
    zeros = NO_DIGEST.encode()
    ours = safetensors.numpy.save(arrays, {"format": "pt", DIGEST: NO_DIGEST})
    ours = ours.replace(zeros, hashlib.sha256(ours[8:]).hexdigest().encode(), 1)
    for packed, name in ((False, "s.npz"), (True, "p.npz")):
        save = np.savez_compressed if packed else np.savez
        images = np.stack([image(n, 8, 8) for n in range(12)])
        save(folder / name, arr_0=images, arr_1=np.arange(12) % 3)
    np.savez(folder / "r.npz", mu=np.arange(6.0), sigma=np.eye(6), protocol=np.array('{"a": 1}'))
    prepare(write_folder(folder / "pics", PETS), name="d", data_dir=folder, workers=0)
    (shard,) = (folder / "d").glob("*.array_record")
    small_vae = (GOLDEN / "vae_small.config.json").read_bytes()
    header = 8 + int.from_bytes(ours[:8], "little")
    run = json.dumps({"model": {"name": "x", "depth": 2}, "seed": 0, "training": {}}).encode()
    png, jpeg = encoded(image(3, 16, 16)), encoded(image(3, 16, 16), "jpeg")
    parquet = (folder / "x.parquet").read_bytes()
    footer = len(parquet) - 8 - int.from_bytes(parquet[-8:-4], "little")
    tar = tar_bytes(PETS)

    def file(name):
        return (folder / name).read_bytes()

    pths = {name: (GOLDEN / name).read_bytes() for name in ("torch_zip.pth", "torch_legacy.pth")}
    return {
        "zip, stored": ("x.zip", file("stored.zip"), of_source, in_zip(file("stored.zip"))),
        "zip, deflated": ("x.zip", file("packed.zip"), of_source, in_zip(file("packed.zip"))),
        "tar": ("x.tar", tar, of_source, in_tar(tar)),
        "Parquet": ("x.parquet", parquet, of_source, [(4, footer)]),
        "npz, stored": ("x.npz", file("s.npz"), of_npz, in_zip(file("s.npz"))),
        "npz, deflated": ("x.npz", file("p.npz"), of_npz, in_zip(file("p.npz"))),
        "reference": ("x.npz", file("r.npz"), of_reference, in_zip(file("r.npz"))),
        "safetensors of ours": ("x.safetensors", ours, of_weights, [(header, len(ours))]),
        "safetensors of others": (
            "x.safetensors",
            plain,
            of_weights,
            [(len(plain) - len(data), len(plain))],
        ),
        ".pth, zip": ("x.pth", pths["torch_zip.pth"], of_torch, in_zip(pths["torch_zip.pth"])),
        ".pth, legacy": ("x.pth", pths["torch_legacy.pth"], of_torch, [(1000, 10**9)]),
        "PNG": ("x.png", png, of_image, [(41, len(png) - 16)]),
        "JPEG": ("x.jpg", jpeg, of_image, [(jpeg.index(b"\xff\xda"), len(jpeg) - 2)]),
        "manifest": ("d/train.manifest.json", file("d/train.manifest.json"), of_manifest, []),
        "records": (f"d/{shard.name}", shard.read_bytes(), of_manifest, [(0, 10**9)]),
        "autoencoder's config": ("v/config.json", small_vae, of_vae_config, []),
        "run's config": ("w/config.json", run, of_run_config, []),
    }  # fmt: skip


def in_zip(content):
    """Where a zip's entries have their data."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        places = []
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            places.append((start, start + entry.compress_size))
        return places


def in_tar(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [(member.offset_data, member.offset_data + member.size) for member in archive]


# --- Mutations

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(content, rng):
    """(another content, where it begins to differ)."""
    kind, place = rng.integers(7), int(rng.integers(len(content)))
    end = min(len(content), place + int(rng.integers(1, 64)))
    if kind == 0:
        return content[:place] + bytes([content[place] ^ (1 << rng.integers(8))]) + content[
            place + 1 :
        ], place
    if kind == 1:
        return content[:place], place
    if kind == 2:  # something is missing
        return content[:place] + content[end:], place
    if kind == 3:  # something is there twice
        return content[:end] + content[place:], end
    if kind == 4:
        size = int(rng.choice([2, 4, 8]))
        number = int(rng.choice(_NUMBERS)) % 256**size
        order = "little" if rng.integers(2) else "big"
        return content[:place] + number.to_bytes(size, order) + content[place + size :], place
    if kind == 5:
        return content[:place] + rng.bytes(end - place) + content[end:], place
    return content[:place] + bytes(end - place) + content[end:], place


def same(one, other):
    """Equal to the bit."""
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        one.tobytes() == other.tobytes()
        if one.dtype.kind != "O"
        else one.tolist() == other.tolist()
    )


def outcome(read, path, right):
    """(what became of a file, more of it)."""

    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        found = read(path)
    except (UserError, DecodeError) as error:
        text = str(error)
        return ("one line", text) if text and "\n" not in text else ("several lines", text)
    except TimeoutError:
        return "hang", ""
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if found.keys() != right.keys():
        return "other data", f"{sorted(found)[:5]}"
    broken = [name for name, one in found.items() if isinstance(one, Broken)]
    differing = [
        name for name, one in found.items() if name not in broken and not same(one, right[name])
    ]
    if differing:
        return "other data", ", ".join(differing[:3])
    return ("named", found[broken[0]]) if broken else ("right data", "")


def try_all(folder, count, seed=0, kinds=None):
    """Try `count` mutations of each kind: {kind: Counter of (part, outcome)}, and the faults."""
    made = contents(folder)
    tried, faults = {}, []
    for number, (kind, (name, content, read, payload)) in enumerate(made.items()):
        if kinds and kind not in kinds:
            continue
        rng = np.random.default_rng([seed, number])
        path = folder / "fuzz" / name
        if path.parent.exists():
            shutil.rmtree(path.parent)
        if name.startswith("d/"):
            shutil.copytree(folder / "d", path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        right, found = read(path), collections.Counter()
        for each in range(count):
            other, place = mutated(content, rng)
            if other == content:
                continue
            path.unlink()
            path.write_bytes(other)
            what, more = outcome(read, path, right)
            part = "payload" if any(a <= place < b for a, b in payload) else "structure"
            found[part, what] += 1
            if what in ("traceback", "hang", "several lines", "other data"):
                faults.append((kind, part, each, what, more[:150]))
        path.unlink()
        tried[kind] = found
    return tried, faults


# Kinds in which other data may come back unnoticed, with the reason.
UNCHECKED = {
    ("tar", "payload"): "no checksum of files in a tar; a PNG has its own",
    ("Parquet", "payload"): "checksums of pages are optional, and most writers leave them out",
    ("Parquet", "structure"): "names of classes stand in the footer, which has no checksum",
    ("safetensors of others", "payload"): "no checksum",
    ("safetensors of others", "structure"): "names and shapes in the header have no checksum",
    (".pth, legacy", "payload"): "no checksum",
    (".pth, legacy", "structure"): "no checksum",
    ("JPEG", "payload"): "no checksum",
    ("JPEG", "structure"): "tables have no checksum",
    ("manifest", "structure"): "text without a checksum (its shards have one)",
    ("autoencoder's config", "structure"): "text without a checksum",
    ("run's config", "structure"): "text without a checksum",
}
