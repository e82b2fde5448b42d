"""Distances in DINOv2's features: by dgm-eval's and EDM2's code (golden data), and by the verbs."""

import json
import pickle
import re

import numpy as np
import pytest
from support.golden import GOLDEN
from support.processes import ROOT

from diffit_jax.errors import UserError
from diffit_jax.evaluation import measuring, neighbours
from diffit_jax.evaluation.evaluate import evaluate, table
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import Extractor, Features, Networks
from diffit_jax.evaluation.images import open_samples
from diffit_jax.evaluation.make_reference import make_reference
from diffit_jax.evaluation.reference import METRICS, Reference, space_of
from diffit_jax.evaluation.scores import (
    Moments,
    distance_at_infinity,
    frechet_distance,
    gaussian_distance,
    infinity_counts,
    kernel_distance,
    sliced_distance,
    statistics,
)
from diffit_jax.interop import edm_pickle
from diffit_jax.runtime import parallel

FOLDER = GOLDEN / "repa"
DATA = dict(np.load(FOLDER / "distances.npz"))
REAL, FAKE, FEW = (DATA[name] for name in ("real", "fake", "few"))
EXACT = 1e-9  # relative, as the README there states it


def moments(features, pieces=5):
    collected = Moments(exact=True)
    for piece in np.array_split(features, pieces):
        collected.add(piece)
    return collected.statistics()


@pytest.mark.parametrize("collect", [moments, statistics])
def test_fd_is_dgm_evals_and_edm2s(collect):
    real, fake, few = (collect(each) for each in (REAL, FAKE, FEW))
    for name in ("dgm", "edm2"):
        np.testing.assert_allclose(real[0], DATA[f"{name}/mu_real"], rtol=EXACT, atol=1e-12)
        np.testing.assert_allclose(real[1], DATA[f"{name}/sigma_real"], rtol=EXACT, atol=1e-12)
        assert frechet_distance(real, fake) == pytest.approx(DATA[f"{name}/fd"], rel=EXACT)
        # Singular and equal covariances: the root there is good to 1e-6.
        assert frechet_distance(real, few) == pytest.approx(DATA[f"{name}/fd_few"], abs=1e-5)
        assert frechet_distance(real, real) == pytest.approx(DATA[f"{name}/fd_same"], abs=1e-5)
    assert frechet_distance(real, fake) == pytest.approx(DATA["dgm/fd_eff"], rel=EXACT)


def test_kd_is_dgm_evals():
    found, deviation = kernel_distance(FAKE, REAL[:80], subsets=1, size=80)
    assert deviation == 0
    assert found == pytest.approx(DATA["dgm/kd_polynomial_equal_counts"], rel=EXACT)
    assert found == pytest.approx(DATA["fidelity/kid_one_subset_of_all"], abs=1e-6)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_and_coverage_are_dgm_evals(k):
    found = neighbours.manifolds(REAL, FAKE, k)
    for name, value in found._asdict().items():
        assert value == pytest.approx(DATA[f"dgm/prdc_k{k}/{name}"], rel=EXACT), name


@pytest.mark.parametrize("k", [3, 5])
def test_realism_is_dgm_evals(k):
    found = neighbours.realism(REAL, FAKE, k)
    np.testing.assert_allclose(found, DATA[f"dgm/prdc_k{k}/realism"], rtol=1e-6)  # float32 there
    assert neighbours.realism(REAL, REAL[:1] + 100, k) < 0.1
    # Copies of small balls' centres are as real as rounding lets them; of equal points none is.
    assert (neighbours.realism(REAL, REAL, k) > 1e5).sum() == 48
    equal = np.tile(REAL[:1], (8, 1))  # whose squared distances are rounding, of either sign
    assert neighbours.realism(equal, np.concatenate([REAL[1:2], equal]), k)[0] < 1e-5
    assert np.isfinite(neighbours.realism(equal, equal, k)).all()


