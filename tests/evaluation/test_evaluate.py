"""`evaluate` and its references, with a FID network of an eighth of the width."""

import functools
import io
import json
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from support import warm
from support.commands import assert_one_line_error, launch
from support.fid import save_inception, save_vae
from support.images import tar_bytes, write_folder, write_parquet, write_zip
from support.processes import ROOT, at_question, environment, free_port

from diffit_jax.data.sources import ArraySource
from diffit_jax.errors import UserError
from diffit_jax.evaluation import measuring
from diffit_jax.evaluation.classes import diversity
from diffit_jax.evaluation.evaluate import evaluate, table
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import Extractor, Features, Networks
from diffit_jax.evaluation.images import DatasetImages, NpzImages, open_samples
from diffit_jax.evaluation.make_reference import make_reference
from diffit_jax.evaluation.reference import Reference
from diffit_jax.evaluation.self_test import Published, self_test
from diffit_jax.runtime import distributed, interruption, parallel
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.request import Run, SamplingOptions
from diffit_jax.sampling.sample import sample

ALL = ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
BATCH = 8
COMPARED = ("metrics", "resize", "batch_per_device", "by_class")
DRAWN = ("labels", "overrides", "decoding")


def images(count, seed, side=20):
    """Smooth coloured noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, side // 4, side // 4, 3)).astype(np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


pytestmark = pytest.mark.usefixtures("one_extractor_each")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with weights, samples, a data set and its reference."""
    folder = tmp_path_factory.mktemp("fid")
    save_inception(folder / "inception.safetensors")
    np.savez(folder / "samples.npz", arr_0=images(19, 0), arr_1=np.arange(19) % 5)
    np.savez(folder / "data.npz", arr_0=images(30, 1))
    reference(folder, open_samples(folder / "data.npz"), "reference.npz", kept=12)
    return folder


def reference(folder, of, name, **more):
    weights = folder / "inception.safetensors"
    networks = Networks(weights)
    return make_reference(
        of, output=folder / name, networks=networks, batch_per_device=BATCH, **more
    )


def measured(folder, samples="samples.npz", against="reference.npz", **more):
    path = folder / samples if isinstance(samples, str) else samples
    weights = folder / "inception.safetensors"
    how = {"batch_per_device": BATCH}
    how |= {name: more.pop(name) for name in COMPARED if name in more}
    options = SamplingOptions(**{name: more.pop(name) for name in DRAWN if name in more})
    comparison = Comparison(folder / against, weights, **how)
    return evaluate(path, comparison=comparison, options=options, **more)


def test_a_data_set_against_itself(place, tmp_path):
    scores = measured(place, "data.npz", metrics=ALL, output=tmp_path / "m.json")["metrics"]
    assert list(scores) == [*ALL, "kid_std"]
    # Of float32 features of size 1: 1e-6 of the trace.
    assert scores["fid"] == pytest.approx(0, abs=1e-6) and scores["sfid"] < 1e-4
    assert scores["recall"] == 1  # its images are twelve of the thirty
    assert 1 <= scores["inception_score"] < 1.1


def test_the_reference_holds_statistics_and_evenly_spaced_images(place):
    with np.load(place / "reference.npz") as made:
        chosen = np.linspace(0, 29, 12).astype(int)
        np.testing.assert_array_equal(made["arr_0"], images(30, 1)[chosen])
        assert made["mu"].shape == (256,) and made["sigma"].shape == (256, 256)
        assert made["mu_s"].shape == (2023,) and made["sigma"].dtype == np.float64
        said = json.loads(str(made["protocol"]))
    assert said["count"] == 30 and said["resize"] == "tf1" and said["samples"].endswith("data.npz")


def test_what_is_written(place):
    scores = measured(place)
    assert scores == json.loads((place / "samples.metrics.json").read_text())
    assert list(scores["metrics"]) == ALL[:-1] and scores["count"] == 19
    protocol = scores["protocol"]
    assert protocol["resize"] == "tf1" and protocol["precision"] == "float32, highest"
    assert protocol["labels"] == "balanced over 5 classes" and protocol["device"]
    assert len(protocol["inception"]) == 32 and len(protocol["reference"]["sha256"]) == 64
    assert protocol["reference"]["pictures"] == 12
    assert protocol["reference"]["from"]["count"] == 30
    with pytest.raises(UserError, match=r"holds the scores of .*samples\.npz.*--overwrite"):
        measured(place, "data.npz", output=place / "samples.metrics.json")


