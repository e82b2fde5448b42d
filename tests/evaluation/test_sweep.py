"""`sweep`: it finds what was planted."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from support.configs import config_of, small_latent_config
from support.fid import save_tiny_vae
from support.golden import WEIGHTS

from diffit_jax.diffusion import guidance
from diffit_jax.diffusion.guidance import GUIDANCE, Interval, PowerCosine
from diffit_jax.errors import UserError
from diffit_jax.evaluation.evaluator import Comparison
from diffit_jax.evaluation.features import Extractor, Networks
from diffit_jax.evaluation.images import open_samples
from diffit_jax.evaluation.make_reference import make_reference
from diffit_jax.evaluation.sweep import Swept, parse, sweep, table
from diffit_jax.runtime import distributed, interruption
from diffit_jax.sampling.decoder import Decoding
from diffit_jax.sampling.request import Run, SampleRequest, SamplingOptions, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train

COUNT, BATCH = 12, 4
STEPS = {"sampler.num_steps": 3, "batch_per_device": 4}


pytestmark = pytest.mark.usefixtures("one_extractor_each")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an autoencoder, and a reference: samples of released weights at guidance scale
    3, of the same seeds, which is therefore the best of all scales."""
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny_vae(folder / "vae")
    planted(folder, weights(), "reference.npz", {**STEPS, "guidance.scale": 300.0})
    return folder


def planted(folder, source, name, overrides):
    decoding = Decoding(folder / "vae")
    output = sample(
        source, seeds=range(COUNT), overrides=overrides, output=folder / "s.npz", decoding=decoding
    )
    assert output
    make_reference(
        open_samples(folder / "s.npz"),
        output=folder / name,
        networks=Networks("random"),
        batch_per_device=BATCH,
    )
    for path in folder.glob("s.*"):
        path.unlink()


def weights():
    return Weights(WEIGHTS["a"], config_of("imagenet256_latent").to_dict())


def swept(place, output, text, source=weights, reference="reference.npz", **more):
    options = SamplingOptions(
        more.pop("labels", None), more.pop("overrides", STEPS), Decoding(place / "vae")
    )
    metrics = more.pop("metrics", None)
    return sweep(
        source,
        keys=parse(text),
        comparison=Comparison(place / reference, "random", metrics, batch_per_device=BATCH),
        options=options,
        output=output,
        **{"count": COUNT, **more},
    )


def test_it_finds_the_planted_scale(place, tmp_path):
    """With one compiled sampler for all scales; in a table, an image and a file."""
    compiled, apply_guidance = [], guidance.apply_guidance

    def traced(*arguments, **named):
        compiled.append(1)
        return apply_guidance(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance, "apply_guidance", traced)
        found = swept(place, tmp_path / "sweep.json", "guidance.scale=100,200,300,400,500")
    assert len(compiled) == 1
    fids = [point["metrics"]["fid"] for point in found.points]
    assert found.best["settings"] == {"guidance.scale": 300.0}, fids
    # The same images but for a level here and there: scales are rounded in another order.
    assert fids[2] < 1e-3 * min(fids[:2] + fids[3:]), fids
    assert fids[0] > fids[1] and fids[4] > fids[3]
    lines = table(found).splitlines()
    assert lines[3].endswith("← best") and lines[3].split()[0] == "300" and len(lines) == 7
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == list(found.points)
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size == (700, 450)


def test_an_edge_is_said(place, tmp_path):
    found = swept(place, tmp_path / "sweep.json", "guidance.scale=100,300,200")
    edge = "the best guidance.scale, 300, is the largest of those tried: try larger ones too"
    assert found.edges() == [edge] and table(found).endswith(edge)
    point = {"metrics": {"recall": 0.3}, "count": 5}
    points = [{**point, "settings": {"a": 1.0}}, {**point, "settings": {"a": 2.0}}]
    points[1]["metrics"] = {"recall": 0.2}  # of which more is better
    assert "the smallest" in Swept({"a": [1.0, 2.0]}, "recall", points).edges()[0]


