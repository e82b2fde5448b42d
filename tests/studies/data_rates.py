"""How fast data are made and read on this machine; launch/PERFORMANCE.md has the figures.

    python tests/studies/data_rates.py [prepare] [load] [latents] [decode] [far]

prepare: 50,000 images of 32×32 in a zip → ArrayRecord, by two processes.
load: images a second that one core reads of what was prepared, in batches of 512.
latents: the same of ImageNet's latents, both flips, in batches of 64.
decode: full-size JPEGs (500×375 at quality 95, as ImageNet's are on average) → ADM's crop, a second
  and core.
far: a source that answers after 100 ms: 64 rows of 64 KiB each half second.
"""

import io
import sys
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffit_jax.data import records
from diffit_jax.data.records import RecordSource, open_records
from diffit_jax.data.sources import batches
from diffit_jax.ingest import shards
from diffit_jax.ingest.decoding import Preprocessing, decode
from diffit_jax.ingest.prepare import prepare


def small_images(folder: Path, count: int = 50_000) -> Path:
    path = folder / "images.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            content = io.BytesIO()
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(content, "png")
            archive.writestr(f"{number % 10}/{number:05d}.png", content.getvalue())
    return path


def measure_prepare(folder: Path) -> None:
    source = small_images(folder)
    started = time.monotonic()
    manifest = prepare(source, name="small", data_dir=folder, workers=2)
    print(f"prepare: {manifest.count} images in {time.monotonic() - started:.1f} s")


def measure_load(folder: Path) -> None:
    source = open_records(folder / "small", "train")
    rng = np.random.default_rng(0)
    started = time.process_time()
    for _ in range(100):
        source.read(rng.integers(0, len(source), 512))
    print(f"load: {100 * 512 / (time.process_time() - started):,.0f} images/s and core")


def measure_latents(folder: Path) -> None:
    for pixels, side in ((256, 32), (512, 64)):
        _write_latents(folder / f"{pixels}", 2_000, (2, side, side, 8))
        stream = batches(open_records(folder / f"{pixels}", "train"), 64, seed=0)
        next(stream)
        started = time.process_time()
        for _ in range(100):
            next(stream)
        rate = 100 * 64 / (time.process_time() - started)
        print(f"latents of {pixels} px: {rate:,.0f}/s and core")


def _write_latents(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    arrays = records.layout(moments=records.ArraySpec(shape, "float16"))
    plan = shards.Shards(folder, "train", count=count, arrays=arrays, identity={}, per_shard=100)
    plan.begin()
    for shard in range(plan.total):
        with plan.writing(shard) as writer:
            for _ in plan.numbers(shard):
                writer.add(0, moments=np.zeros(shape, np.float16))
    plan.finish(("x",), lambda _: {"source": {}, "crop": {}})


def measure_decode(_: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    image = coarse.resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.asarray(image).astype(int) + rng.integers(-12, 13, (375, 500, 3))
    content = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "jpeg", quality=95)
    for size in (256, 512):
        started = time.process_time()
        for _ in range(200):
            decode(content.getvalue(), Preprocessing("adm", size), "x.JPEG")
        rate = 200 / (time.process_time() - started)
        print(f"decode: {len(content.getvalue()) / 1e3:.0f} KB → {size} px: {rate:.0f}/s and core")


def measure_far(folder: Path) -> None:
    _write_latents(folder / "far", 2_000, (2, 32, 32, 16))  # 64 KiB
    fetch = RecordSource._fetch

    def far(source: RecordSource, path: str, rows: list[int]) -> list[bytes]:
        time.sleep(0.1 * len(rows))
        return fetch(source, path, rows)

    RecordSource._fetch = far  # pyright: ignore[reportAttributeAccessIssue]
    tracemalloc.start()
    stream = batches(open_records(folder / "far", "train"), 64, seed=0)
    next(stream)
    waited, started = 0.0, time.monotonic()
    for _ in range(40):
        time.sleep(0.5)  # a step
        asked = time.monotonic()
        next(stream)
        waited += time.monotonic() - asked
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    fraction = waited / (time.monotonic() - started)
    print(f"far: waiting {fraction:.2%} of 40 steps of 0.5 s; at most {peak:.0f} MB of batches")


def main() -> None:
    measures = {
        "prepare": measure_prepare,
        "load": measure_load,
        "latents": measure_latents,
        "decode": measure_decode,
        "far": measure_far,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or measures:
            measures[name](Path(folder))


if __name__ == "__main__":
    main()
