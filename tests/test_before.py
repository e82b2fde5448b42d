"""What the code at commit 1aaf366 left behind is continued, read and scored as that code would have
done it (tests/golden/before/README.md)."""

import hashlib
import json
import zipfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from support.fid import save_inception
from support.golden import GOLDEN
from support.images import image, pets, write_folder

from diffit_jax.data.records import open_records
from diffit_jax.evaluation.evaluate import evaluate
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import Extractor
from diffit_jax.ingest import shards
from diffit_jax.ingest.prepare import prepare
from diffit_jax.run import workdir as workdirs
from diffit_jax.runtime import parallel
from diffit_jax.sampling.convert import workdir_to_weights
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.sampling.sampler import Sampler
from diffit_jax.training.train import train

BEFORE = GOLDEN / "before"


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """All that was left, and what that code went on to make of it."""
    folder = tmp_path_factory.mktemp("before")
    with zipfile.ZipFile(BEFORE / "work.zip") as archive:
        archive.extractall(folder)
    with np.load(BEFORE / "expected.npz") as arrays:
        return folder, {name: arrays[name] for name in arrays.files}


def continued(workdir):
    """The run after three more updates."""
    config = workdirs.read_config(workdir)
    config["training"]["total_steps"] = 6
    return train(ConfigDict(config), workdir=workdir)


def arrays_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"]


def assert_close(latents, expected):
    """To a few units in the last place of the largest: an untrained network makes large ones."""
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_samples_that_are_there_are_not_drawn_again(before, monkeypatch):
    folder, _ = before
    monkeypatch.setattr(Sampler, "draw_batch", None)
    record = json.loads((folder / "image/samples_6x8x8x1.json").read_text())
    assert sample(folder / "image", seeds=range(6)).name == record["samples"]


def test_parts_of_samples_are_completed(before, monkeypatch):
    """Four of eight are there; pixels may fall to either side of a level."""
    folder, expected = before
    drawn, draw = [], Sampler.draw_batch
    monkeypatch.setattr(
        Sampler,
        "draw_batch",
        lambda self, variables, seeds, *more: (
            drawn.extend(seeds) or draw(self, variables, seeds, *more)
        ),
    )
    path = sample(folder / "image", seeds=range(8), overrides={"guidance.scale": 2.0})
    assert drawn == [4, 5, 6, 7]
    difference = arrays_of(path).astype(int) - expected["samples of scale 2"]
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 0.02


def test_a_partial_measurement_is_completed(before, tmp_path, monkeypatch):
    """Four of six images are measured: the last two are, the digest is that of all six. (By
    another version of jax all are.)"""
    folder, _ = before
    expected = json.loads((BEFORE / "expected.json").read_text())
    samples = folder / "image/samples_6x8x8x1.npz"
    begun = samples.with_name("samples_6x8x8x1.metrics.json.begun.npz")
    with np.load(begun) as arrays:
        state = {name: arrays[name] for name in arrays.files}
    made_there = json.loads(str(state["identity"]))
    path, jaxs = made_there[0]["samples"], made_there[0]["versions"]["jax"]
    state["identity"] = np.array(str(state["identity"]).replace(path, str(samples)))
    np.savez(begun, **state)
    measured, call = [], Extractor.__call__
    monkeypatch.setattr(
        Extractor,
        "__call__",
        lambda self, images: measured.append(len(images)) or call(self, images),
    )
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(256), sigma=np.eye(256))
    scores = evaluate(
        samples,
        comparison=Comparison(
            reference,
            save_inception(tmp_path / "fid.safetensors"),
            ["inception_score"],
            batch_per_device=1,
        ),
    )
    assert sum(measured) == (2 if jax.__version__ == jaxs else 6)
    assert scores["protocol"]["samples_digest"] == expected["digest"]
    np.testing.assert_allclose(
        scores["metrics"]["inception_score"], expected["metrics"]["inception_score"], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["image", "latent"])
def test_runs_are_continued(before, name):
    """Three updates later parameters differ by less than a thousandth of an update's size, which
    grows to 1e-3."""
    folder, expected = before
    state = continued(folder / name)
    ours = {
        parallel.path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    theirs = {
        key.removeprefix(f"{name}/"): value
        for key, value in expected.items()
        if key.startswith(f"{name}/")
    }
    assert ours.keys() == theirs.keys() and int(state.step) == 6
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-6, err_msg=key)


def test_an_average_is_made_of_old_and_new_snapshots(before, tmp_path):
    folder, expected = before
    run = Run(folder / "latent", ema_length=0.07)
    latents = arrays_of(sample(run, seeds=range(4), output=tmp_path / "ema.npz"))
    assert_close(latents, expected["latents of length 0.07"])


def test_exported_weights_are_read_and_written_alike(before, tmp_path):
    """The same file again from step 3, and the samples that the run drew there."""
    folder, expected = before
    config = workdirs.read_config(folder / "latent")
    weights = Weights(folder / "latent.safetensors", config)
    latents = arrays_of(sample(weights, seeds=range(4), output=tmp_path / "weights.npz"))
    assert_close(latents, expected["latents"])
    with zipfile.ZipFile(BEFORE / "work.zip") as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if n.startswith("latent/")])
    workdir_to_weights(tmp_path / "latent", weights=tmp_path / "again.safetensors")
    # The header says more now: of which run it is.
    files = tmp_path / "again.safetensors", folder / "latent.safetensors"
    again, there = (load_file(file) for file in files)
    assert again.keys() == there.keys()
    for name, tensor in there.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_records_are_read(before):
    folder, _ = before
    images = open_records(folder / "data/pets", "train").read(np.arange(12))
    assert images["image"].shape == (12, 8, 8, 3) and images["image"].dtype == np.uint8
    moments = open_records(folder / "data/pets_latents", "train").read(np.arange(12))
    assert moments["moments"].shape == (12, 2, 4, 4, 8) and moments["moments"].dtype == np.float16
    assert moments["label"].tolist() == images["label"].tolist() == [0] * 6 + [1] * 6
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # cats, then dogs
    np.testing.assert_array_equal(images["image"], [image(n, 8, 8) for n in order])
    expected = json.loads((BEFORE / "expected.json").read_text())["moments_sha256"]
    assert hashlib.sha256(moments["moments"].tobytes()).hexdigest() == expected


def test_a_data_set_that_was_begun_is_completed(before, tmp_path, monkeypatch):
    """One of three shards is there. All end as those of the data set that was made in one go, byte
    for byte."""
    folder, _ = before
    monkeypatch.setattr(shards, "MOST_BYTES", 5 * (4 + 8 * 8 * 3))
    source = write_folder(tmp_path / "pets", pets(12, width=8, height=8))
    there = (folder / "data/begun/train-00000-of-00003.array_record").stat().st_mtime_ns
    prepare(source, name="begun", data_dir=folder / "data", workers=0)
    for whole in sorted((folder / "data/pets").glob("*.array_record")):
        assert whole.read_bytes() == (folder / "data/begun" / whole.name).read_bytes()
    again = (folder / "data/begun/train-00000-of-00003.array_record").stat().st_mtime_ns
    assert again == there