def test_mmd_is_cmmds():
    of_unit, raw = (
        gaussian_distance(FAKE, REAL[:80]),
        gaussian_distance(5 * FAKE, 5 * REAL[:80], False),
    )
    assert of_unit == pytest.approx(DATA["cmmd/unit"], abs=1e-3)  # float32 numbers near 1 there
    assert raw == pytest.approx(DATA["cmmd/raw"], rel=1e-6)
    assert gaussian_distance(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_torch_fidelity_calls_its_first_input_the_generated_one():
    found = neighbours.manifolds(FAKE, REAL, 3)
    for name in ("precision", "recall"):
        theirs = DATA[f"fidelity/prc_k3_input1_real/{name}"]
        assert getattr(found, name) == pytest.approx(theirs, rel=1e-6)
    theirs = DATA["fidelity/prc_k3_input1_real/f_score"]
    assert found.f_score == pytest.approx(theirs, rel=1e-6)
    apart = neighbours.manifolds(REAL, REAL + 1e3)
    assert apart.precision == apart.recall == apart.f_score == 0


def test_manifolds_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    real, fake, k = rng.normal(size=(301, 6)), rng.normal(size=(257, 6)) * 1.2, 4

    def far(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    of_real, of_fake = (np.sort(far(each, each), axis=1)[:, k] for each in (real, fake))
    across = far(real, fake)
    inside = across < of_real[:, None]
    found = neighbours.manifolds(real, fake, k)
    assert found.precision == pytest.approx(inside.any(0).mean())
    assert found.recall == pytest.approx((across < of_fake[None]).any(1).mean())
    assert found.density == pytest.approx(inside.sum(0).mean() / k)
    assert found.coverage == pytest.approx((across.min(1) < of_real).mean())


def test_mind_is_torch_fidelitys():
    found = sliced_distance(FAKE, REAL[:80], DATA["fidelity/mind_directions"])
    assert found == pytest.approx(float(DATA["fidelity/mind_equal_counts"]), rel=1e-6)
    assert sliced_distance(FAKE, FAKE) == 0
    # A shift by s has the distance 3 d s² / d: 3 of the squared length, on average.
    shifted = sliced_distance(FAKE + np.float32(0.5), FAKE)
    assert shifted == pytest.approx(3 * 24 * 0.25, rel=0.1)
    assert sliced_distance(FAKE, REAL) == sliced_distance(FAKE, REAL)  # of more, some, the same


def test_fd_at_infinity_is_dgm_evals():
    counts = DATA["dgm/fd_infinity_counts"]
    found = distance_at_infinity(FAKE, statistics(REAL), counts, seed=None)
    assert found == pytest.approx(DATA["dgm/fd_infinity_of_first_ones"], abs=1e-5)
    assert infinity_counts(50_000)[[0, -1]].tolist() == [5_000, 50_000]
    np.testing.assert_array_equal(infinity_counts(len(FAKE))[-1], counts[-1])
    with pytest.raises(UserError, match="there are 80 samples: measure at least 150"):
        distance_at_infinity(FAKE, statistics(REAL))
    # Of as many as make the bias small, about the distance itself.
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4_000, 4)), rng.normal(size=(50_000, 4)) + 0.5
    found = distance_at_infinity(one, statistics(other))
    assert found == pytest.approx(1.0, abs=0.1)


# --- References of EDM2's


@pytest.mark.parametrize("name", ["edm2_ref.pkl", "edm2_ref_numpy1.pkl"])
def test_references_of_edm2_are_read_without_running_them(name):
    found = edm_pickle.read_statistics(FOLDER / name)
    mean, covariance = DATA["edm2/mu_real"], DATA["edm2/sigma_real"]
    for end in ("", "_dinov2"):
        np.testing.assert_allclose(found[f"mu{end}"], mean, rtol=EXACT, atol=1e-12)
        np.testing.assert_allclose(found[f"sigma{end}"], covariance, rtol=EXACT, atol=1e-12)
    reference = Reference.load(FOLDER / name, {"mu": 24, "mu_dinov2": 24})
    assert reference.chosen(None, ["dinov2"]) == ["fd_dinov2"]
    assert reference.chosen(None, ["inception", "dinov2"])[0] == "fid"
    with pytest.raises(UserError, match="made with --dinov2_resize edm2"):
        reference.check((8, 8, 3), {"dinov2": {"resize": "dgm_eval"}})


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (Evil(), r"builtins\.print, which is never run"),
        ({"fid": {"mu": Evil()}}, "which is never run"),
        ({"num_images": 3}, "neither fid nor fd_dinov2"),
        ({"fid": {"mu": np.zeros(2, "O")}}, "never run|numbers of type|another form"),
        ({"fid": {"mu": np.zeros(2), "sigma": 3}}, "no reference of EDM2"),
        (b"\x80", "no reference of EDM2"),
    ],
)
def test_pickles_that_are_no_references(content, match, tmp_path, capsys):
    raw = content if isinstance(content, bytes) else pickle.dumps(content)
    (tmp_path / "r.pkl").write_bytes(raw)
    with pytest.raises(UserError, match=match):
        edm_pickle.read_statistics(tmp_path / "r.pkl")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(protocol, tmp_path):
    mean, covariance = np.arange(3.0), np.asfortranarray(np.arange(9.0).reshape(3, 3))
    content = {"num_images": np.int64(5), "fid": dict(mu=mean, sigma=covariance)}
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = edm_pickle.read_statistics(tmp_path / "r.pkl")
    np.testing.assert_array_equal(found["mu"], mean)
    np.testing.assert_array_equal(found["sigma"], covariance)