def test_an_interrupted_sweep_goes_on_and_takes_more_points(place, tmp_path, monkeypatch):
    calls, call = [], Extractor.__call__

    def counted(self, images):
        calls.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(distributed.PreemptionNotice, "reached", lambda _: sum(calls) == 20)
        with pytest.raises(interruption.Preempted, match="8 of 12 images are measured and kept"):
            swept(place, tmp_path / "sweep.json", "guidance.scale=200,300")
    swept(place, tmp_path / "sweep.json", "guidance.scale=200,300")
    assert sum(calls) == 24
    found = swept(place, tmp_path / "sweep.json", "guidance.scale=200,300,400")
    assert sum(calls) == 36 and found.best["settings"] == {"guidance.scale": 300.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.png"]
    with pytest.raises(UserError, match="holds a sweep with another count"):
        swept(place, tmp_path / "sweep.json", "guidance.scale=200,300", count=8)


def test_it_finds_the_planted_length_of_the_average(place, tmp_path):
    """Of a run with snapshots, and the number of steps beside it: two programs."""
    config = small_latent_config(optimizer__learning_rate=0.05, optimizer__warmup_steps=0)
    config.ema.power_lengths, config.ema.snapshot_steps = (0.05, 0.2), 2
    train(config, workdir=tmp_path / "run")
    planted(place, Run(tmp_path / "run", ema_length=0.15), "averages.npz", {})
    found = swept(
        place,
        None,
        "ema_length=0.25,0.15,0.06,sampler.num_steps=2,4",
        functools.partial(Run, tmp_path / "run"),
        "averages.npz",
        overrides={},
    )
    assert found.best["settings"] == {"ema_length": 0.15, "sampler.num_steps": 4}
    assert found.best["metrics"]["fid"] < 1e-6 and len(found.points) == 6
    assert (tmp_path / "run" / "sweep.json").exists()


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind, cls in GUIDANCE.items()
        if kind not in ("none", "autoguidance") and not (cls.of_flow or cls.needs_inner)
    ],
)
def test_a_scale_that_comes_later_gives_the_same_samples(kind):
    """As one that is compiled in, of every kind that guides by labels."""
    source, overrides = weights(), {**STEPS, "guidance": kind, "guidance.scale": 2.5}
    if kind == "interval":
        overrides |= {"guidance.sigma_low": 0.1, "guidance.sigma_high": 50.0}
    if kind == "power_cosine":
        overrides |= {"guidance.power": 0.3}  # early, where there are steps
    asked = SampleRequest.make(source, seeds=range(4), options=SamplingOptions(overrides=overrides))
    networks, all_of_it = asked.load(), np.arange(4)
    expected, _ = asked.draw(networks, all_of_it)
    other = SampleRequest.make(
        source,
        seeds=range(4),
        options=SamplingOptions(overrides={**overrides, "guidance.scale": 7.0}),
    )
    drawn, _ = other.with_scale(2.5).draw(networks, all_of_it)
    # float32 rounding of latents of size 300, in three steps.
    bound = 3e-6 * np.abs(expected).max()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=bound)
    far, _ = other.draw(networks, all_of_it)
    assert np.abs(far - expected).max() > 10 * bound


def test_weights_say_how_much_of_a_scale_arrives():
    """Against the scales themselves, of each kind, at scales that no weight is made for."""
    time, sigma = np.linspace(0, 0.99, 9), np.geomspace(0.01, 80, 9)
    for kind in (
        PowerCosine(4.4, skip_tolerance=0),
        Interval(3.0, skip_tolerance=0, sigma_low=0.3, sigma_high=10),
    ):
        weights = kind.weights(time, sigma)
        expected = 1 + (kind.scale - 1) * weights
        np.testing.assert_allclose(kind.scales(time, sigma), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance.scale=2,2.0", r"--sweep guidance\.scale=2\.0,2\.0 changes nothing"),
        ("batch_per_device=4,8", "--sweep batch_per_device=4,8 changes nothing"),
        ("sampler.num_steps=3,4", r"--sampler\.num_steps and --sweep sampler\.num_steps both say"),
        ("sampler.eta=0,1", r"--sampler\.eta has no effect with sampler ddpm"),
        ("guidance.scale=x", r"--sweep has guidance\.scale=x: it must be a number"),
        ("guidance.scale=nan", "it must be a finite number"),
        ("guidance.sale=1", r"--sweep has 'guidance\.sale': write KEY=VALUE"),
        ("1,2", "--sweep has '1': write KEY=VALUE"),
    ],
)
def test_what_cannot_be_swept(place, tmp_path, text, message):
    overrides = STEPS if "batch" not in text else {"sampler.num_steps": 3}
    with pytest.raises(UserError, match=message):
        swept(place, tmp_path / "sweep.json", text, overrides=overrides)
    assert not (tmp_path / "sweep.json").exists()


def test_the_number_of_devices_is_that_of_the_request():
    assert jax.device_count() == 2  # what the figures above were found with
