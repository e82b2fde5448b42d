"""Images → shards of moments → the training step."""

import concurrent.futures
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import warm
from support.configs import small_token_config
from support.fid import save_tiny_vae
from support.images import encoded, image, pets, write_folder
from support.processes import ROOT, command, environment, free_port

from diffit_jax.data import records
from diffit_jax.data.records import ArraySpec, Manifest, Shard, open_records
from diffit_jax.errors import UserError
from diffit_jax.ingest import latent_statistics, shards
from diffit_jax.ingest.decoding import Preprocessing
from diffit_jax.ingest.encode import Encoding, encode
from diffit_jax.ingest.prepare import prepare
from diffit_jax.interop import diffusers
from diffit_jax.interop import dinov2 as interop
from diffit_jax.models.pretrained import resizing
from diffit_jax.runtime import parallel
from diffit_jax.sampling.encoder import ImageEncoder
from diffit_jax.training.train import train

COUNT, SIDE = 21, 16
RECORD = 4 + 2 * 8 * 8 * 8 * 2  # both orientations of 8×8 latents, float16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images (a broken one among them) and a narrow autoencoder."""
    folder = tmp_path_factory.mktemp("encode")
    names = pets(COUNT, width=SIDE, height=SIDE)
    names["cat/04.png"] = b""
    write_folder(folder / "pets", names)
    save_tiny_vae(folder / "vae")
    return folder


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Shards of five examples."""
    monkeypatch.setattr(shards, "MOST_BYTES", 5 * RECORD)


def encode_pets(place, data_dir, batch=1, **settings):
    more = {name: settings.pop(name) for name in ("split", "preprocessing") if name in settings}
    encoding = Encoding(place / "vae", batch_per_device=batch, **settings)
    return encode(
        place / "pets", name="pets", encoding=encoding, data_dir=data_dir, workers=0, **more
    )


@pytest.fixture(scope="module")
def whole(place):
    """The data set, from two devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MOST_BYTES", 5 * RECORD)
        encode_pets(place, place / "data")
    return place / "data/pets"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_moments_are_those_of_the_autoencoder(place, whole):
    """Of each image and its mirror image, one by one: 2e-5 of the largest, and half a unit of
    float16's last place; the broken image is named and its label not counted."""
    source = open_records(whole, "train")
    assert len(source) == COUNT - 1 and source.image_shape == (8, 8, 4) and source.num_classes == 2
    assert source.manifest.skipped == (("cat/04.png", "empty file"),)
    assert source.manifest.class_counts == (10, 10)
    batch = source.read(np.arange(COUNT - 1))
    assert batch["moments"].shape == (20, 2, 8, 8, 8) and batch["moments"].dtype == np.float16
    assert batch["label"].tolist() == [0] * 10 + [1] * 10
    module, variables = diffusers.load(place / "vae")
    numbers = [n for n in (*range(0, COUNT, 2), *range(1, COUNT, 2)) if n != 4]
    encode_one = jax.jit(lambda image: module.apply(variables, image, method="encode"))
    for number, moments in zip(numbers, batch["moments"], strict=True):
        x = image(number, SIDE, SIDE)[None].astype(np.float32) / 127.5 - 1
        for orientation, way in enumerate((x, x[:, :, ::-1])):
            expected = np.concatenate(encode_one(way), axis=-1)[0]
            error = np.abs(moments[orientation].astype(np.float32) - expected)
            unit = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32)
            assert (error <= unit / 2 + 2e-5 * np.abs(expected).max()).all()


def test_the_statistics_are_those_of_the_draws(whole):
    """Mean and standard deviation of what the posteriors give, against 200 draws of each latent:
    within four standard errors of so many."""
    source = open_records(whole, "train")
    moments = source.read(np.arange(len(source)))["moments"].astype(np.float64)
    mean, log_variance = np.split(moments, 2, axis=-1)
    noise = np.random.default_rng(0).normal(size=(200, *mean.shape))
    draws = (mean + np.exp(log_variance / 2) * noise).reshape(-1, 4)
    found = source.manifest.statistics
    std = np.exp(log_variance / 2).mean()
    np.testing.assert_allclose(found["mean"], draws.mean(0), atol=4 * std / np.sqrt(len(draws)))
    np.testing.assert_allclose(found["std"], draws.std(0), rtol=4 / np.sqrt(len(draws)))