# --- The verbs

ALL = [name for name in METRICS if space_of(name) == "dinov2"]


def images(count, seed):
    y, x = np.mgrid[:20, :20]
    rng = np.random.default_rng(seed)
    waves = np.sin(x[None] * rng.uniform(0.2, 1, (count, 1, 1)) + y * 0.3)
    return np.rint(waves[..., None] * rng.uniform(20, 90, (count, 1, 1, 3)) + 128).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_extractor_each):
    folder = tmp_path_factory.mktemp("distances")
    np.savez(folder / "samples.npz", arr_0=images(160, 0), arr_1=np.arange(160) % 3)
    np.savez(folder / "few.npz", arr_0=images(16, 1))
    np.savez(folder / "data.npz", arr_0=images(48, 1))
    make_reference(
        open_samples(folder / "data.npz"),
        output=folder / "reference.npz",
        networks=Networks(dinov2="digits"),
        batch_per_device=16,
    )
    return folder


def compared(place, output, **how):
    how = {"dinov2": "digits", "batch_per_device": 16, **how}
    reference, count = how.pop("reference", place / "reference.npz"), how.pop("count", None)
    comparison = Comparison(reference, **how)
    return evaluate(place / "samples.npz", comparison=comparison, count=count, output=output)


def test_scores_are_those_of_the_features(place, tmp_path):
    found = compared(place, tmp_path / "m.json", metrics=[*ALL])
    extractor = Extractor.load(Networks(dinov2="digits"), parallel.any_mesh(), 16)
    ours, theirs = (
        measuring.measure(open_samples(place / name), extractor, "x", pooled=["dinov2"]).features(
            "dinov2"
        )
        for name in ("samples.npz", "data.npz")
    )
    scores = found["metrics"]
    assert list(scores) == [*ALL, "kd_dinov2_std"]
    fd = frechet_distance(statistics(ours), statistics(theirs))
    assert scores["fd_dinov2"] == pytest.approx(fd, rel=1e-6)
    manifolds = neighbours.manifolds(theirs, ours)
    for name, value in manifolds._asdict().items():
        assert scores[f"{name}_dinov2"] == value
    assert scores["mind_dinov2"] == sliced_distance(ours, theirs)
    assert scores["mmd_dinov2"] == gaussian_distance(ours, theirs)
    assert scores["f_score_dinov2"] == manifolds.f_score
    assert scores["realism_dinov2"] == np.median(neighbours.realism(theirs, ours))
    assert scores["fd_infinity_dinov2"] < scores["fd_dinov2"]
    said = found["protocol"]["dinov2"]
    assert said["resize"] == "dgm_eval" and said["positions"] == "official" and said["size"] == 64
    assert said["network"] == "digits" and said["layer"] and len(said["weights"]) == 32
    assert "inception" not in found["protocol"] and "resize" not in found["protocol"]
    text = table(found)
    assert "FD-DINOv2" in text and "dgm_eval (DINOv2)" in text
    reference = Reference.load(place / "reference.npz", extractor.sizes)
    assert reference.chosen(None, ["dinov2"]) == ALL[:5]


