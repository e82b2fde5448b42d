"""Images as people have them, small."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image


def image(number, width=40, height=32):
    """(height, width, 3) uint8: smooth, so that a JPEG keeps it, and another for each number."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + number + 2 * c) + np.cos(y / 7 - number * c) for c in range(3)]
    return np.rint(np.stack(waves, -1) * 60 + 128).astype(np.uint8)


def encoded(pixels, kind="png", **more):
    """The bytes of an image file."""
    content = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(content, kind, **more)
    return content.getvalue()


def pets(count=12, kind="png", **sizes):
    """{name: bytes} of `count` images in two classes, cats and dogs in turn."""
    return {
        f"{('cat', 'dog')[number % 2]}/{number:02d}.{kind}": encoded(
            image(number, **sizes), {"jpg": "jpeg"}.get(kind, kind)
        )
        for number in range(count)
    }


def write_folder(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, contents, labels=None, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def tar_bytes(contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def write_parquet(path, contents, labels, names=None, group=5):
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": content, "path": name} for name, content in contents.items()]
    table = pyarrow.table({"image": images, "label": pyarrow.array(labels, pyarrow.int64())})
    if names:
        feature = {"_type": "ClassLabel", "names": names}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def others_latents(path, means, count=24, labels=True):
    """A zip in the layout of EDM2 and REPA."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number in range(count):
        mean = rng.normal(size=(4, 8, 8)) * 4 + np.array(means)[:, None, None]
        std = np.exp(rng.normal(size=(4, 8, 8)) - 3)
        name = f"{number // 10:05d}/img-mean-std-{number:08d}.npy"
        arrays[name] = np.concatenate([mean, std]).astype(np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(name, "w") as entry:
                np.save(entry, array)
        table = [[name, number % 3] for number, name in enumerate(arrays)] if labels else None
        archive.writestr("dataset.json", json.dumps({"labels": table}))
    return arrays


def odd_images():
    """{name: (bytes, what it is to become)} of twenty images that are not as usual. What it
    becomes: text in the reason of a broken one, or (remarks, some of its pixels by (y, x))."""
    plain, big = image(3), Image.fromarray(image(3))
    grey16 = np.linspace(0, 65535, 32 * 40).reshape(32, 40).astype(np.uint16)
    palette = Image.new("P", (40, 32), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [0] * 759)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be shown
    red = Image.new("RGB", (40, 32), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 40, 4))  # a blue bar at the top, at the right when shown
    layered = Image.new("RGBA", (40, 32), (10, 20, 30, 0))
    layered.paste((10, 20, 30, 255), (0, 0, 20, 32))
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue")]
    cmyk = Image.new("CMYK", (40, 32), (0, 255, 255, 0))
    jpeg, png = encoded(plain, "jpeg"), encoded(plain)
    white, near_red = (255, 255, 255), (254, 0, 0)
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], ""),
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"<html>not found</html>", "cannot identify"),
        "noise.png": (bytes(range(256)) * 4, "cannot identify"),
        "header.png": (png[:8] + struct.pack(">I", 13) + b"IHDR", ""),
        "float.tif": (encoded(Image.fromarray(np.ones((32, 40), np.float32)), "tiff"), "mode F"),
        "cmyk.jpg": (encoded(cmyk, "jpeg"), (["CMYK"], {(9, 9): near_red})),
        "grey.png": (encoded(plain[..., 0]), (["grey"], {(9, 9): (plain[9, 9, 0],) * 3})),
        "bits.png": (encoded(big.convert("1")), (["grey"], {})),
        "deep.png": (
            encoded(Image.fromarray(grey16)),
            (["16-bit", "grey"], {(0, 0): (0, 0, 0), (31, 39): white, (16, 0): (128, 128, 128)}),
        ),
        "palette.png": (encoded(palette), (["palette"], {(0, 0): (255, 0, 0)})),
        "glass.png": (
            encoded(palette, transparency=1),
            (["transparent: on white"], {(0, 0): white}),
        ),
        "layered.png": (
            encoded(layered),
            (["transparent: on white"], {(0, 0): (10, 20, 30), (0, 39): white}),
        ),
        "film.gif": (
            encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
            (["animated: its first frame", "palette"], {(0, 0): (255, 0, 0)}),
        ),
        "wrong.JPEG": (png, (["misnamed"], {(5, 6): tuple(plain[5, 6])})),
        "turned.jpg": (
            encoded(red, "jpeg", exif=exif, quality=100, subsampling=0),
            (["turned upright by EXIF"], {(9, 29): (0, 0, 254), (9, 3): near_red}),
        ),
        "one.png": (encoded(plain[:1, :1]), (["enlarged"], {(0, 0): tuple(plain[0, 0])})),
        "ünï cödé 'quoted' \n%s.png": (png, ([], {(5, 6): tuple(plain[5, 6])})),
        "plain.webp": (encoded(plain, "webp", lossless=True), ([], {(5, 6): tuple(plain[5, 6])})),
    }


def discs(count, side=32):
    """(count, side, side, 3) uint8: a disc of some colour before another one, each its own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    centre, radius = (
        rng.uniform(0.25, 0.75, (2, count, 1, 1)),
        rng.uniform(0.1, 0.35, (count, 1, 1)),
    )
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    disc, ground = rng.integers(0, 256, (2, count, 1, 1, 3))
    return np.where(inside[..., None], disc, ground).astype(np.uint8)


def cifar10_archive(path, per_batch):
    """An archive like CIFAR-10's, with `per_batch` images in each of its five batches and in the
    test batch."""
    pixels = discs(6 * per_batch).transpose(0, 3, 1, 2).reshape(6, per_batch, -1)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {b"data": rows, b"labels": [number % 10 for number in range(per_batch)]}
        )
        for name, rows in zip(names, pixels, strict=True)
    }
    classes = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({b"label_names": classes})
    path.write_bytes(gzip.compress(tar_bytes(files)))
    return path