def test_an_encode_that_is_cut_at_five_points_gives_the_same_bytes(place, whole, monkeypatch):
    add, interruptions = shards.ShardWriter.add, 0
    for limit in itertools.chain([0, 6, 3, 5, 9], itertools.repeat(100)):
        left = iter(range(limit))

        def add_or_end(writer, *arguments, left=left, **arrays):
            if next(left, None) is None:
                raise KeyboardInterrupt
            add(writer, *arguments, **arrays)

        monkeypatch.setattr(shards.ShardWriter, "add", add_or_end)
        try:
            encode_pets(place, place / "cut")
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 5 and contents(place / "cut/pets") == contents(whole)


def test_a_command_that_is_killed_goes_on(place, tmp_path):
    """By SIGKILL, with processes that decode; then on prepared data, which are the same."""
    prepare(place / "pets", name="images", data_dir=tmp_path / "data", workers=0)
    flags = ["--source", tmp_path / "data/images", "--name", "latents", "--vae", place / "vae"]
    flags += ["--data_dir", tmp_path / "data", "--batch_per_device", 1, "--workers", 1]
    script = [warm.python(), ROOT / "launch/encode.py", *flags]
    process = subprocess.Popen(list(map(str, script)), env=environment(), cwd=tmp_path)
    folder, deadline = tmp_path / "data/latents", time.monotonic() + 90
    while not list(folder.glob(".*.partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "train.manifest.json").exists()
    status, said = command("encode", *flags, cwd=tmp_path)
    assert status == 0 and "chips waiting" in said, said
    ours, theirs = (open_records(path, "train") for path in (folder, place / "data/pets"))
    for name, values in theirs.manifest.statistics.items():
        np.testing.assert_allclose(ours.manifest.statistics[name], values, rtol=1e-12)
    for name, array in ours.read(np.arange(20)).items():
        np.testing.assert_array_equal(array, theirs.read(np.arange(20))[name])


def moments_on(place, devices, batch):
    module, variables = diffusers.load(place / "vae")
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 1, 1), parallel.AXES)
    variables = jax.device_put(variables, parallel.replicated(mesh))
    encoder = ImageEncoder(module, variables, mesh, batch_per_device=batch)
    images = np.stack([image(number, SIDE, SIDE) for number in range(8)])
    size = encoder.batch_size
    return np.concatenate(
        [
            encoder.start(images[n : n + size]).result()[0]["moments"]
            for n in range(0, len(images), size)
        ]
    )


def test_devices_in_any_order_and_number_give_the_same_moments(place):
    """One, and two of which the second comes first; before rounding, within 2e-5 of the largest."""
    one, other = jax.devices()
    alone = moments_on(place, [one], 3)
    for devices, batch in [([one, other], 1), ([other, one], 2)]:
        moved = moments_on(place, devices, batch)
        assert np.abs(moved - alone).max() <= 2e-5 * np.abs(alone).max()