@pytest.mark.parametrize(
    ("path", "names"), [("diffit_jax/cli/shared.py", METRICS), ("configs/EVALUATION.md", ALL)]
)
def test_every_metric_is_in_the_flags_help_and_on_the_page(path, names):
    text = (ROOT / path).read_text()
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_both_networks_in_one_pass(place, tmp_path):
    make_reference(
        open_samples(place / "few.npz"),
        output=tmp_path / "both.npz",
        networks=Networks("random", dinov2="digits"),
        batch_per_device=16,
    )
    both = compared(
        place, tmp_path / "b.json", count=16, reference=tmp_path / "both.npz", inception="random",
        metrics=["fid", "kid", "fd_dinov2", "kd_dinov2"],
    )  # fmt: skip
    alone = compared(
        place, tmp_path / "a.json", count=16, reference=tmp_path / "both.npz",
        metrics=["fd_dinov2", "kd_dinov2"],
    )  # fmt: skip
    for name, value in alone["metrics"].items():
        assert both["metrics"][name] == pytest.approx(value, rel=1e-6)
    assert both["protocol"]["resize"] == "tf1" and both["metrics"]["fid"] > 0
    assert json.loads((tmp_path / "b.json").read_text()) == both
    # FID's reference alone does not serve DINOv2, and the other way round.
    with np.load(tmp_path / "both.npz") as arrays:
        named = {k: arrays[k] for k in ("mu", "sigma", "protocol")}
    np.savez(tmp_path / "fid.npz", **named)
    with pytest.raises(UserError, match="nothing to compare in the features of dinov2"):
        compared(place, tmp_path / "c.json", reference=tmp_path / "fid.npz")


def test_what_does_not_go_together(place, tmp_path):
    def refused(match, **how):
        with pytest.raises(UserError, match=match):
            compared(place, tmp_path / "m.json", **how)
        assert not (tmp_path / "m.json").exists()

    refused("made with --dinov2_resize dgm_eval", dinov2_resize="edm2")
    refused("fid, which is in the features of inception.*--inception", metrics=["fid"])
    refused("--metrics has 'fdd'", metrics=["fdd"])
    refused("--inception and --dinov2 are missing", dinov2="")
    refused("dinov2_resize bicubic is unknown", dinov2_resize="bicubic")
    refused("by class, images are compared by Inception", by_class=True)
    with np.load(place / "reference.npz") as arrays:
        changed = dict(arrays)
    said = json.loads(str(changed["protocol"]))
    said["dinov2"]["weights"] = "0" * 32
    changed["protocol"] = np.array(json.dumps(said))
    np.savez(tmp_path / "other.npz", **changed)
    refused("made with other weights of DINOv2", reference=tmp_path / "other.npz")
    for odd in ("[1]", '{"dinov2": 3}', "{"):
        np.savez(tmp_path / "odd.npz", **changed | {"protocol": np.array(odd)})
        refused("has a protocol that is damaged", reference=tmp_path / "odd.npz")
    refused("mu_dinov2.*not of the 64 features", reference=FOLDER / "edm2_ref.pkl")
    changed["mu_dinov2"], changed["sigma_dinov2"] = np.zeros(5), np.eye(5)
    np.savez(tmp_path / "size.npz", **changed)
    refused(r"mu_dinov2 \(5,\).*not of the 64 features", reference=tmp_path / "size.npz")


def test_a_partial_measurement_is_gone_on_with(tmp_path):
    begun = measuring.PartialResult(tmp_path / "b.npz", "one")
    spaces = ("inception", "dinov2")
    kept = measuring.Measured(["dinov2"], spaces)
    draw = np.random.default_rng(0)
    both = [draw.normal(size=(2, 600, 8)).astype(np.float32) for _ in range(2)]
    pictures = draw.integers(0, 256, (600, 2, 2, 3), np.uint8)
    kept.add(pictures, Features(both[0][0], both[0][0], both[0][0], both[0][1]))
    begun.save(kept)
    again = measuring.Measured(["dinov2"], spaces)
    begun.restore(again)
    for one in (kept, again):
        one.add(pictures, Features(both[1][0], both[1][0], both[1][0], both[1][1]))
    assert again.count == 1200 and again.digest == kept.digest
    for name in ("pool", "dinov2"):
        for a, b in zip(
            getattr(again, name).statistics(), getattr(kept, name).statistics(), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again.features("dinov2"), kept.features("dinov2"))
    wanted = statistics(np.concatenate([both[0][1], both[1][1]]))
    for a, b in zip(again.dinov2.statistics(), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