def test_samples_are_compared_class_by_class(place, tmp_path):
    """Against a reference of a data set with labels; its statistics are those without."""
    labels = (np.arange(30) % 3).astype(np.int32)
    source = ArraySource(images(30, 1), labels, 3)
    reference(place, DatasetImages(source, "data"), "labelled.npz")
    with np.load(place / "labelled.npz") as made:
        np.testing.assert_array_equal(made["arr_1"], labels)
    np.savez(tmp_path / "s.npz", arr_0=images(21, 0), arr_1=np.arange(21) % 3)
    found = measured(place, tmp_path / "s.npz", "labelled.npz", metrics=["fid"], by_class=True)
    assert list(found["metrics"]) == ["fid"] and list(found["by_class"]["classes"]) == list("012")
    assert found == json.loads((tmp_path / "s.metrics.json").read_text())
    assert "diversity" in table(found)
    networks = Networks(place / "inception.safetensors")
    extractor = Extractor.load(networks, parallel.any_mesh(), BATCH)
    sets = open_samples(tmp_path / "s.npz"), DatasetImages(source, "data")
    ours, theirs = (
        measuring.measure(one, extractor, "again", pooled=True).features() for one in sets
    )
    one = found["by_class"]["classes"]["1"]
    assert one["diversity"] == pytest.approx(diversity(ours[1::3]), rel=1e-5)
    assert one["diversity_reference"] == pytest.approx(diversity(theirs[1::3]), rel=1e-5)
    with pytest.raises(UserError, match=r"has no labels of its images \(arr_1\)"):
        measured(place, tmp_path / "s.npz", by_class=True, output=tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_images_in_a_folder_are_the_same(place, tmp_path):
    for number, image in enumerate(images(19, 0)):
        folder = tmp_path / "pngs" / f"{number // 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    scores = measured(place, tmp_path / "pngs", metrics=["fid", "sfid"])
    expected = measured(place, metrics=["fid", "sfid"], output=tmp_path / "m.json")
    assert scores["metrics"] == expected["metrics"]
    assert scores["protocol"]["samples_digest"] == expected["protocol"]["samples_digest"]
    assert (tmp_path / "pngs.metrics.json").exists()


def test_what_trains_can_be_measured(place, tmp_path):
    """The images of `prepare`'s containers, whatever kind their files are, in one order."""
    shots = {}
    for number, image in enumerate(images(19, 0)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, ("PNG", "BMP", "TIFF", "PPM")[number % 4])
        shots[f"{number:02}{('.png', '.BMP', '.tif', '.ppm')[number % 4]}"] = file.getvalue()
    write_folder(tmp_path / "kinds", shots | {"notes.txt": b"", ".hidden.png": b""})
    write_zip(tmp_path / "kinds.zip", shots)
    (tmp_path / "kinds.tar").write_bytes(tar_bytes(shots))
    write_parquet(tmp_path / "kinds.parquet", shots, [-1] * 19)
    expected = list(open_samples(place / "samples.npz").batches(7, 5))
    for name in ("kinds", "kinds.zip", "kinds.tar", "kinds.parquet"):
        setup = open_samples(epath.Path(tmp_path / name))
        assert setup.count == 19
        for ours, theirs in zip(setup.batches(7, 5), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    (tmp_path / "kinds/03.ppm").write_bytes(b"P6")
    with pytest.raises(UserError, match=r"--samples: .*kinds/03.ppm is not an image that can be"):
        list(open_samples(epath.Path(tmp_path / "kinds")).batches(4))
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "kinds/03.ppm")
    with pytest.raises(
        UserError, match=r"kinds/03.ppm is \(3, 4\), others are \(20, 20\): all images"
    ):
        list(open_samples(epath.Path(tmp_path / "kinds")).batches(4))


def test_the_number_of_devices_changes_no_bit(place):
    """Of features; what follows them is the same on every host."""

    def features(devices):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        networks = Networks(place / "inception.safetensors", dinov2="digits")
        extract = Extractor.load(networks, mesh, batch_per_device=4)
        parts = NpzImages(place / "samples.npz").batches(4 * devices)
        return [np.concatenate(arrays) for arrays in zip(*map(extract, parts), strict=True)]

    for one, other in zip(features(1), features(2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_samples_of_a_network_are_those_of_its_file(place, latent_run, tmp_path):
    vae = save_vae(tmp_path / "sd-vae-ft-ema")
    path = sample(latent_run[0], seeds=range(6), output=tmp_path / "s.npz", decoding=Decoding(vae))
    made = reference(place, open_samples(path), str(tmp_path / "r.npz"))
    again = dict(metrics=["fid", "precision"], against=made)
    from_file = measured(place, path, **again)
    drawn = measured(
        place,
        Run(latent_run[0]),
        count=6,
        decoding=Decoding(vae),
        output=tmp_path / "d.json",
        **again,
    )
    assert drawn["metrics"] == from_file["metrics"] and drawn["metrics"]["precision"] == 1
    of_file, of_run = from_file["protocol"], drawn["protocol"]
    assert of_file["samples_digest"] == of_run["samples_digest"]
    assert of_run["seeds"] == "0-5" and of_run["uint8_rule"] == of_file["uint8_rule"] == "edm"
    assert of_run["request"]["identity"] == of_file["request"]["identity"]
    with pytest.raises(UserError, match=r"makes latents, which have no FID.*--vae"):
        measured(place, Run(latent_run[0]), count=6, output=tmp_path / "e.json", **again)


def test_the_lowest_fid_of_several_seeds(place, run, tmp_path, monkeypatch):
    """EDM's protocol. Interrupted in the second set, the first is not measured again."""
    np.savez(tmp_path / "d.npz", arr_0=images(12, 1, side=8)[..., :1])
    made = reference(place, open_samples(tmp_path / "d.npz"), str(tmp_path / "r.npz"))
    of_run = functools.partial(measured, place, Run(run[0]), made, metrics=["fid"])
    sets = [range(18), range(18, 36), range(36, 54)]
    alone = of_run(seeds=sets[1:2], output=tmp_path / "one.json")
    calls, call = [], Extractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with monkeypatch.context() as interrupted:
        notice = distributed.PreemptionNotice
        interrupted.setattr(notice, "reached", lambda self: len(calls) == 3)
        with pytest.raises(interruption.Preempted):
            of_run(seeds=sets, output=tmp_path / "m.json")
    scores = of_run(seeds=sets, output=tmp_path / "m.json")
    assert sum(calls) == 54 and sorted(path.name for path in tmp_path.glob("m.*")) == ["m.json"]
    assert [one["seeds"] for one in scores["sets"]] == ["0-17", "18-35", "36-53"]
    fids = [one["metrics"]["fid"] for one in scores["sets"]]
    assert scores["sets"][1]["metrics"] == alone["metrics"]
    lowest = scores["sets"][int(np.argmin(fids))]
    assert scores["metrics"] == lowest["metrics"] and scores["protocol"]["seeds"] == lowest["seeds"]
    assert len(set(fids)) == 3 and json.loads((tmp_path / "m.json").read_text()) == scores
    assert f"FID of seeds 18-35{'':15}{fids[1]:12.5f}" in table(scores)
    with pytest.raises(UserError, match="the lowest FID counts: add fid to --metrics"):
        measured(place, Run(run[0]), made, metrics=["sfid"], seeds=sets, output=tmp_path / "n.json")
    with pytest.raises(UserError, match="--seeds goes with a network"):
        measured(place, seeds=sets)
    with pytest.raises(UserError, match="--seeds and --count both say how many"):
        of_run(seeds=sets, count=3)


def test_what_was_measured_survives_an_interruption(place, tmp_path, monkeypatch):
    """The same command goes on behind the second batch and ends as if nothing had been."""
    whole = measured(place, metrics=ALL, output=tmp_path / "whole.json")
    calls, call = [], Extractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    size = Extractor.load(
        Networks(place / "inception.safetensors"), parallel.any_mesh(), BATCH // 4
    ).batch_size
    with monkeypatch.context() as interrupted:
        notice = distributed.PreemptionNotice
        interrupted.setattr(notice, "reached", at_question(2))
        with pytest.raises(interruption.Preempted, match=f"{2 * size} of 19 images are measured"):
            measured(place, metrics=ALL, output=tmp_path / "m.json", batch_per_device=BATCH // 4)
    assert not (tmp_path / "m.json").exists()
    before = len(calls)
    scores = measured(place, metrics=ALL, output=tmp_path / "m.json", batch_per_device=BATCH // 4)
    of_samples = calls[before : before + -(-(19 - 2 * size) // size)]
    assert sum(of_samples) == 19 - 2 * size
    assert scores["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)
    assert [path.name for path in tmp_path.glob("m.*")] == ["m.json"]


def test_references_that_do_not_fit(place, tmp_path):
    rng = np.random.default_rng(0)
    square = np.eye(256)
    files = {
        "edm": dict(mu=np.zeros(256), sigma=square),
        "wide": dict(mu=np.zeros(2048), sigma=np.eye(2048)),
        "images": dict(arr_0=images(5, 2)),
        "large": dict(mu=np.zeros(256), sigma=square, arr_0=images(5, 2, side=24)),
        "nothing": dict(images=rng.random(3)),
    }
    for name, content in files.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    (tmp_path / "text.npz").write_text("no archive")
    cases = (
        ("edm", ["sfid"], r"edm\.npz has no mu_s, which sfid needs: leave sfid out"),
        ("edm", ["recall"], "has no arr_0, which recall needs"),
        ("wide", None, r"mu \(2048,\) and sigma \(2048, 2048\), not of the 256 features"),
        ("images", ["fid"], "its 5 images are for precision and recall; statistics are of a"),
        ("large", None, "is of 24 × 24 pixels, the samples have 20 × 20"),
        ("nothing", None, "has none of mu, mu_s and arr_0"),
        ("text", None, "is not an npz file of statistics"),
        ("none", None, "cannot be read"),
        ("edm", ["fid", "is"], "--metrics has 'is': use fid, sfid"),
    )
    for name, metrics, message in cases:
        with pytest.raises(UserError, match=message):
            measured(
                place, against=tmp_path / f"{name}.npz", metrics=metrics, output=tmp_path / "m.json"
            )
    with pytest.raises(UserError, match="made with --resize tf1: use the same"):
        measured(place, resize="pytorch_fid", output=tmp_path / "m.json")
    scores = measured(place, against=tmp_path / "edm.npz", output=tmp_path / "m.json")
    assert list(scores["metrics"]) == ["fid", "inception_score"]


def test_samples_that_cannot_be_measured(place, tmp_path):
    good = images(6, 3)
    broken = np.where(np.arange(6)[:, None, None, None] % 3 == 1, np.nan, good / 127.5 - 1)
    files = {
        "first": dict(arr_0=good.transpose(0, 3, 1, 2)),
        "flat": dict(arr_0=good.reshape(6, -1)),
        "latents": dict(arr_0=np.zeros((6, 8, 8, 4), np.float32)),
        "broken": dict(arr_0=broken.astype(np.float32)),
        "other": dict(images=good),
        "one": dict(arr_0=good[:1]),
    }
    for name, content in files.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    cut = (tmp_path / "other.npz").read_bytes()[:500]
    (tmp_path / "cut.npz").write_bytes(cut)
    (tmp_path / "folder").mkdir()
    (tmp_path / "sizes").mkdir()
    for side in (20, 24):
        Image.fromarray(images(1, 0, side)[0]).save(tmp_path / "sizes" / f"{side}.png")
    cases = (
        ("first.npz", r"\(6, 3, 20, 20\), which has the channels first"),
        ("flat.npz", r"shape \(6, 1200\), which is not \(N, H, W, C\)"),
        ("latents.npz", "float32 from 0 to 0.*to be decoded first: sample with --vae"),
        (
            "broken.npz",
            r"float32 from -1 to 0\.969, not of uint8.*2 of them are not finite \(1,4\)",
        ),
        ("other.npz", "has no arr_0"),
        ("cut.npz", "is not a whole npz file"),
        ("none.npz", "cannot be read"),
        ("one.npz", "one sample has no covariance"),
        ("folder", "has no images"),
        ("sizes", r"24\.png is \(24, 24\), others are \(20, 20\)"),
    )
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            measured(place, tmp_path / name)
    with pytest.raises(UserError, match="has 19 samples, --count asks for 20"):
        measured(place, count=20)
    assert not list(tmp_path.glob("*.json"))


def test_a_reference_is_no_data_set(place):
    with pytest.raises(UserError, match="reference already: its 12 images are for precision"):
        reference(place, open_samples(place / "reference.npz"), "again.npz")
    with pytest.raises(UserError, match=r"is there already.*--overwrite"):
        reference(place, open_samples(place / "data.npz"), "reference.npz")


def test_published_figures(place, tmp_path):
    """With a stand-in for the published files: the figures that were found, and others."""
    for name in ("samples.npz", "reference.npz"):
        (tmp_path / name).symlink_to(place / name)
    found = measured(place, output=tmp_path / "m.json")["metrics"]
    for error, passed in ((0.004, True), (0.006, False)):
        figures = found | {"fid": found["fid"] + error}
        (row,) = self_test(
            tmp_path,
            inception=place / "inception.safetensors",
            published=(Published("samples.npz", "reference.npz", figures),),
            batch_per_device=BATCH,
        )
        assert row["passed"] is passed and set(row["metrics"]) == set(found)
    with pytest.raises(UserError, match=r"fetch admnet_guided_upsampled_imagenet256\.npz and"):
        self_test(tmp_path, inception=place / "inception.safetensors")


def test_two_processes_of_four_devices(place, tmp_path):
    """The same figures, to 1e-9, as two devices of one process give. (Of fewer than eight images
    this narrow network has so few outputs that a CPU of more threads divides sums among them.)"""
    port = free_port()
    flags = ["--samples", place / "samples.npz", "--output", tmp_path / "m.json"]
    flags += ["--reference", place / "reference.npz", "--inception_batch", BATCH]
    flags += ["--inception", place / "inception.safetensors", "--num_processes", 2]
    flags += ["--coordinator", f"127.0.0.1:{port}", "--process_id"]
    script = [warm.python(), str(ROOT / "launch" / "evaluate.py"), *map(str, flags)]
    both = [
        subprocess.Popen([*script, str(number)], env=environment(4), stderr=subprocess.PIPE)
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=240)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    scores = json.loads((tmp_path / "m.json").read_text())
    expected = measured(place, output=tmp_path / "n.json")
    assert scores["protocol"]["devices"] == 8
    assert scores["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)


def test_flags_that_do_not_go_together(place, tmp_path):
    flags = ["--samples", place / "samples.npz", "--reference", place / "reference.npz"]
    both = launch("evaluate", *flags, "--workdir", tmp_path, tmp_path=tmp_path)
    assert_one_line_error(both, "exactly one of --samples, --workdir, --weights is needed")
    assert_one_line_error(launch("evaluate", *flags, tmp_path=tmp_path), "--inception is missing")
    drawn = launch("evaluate", *flags, "--guidance.scale", "2", tmp_path=tmp_path)
    assert_one_line_error(drawn, "--guidance.scale goes with --workdir or --weights")


def test_grey_images_count_as_three_equal_channels(place, tmp_path):
    grey = images(7, 4)[..., :1]
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    np.savez(tmp_path / "colour.npz", arr_0=grey.repeat(3, axis=-1))
    one, other = (
        measured(place, tmp_path / f"{name}.npz", metrics=["fid"]) for name in ("grey", "colour")
    )
    assert one["metrics"] == other["metrics"]


def test_partial_measurements_of_others_are_not_taken(tmp_path):
    """Of other samples, or with other settings: they are measured from the beginning."""
    begun = measuring.PartialResult(tmp_path / "b.npz", "one")
    kept = measuring.Measured(pooled=True)
    kept.add(images(3, 0), Features(*np.ones((3, 3, 4), np.float32)))
    begun.save(kept)
    same, other = measuring.Measured(True), measuring.Measured(True)
    begun.restore(same)
    measuring.PartialResult(tmp_path / "b.npz", "other").restore(other)
    assert same.count == 3 and other.count == 0 and same.digest == kept.digest
    np.testing.assert_array_equal(same.features(), kept.features())


def test_a_reference_knows_its_metrics(place):
    found = Reference.load(place / "reference.npz", {"mu": 256, "mu_s": 2023})
    assert found.chosen(None) == ALL[:-1]
    assert found.chosen(["kid", "fid", "kid"]) == ["kid", "fid"]


def interrupted(monkeypatch, question, act):
    with monkeypatch.context() as patch:
        patch.setattr(distributed.PreemptionNotice, "reached", at_question(question))
        with pytest.raises(interruption.Preempted, match="are measured and kept"):
            act()


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_samples_that_were_replaced_meanwhile_are_measured_anew(place, tmp_path, monkeypatch, kind):
    """Under the same name and of the same number: nothing of the others stays."""

    def write(seed):
        if kind == "npz":
            np.savez(tmp_path / "s.npz", arr_0=images(19, seed))
            return tmp_path / "s.npz"
        for number, one in enumerate(images(19, seed)):
            (tmp_path / "s").mkdir(exist_ok=True)
            Image.fromarray(one).save(tmp_path / "s" / f"{number:02}.bmp")  # of equal sizes
        return tmp_path / "s"

    how = dict(metrics=["fid"], output=tmp_path / "m.json", batch_per_device=BATCH // 4)
    interrupted(monkeypatch, 2, lambda: measured(place, write(0), **how))
    found = measured(place, write(7), **how)
    how["output"] = tmp_path / "alone.json"
    assert found["metrics"] == measured(place, tmp_path / write(7).name, **how)["metrics"]


def test_an_interrupted_reference_is_gone_on_with(place, tmp_path, monkeypatch):
    """Equal to the bit, the images for precision and recall too."""
    samples = open_samples(place / "data.npz")
    (tmp_path / "inception.safetensors").symlink_to(place / "inception.safetensors")
    interrupted(monkeypatch, 1, lambda: reference(tmp_path, samples, "r.npz", kept=12))
    assert [path.name for path in tmp_path.glob("*.npz")] == ["r.npz.begun.npz"]
    reference(tmp_path, samples, "r.npz", kept=12)
    with np.load(tmp_path / "r.npz") as ours, np.load(place / "reference.npz") as whole:
        for name in whole.files:
            np.testing.assert_array_equal(ours[name], whole[name])
    assert [path.name for path in tmp_path.glob("*.npz")] == ["r.npz"]


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_refused(place, tmp_path, name, bad):
    with np.load(place / "reference.npz") as file:
        arrays = dict(file)
    arrays[name].flat[3] = bad
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=rf"has 1 numbers in {name} that are not finite"):
        measured(place, against=tmp_path / "r.npz", output=tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_a_score_that_is_no_number_is_no_result(place, tmp_path, monkeypatch):
    call = Extractor.__call__

    def broken(self, batch):
        features = call(self, batch)
        return features._replace(pool=features.pool * np.nan)

    monkeypatch.setattr(Extractor, "__call__", broken)
    with pytest.raises(UserError, match=r"fid came out as nan|not finite"):
        measured(place, metrics=["fid"], output=tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_fid_of_few_samples_is_said_to_be_high(place, tmp_path, caplog):
    measured(place, metrics=["fid"], output=tmp_path / "m.json")
    assert "FID of 19 samples in 256 features is far above that of many" in caplog.text


def test_folders_are_measured_by_the_rules_of_prepare(place, tmp_path):
    """On white where transparent, upright by EXIF, without a Mac's shadows of files."""
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "x").mkdir()
    for number, one in enumerate(images(12, 0)):
        layered = np.dstack([one, np.zeros(one.shape[:2], np.uint8)])
        Image.fromarray(layered).save(tmp_path / "x" / f"{number:02}.png")
    Image.fromarray(images(1, 3)[0]).save(tmp_path / "x/z.tif", exif=exif)
    (tmp_path / "x/._00.png").write_bytes(b"of a Mac")
    (tmp_path / "x/again").symlink_to(".")
    with pytest.raises(UserError, match=r"--samples .*again is a folder within itself"):
        open_samples(tmp_path / "x")
    (tmp_path / "x/again").unlink()
    found = open_samples(tmp_path / "x")
    every = np.concatenate([*found.batches(5)])
    assert (every[:12] == 255).all() and len(every) == 13
    np.testing.assert_array_equal(every[12], images(1, 3)[0][::-1, ::-1])


def test_samples_that_were_only_touched_are_not_measured_anew(place, tmp_path, monkeypatch):
    """Written again, copied: the images measured before are read and compared, not measured."""
    how = dict(metrics=["fid"], output=tmp_path / "m.json", batch_per_device=BATCH // 4)
    folder = tmp_path / "s"
    folder.mkdir()

    def write():
        for number, one in enumerate(images(19, 0)):
            (folder / f"{number:02}.bmp").unlink(missing_ok=True)
            Image.fromarray(one).save(folder / f"{number:02}.bmp")

    write()
    interrupted(monkeypatch, 2, lambda: measured(place, folder, **how))
    write()
    calls, call = [], Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, batch: calls.append(len(batch)) or call(self, batch)
    )
    found = measured(place, folder, **how)
    assert 0 < sum(calls) < 19
    alone = measured(place, metrics=["fid"], output=tmp_path / "alone.json")["metrics"]["fid"]
    assert found["metrics"]["fid"] == pytest.approx(alone, rel=1e-5)  # in batches of other sizes