def test_two_processes_of_four_devices_write_the_same_data_set(place, whole, tmp_path):
    """Stored values within one unit in the last place of what two devices gave; nothing else
    differs."""
    port = free_port()
    flags = ["--source", place / "pets", "--name", "pets", "--vae", place / "vae"]
    flags += ["--data_dir", tmp_path, "--batch_per_device", 1, "--workers", 0]
    flags += ["--num_processes", 2, "--coordinator", f"127.0.0.1:{port}", "--process_id"]
    code = (
        f"import runpy, sys; from diffit_jax.ingest import shards; "
        f"shards.MOST_BYTES = {5 * RECORD}; "
        f"sys.argv[0] = '{ROOT}/launch/encode.py'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = [sys.executable, "-c", code, *map(str, flags)]
    both = [
        subprocess.Popen([*script, str(number)], env=environment(4), stderr=subprocess.PIPE)
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=240)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert not list((tmp_path / "pets").glob(".train.index"))
    ours, theirs = open_records(tmp_path / "pets", "train"), open_records(whole, "train")
    assert [shard.count for shard in ours.manifest.shards] == [4, 5, 5, 5, 1]
    assert ours.manifest.skipped == theirs.manifest.skipped
    one, other = (source.read(np.arange(20)) for source in (ours, theirs))
    np.testing.assert_array_equal(one["label"], other["label"])
    unit = np.spacing(np.abs(other["moments"]))
    difference = np.abs(one["moments"].astype(np.float32) - other["moments"].astype(np.float32))
    assert (difference <= unit).all()


def test_one_orientation_is_half_of_two(place, whole, tmp_path):
    manifest = encode_pets(place, tmp_path, orientations=1, stored="float32")
    assert manifest.arrays["moments"] == ArraySpec((1, 8, 8, 8), "float32")
    both = open_records(whole, "train").read(np.arange(20))["moments"]
    one = open_records(tmp_path / "pets", "train").read(np.arange(20))["moments"]
    np.testing.assert_array_equal(one[:, 0].astype(np.float16), both[:, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(preprocessing=Preprocessing("adm", 15)),
            "15×15 with 3 channels, the autoencoder takes 3",
        ),
        (dict(preprocessing=Preprocessing(channels=1)), "16×16 with 1 channels"),
        (dict(stored="int8"), "--stored int8 is unknown: use float16 or float32"),
        (dict(orientations=4), "--orientations is 4: use 1 or 2"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_the_first_write(
    place, tmp_path, settings, message
):
    with pytest.raises(UserError, match=message):
        encode_pets(place, tmp_path / "data", **settings)
    assert not list(tmp_path.iterdir())


def test_latents_of_another_autoencoder_do_not_go_into_the_same_data_set(place, whole, tmp_path):
    save_tiny_vae(tmp_path / "other", scaling_factor=0.5)
    with pytest.raises(UserError, match=r"of other data \(autoencoder"):
        encode_pets(place, place / "data", dtype="bfloat16")
    encoding = Encoding(tmp_path / "other", batch_per_device=1)
    with pytest.raises(UserError, match=r"of other data \(autoencoder"):
        encode(place / "pets", name="pets", encoding=encoding, data_dir=place / "data", workers=0)


def manifest_of(statistics, **changes):
    metadata = dict(
        arrays=records.layout(moments=ArraySpec((2, 32, 32, 8), "float16")),
        classes=tuple(map(str, range(1000))),
        count=1_281_167,
        class_counts=(),
        source={"split": "train"},
        crop={"crop": "adm", "size": 256},
        skipped=(),
        notes={},
        shards=(Shard("x", 1_281_167, ""),),
        autoencoder={"path": "hf://x/sd-vae-ft-mse"},
        statistics=statistics,
    )
    return Manifest(**(metadata | changes))


def test_statistics_of_imagenet_are_compared_with_the_published_ones():
    """At 256 px judged, at 512 px shown; of other data, crops and autoencoders neither."""
    published = latent_statistics.PUBLISHED[256]
    levels = lambda manifest: [level for level, _ in latent_statistics.lines(manifest)]
    mean, std = (np.array(published[name]) for name in ("mean", "std"))
    near = {"mean": (mean + 0.019 * std).tolist(), "std": (std * 1.019).tolist()}
    assert levels(manifest_of(near)) == [20, 20]
    for far in (
        near | {"mean": (mean + 0.021 * std * np.eye(4)[2]).tolist()},
        near | {"std": (std * [1, 0.979, 1, 1]).tolist()},
    ):
        assert levels(manifest_of(far)) == [20, 20, 30]
        text = latent_statistics.lines(manifest_of(far))[-1][1]
        assert "these are not the published latents" in text
        assert levels(manifest_of(far, crop={"crop": "adm", "size": 512})) == [20, 20]
        for changes in (
            dict(crop={"crop": "center", "size": 256}),
            dict(classes=("a", "b")),
            dict(count=50_000, shards=(Shard("x", 50_000, ""),)),
            dict(autoencoder={"path": "own-vae"}),
            dict(source={"split": "test"}),
        ):
            assert levels(manifest_of(far, **changes)) == [20]


def test_manifests_come_back_as_they_were(whole):
    manifest = records.read_manifest(whole, "train")
    assert Manifest.from_json(manifest.to_json()) == manifest
    said = json.loads((whole / "train.manifest.json").read_text())
    assert said["autoencoder"]["latent_scale"] == [0.18215] * 4
    assert said["autoencoder"]["contents"] and said["crop"]["crop"] == "none"


def test_not_finite_moments_name_their_images(place, tmp_path, monkeypatch):
    start = ImageEncoder.start

    def broken(encoder, images):
        arrays, when = start(encoder, images).result()
        moments, future = arrays["moments"], concurrent.futures.Future()
        bad = np.where(np.arange(len(moments)) == 0, np.nan, moments.T).T
        future.set_result(({"moments": bad}, when))
        return future

    monkeypatch.setattr(ImageEncoder, "start", broken)
    with pytest.raises(UserError, match=r"moments of cat/00.png are not finite: use --vae_dtype"):
        encode_pets(place, tmp_path)


@pytest.mark.parametrize("keep", ["image", "features"])
def test_pictures_or_features_are_kept_beside_moments(place, whole, keep, tmp_path, caplog):
    """Moments as without them; pictures as they are, features of both orientations; what an example
    takes is said before the work begins."""
    more = {"encoder": interop.DIGITS} if keep == "features" else {}
    with caplog.at_level("INFO"):
        encode_pets(place, tmp_path, keep=keep, **more)
    sizes = {"image": "image 0.768 kB", "features": "features 4.352 kB"}
    assert f"an example takes moments 2.048 kB, {sizes[keep]}" in caplog.text
    source = open_records(tmp_path / "pets", "train")
    batch, before = (each.read(np.arange(20)) for each in (source, open_records(whole, "train")))
    np.testing.assert_array_equal(batch["moments"], before["moments"])
    pictures = np.stack(
        [image(n, SIDE, SIDE) for n in (*range(0, 21, 2), *range(1, 21, 2)) if n != 4]
    )
    if keep == "image":
        np.testing.assert_array_equal(batch["image"], pictures)
        assert source.manifest.features == {}
        return
    assert batch["features"].shape == (20, 2, 17, 64) and batch["features"].dtype == np.float16
    module, variables = interop.load(interop.DIGITS, positions="antialiased")
    for turn, way in enumerate((pictures, pictures[:, :, ::-1])):
        seen = jax.jit(lambda way: resizing.RULES["repa"].apply(way, (56, 56)))(way)
        found = jax.jit(module.apply)(variables, seen)
        wanted = np.concatenate([found.class_BD[:, None], found.patches_BLD], axis=1)
        error = np.abs(batch["features"][:, turn].astype(np.float32) - wanted).max()
        assert error < 2e-5 * 10 + np.abs(wanted).max() * 2**-11
    assert source.manifest.features["grid"] == [4, 4]
    assert source.manifest.features["network"] == "digits"
    assert Manifest.from_json(source.manifest.to_json()) == source.manifest

    # Another network's tokens, or another encoder's, do not fit.
    config = small_token_config("repa", representation__source="features")
    config.data.name, config.data.data_dir = "pets", str(tmp_path)
    config.model.num_classes = 2
    assert int(train(config, workdir=tmp_path / "run").step) == config.training.total_steps
    config.representation.positions = "official"
    with pytest.raises(UserError, match=r"features of positions antialiased.*is official"):
        train(config, workdir=tmp_path / "other")
    config.representation.positions = "antialiased"
    config.model.patch_size = 4
    with pytest.raises(UserError, match=r"features of 1 \+ 16 tokens of 64 channels.*1 \+ 4 of 64"):
        train(config, workdir=tmp_path / "other")
    config.representation.source = "image"
    with pytest.raises(UserError, match=r"no image in its records.*--keep image"):
        train(config, workdir=tmp_path / "other")


def test_features_need_an_encoder(place):
    with pytest.raises(UserError, match="--keep features and --encoder go together"):
        Encoding(place / "vae", keep="features")


def test_encoded_has_no_small_images(place):
    """An image that has the size already needs no crop; another one does."""
    names = pets(12, width=SIDE, height=SIDE) | {"dog/99.png": encoded(image(0, 24, 16))}
    source = write_folder(place / "mixed", names)
    with pytest.raises(UserError, match=r"dog/99.png is 24×16, the first image is 16×16"):
        encode(
            source,
            name="mixed",
            encoding=Encoding(place / "vae"),
            data_dir=place / "data",
            workers=0,
        )
