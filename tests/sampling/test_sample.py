"""The verb `sample` for latents and weights: files, labels, guidance by a second run,
interruption."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support.configs import small_config, small_latent_config
from support.golden import WEIGHTS

from diffit_jax.data.pixels import to_pixels
from diffit_jax.errors import UserError
from diffit_jax.interop import official
from diffit_jax.sampling.request import Weights
from diffit_jax.sampling.sample import SampleFiles, sample
from diffit_jax.sampling.sampler import Sampler


def arrays_of(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_latents_are_written_as_they_are(latent_run, tmp_path, caplog):
    workdir, _ = latent_run
    with caplog.at_level("INFO", logger="diffit_jax"):
        path = sample(workdir, seeds=range(5), output=tmp_path / "out" / "l.npz")
    arrays = arrays_of(path)
    assert (
        arrays["arr_0"].shape == (5, 8, 8, 4)
        and arrays["arr_0"].dtype == np.float32
        and arrays["arr_0"].std() > 0.1
    )
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4] and arrays["arr_1"].dtype == np.int64
    assert "writing latents of sd-vae-ft-ema: --vae decodes them to images" in caplog.text
    with Image.open(path.with_suffix(".png")) as image:
        assert image.mode == "RGB"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["l.json", "l.npz", "l.png"]


def test_name_is_the_evaluators(latent_run, run, tmp_path):
    for source, name in ((latent_run[0], "latents_2x8x8x4.npz"), (run[0], "samples_2x8x8x1.npz")):
        workdir = tmp_path / name
        shutil.copytree(source, workdir)
        assert sample(workdir, seeds=[0, 1]).name == name


def weight_config(**overrides):
    config = small_latent_config(
        sampling__sampler__num_steps=3,
        sampling__batch_per_device=1,
        model__hidden_size=999,
        **overrides,
    )
    return config.to_dict()


def test_sampling_from_weights_is_sampling_with_them(tmp_path):
    path = sample(
        Weights(WEIGHTS["a"], weight_config()),
        seeds=[3, 4, 5],
        labels="7,1",
        output=tmp_path / "l.npz",
    )
    arrays = arrays_of(path)
    assert arrays["arr_0"].shape == (3, 32, 32, 4) and arrays["arr_1"].tolist() == [7, 1, 7]
    module, variables = official.load(WEIGHTS["a"])
    from diffit_jax.experiment import config as experiment
    from diffit_jax.runtime import parallel

    mesh = parallel.make_mesh()
    loaded = experiment.build(official.fit_config(weight_config(), WEIGHTS["a"]))
    assert loaded.model == module
    drawn = Sampler(loaded, mesh).draw(
        jax.device_put(variables, parallel.replicated(mesh)), [3, 4, 5], [7, 1, 7]
    )
    np.testing.assert_array_equal(arrays["arr_0"], drawn)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm_solver"])
def test_every_sampler_draws_from_the_same_network(latent_run, tmp_path, sampler):
    path = sample(
        latent_run[0],
        seeds=[0, 1],
        output=tmp_path / "l.npz",
        overrides={"sampler": sampler, "sampler.num_steps": 3},
    )
    assert np.isfinite(arrays_of(path)["arr_0"]).all()


@pytest.mark.parametrize("guidance", ["none", "constant", "power_cosine", "interval"])
@pytest.mark.parametrize("sampler", ["heun", "dpm_solver"])
def test_image_models_take_every_guidance(run, tmp_path, sampler, guidance):
    overrides = {"sampler": sampler, "sampler.num_steps": 6, "guidance": guidance}
    if guidance != "none":
        overrides["guidance.scale"] = 300.0
    if guidance == "interval":
        overrides |= {"guidance.sigma_low": 0.1, "guidance.sigma_high": 5.0}
    image = arrays_of(sample(run[0], seeds=[0, 1], output=tmp_path / "s.npz", overrides=overrides))[
        "arr_0"
    ]
    plain = arrays_of(
        sample(
            run[0],
            seeds=[0, 1],
            output=tmp_path / "t.npz",
            overrides={"sampler.num_steps": 6, "sampler": sampler, "guidance": "none"},
        )
    )["arr_0"]
    assert (guidance == "none") == np.array_equal(image, plain)


def test_autoguidance_by_an_earlier_run(latent_run, tmp_path):
    """The weaker network is another run; at scale 1 it has no effect, and a run guides itself to
    itself."""
    from diffit_jax.training.train import train

    weak = tmp_path / "weak"
    train(
        small_latent_config(training__total_steps=2, model__hidden_size=8, model__depth=1),
        workdir=weak,
    )
    draw = lambda name, **settings: arrays_of(
        sample(latent_run[0], seeds=[0, 1], output=tmp_path / name, **settings)
    )["arr_0"]
    plain = draw("plain.npz", overrides={"guidance": "none"})
    guided = draw(
        "guided.npz",
        overrides={
            "guidance": "autoguidance",
            "guidance.scale": 2.0,
            "guidance.workdir": str(weak),
        },
    )
    assert np.abs(guided - plain).max() > 1e-3
    np.testing.assert_array_equal(
        draw(
            "one.npz",
            overrides={
                "guidance": "autoguidance",
                "guidance.scale": 1.0,
                "guidance.workdir": str(weak),
            },
        ),
        plain,
    )
    itself = draw(
        "itself.npz",
        overrides={
            "guidance": "autoguidance",
            "guidance.scale": 2.0,
            "guidance.workdir": str(latent_run[0]),
        },
    )
    np.testing.assert_allclose(itself, plain, atol=1e-3 * np.abs(plain).max())


def test_autoguidance_needs_a_fitting_run(latent_run, run, tmp_path):
    for workdir, message in (
        ("", "name its run by --guidance.workdir"),
        (str(run[0]), "differs in process, shape or number of classes"),
    ):
        with pytest.raises(UserError, match=message):
            sample(
                latent_run[0],
                seeds=[0],
                output=tmp_path / "l.npz",
                overrides={
                    "guidance": "autoguidance",
                    "guidance.scale": 2.0,
                    "guidance.workdir": workdir,
                },
            )
    with pytest.raises(UserError, match="holds no run"):
        sample(
            latent_run[0],
            seeds=[0],
            overrides={
                "guidance": "autoguidance",
                "guidance.scale": 2.0,
                "guidance.workdir": str(tmp_path / "none"),
            },
        )


# --- Interruption


def test_interrupted_sampling_goes_on(latent_run, tmp_path, monkeypatch):
    """Killed between batches and in the middle of a file, the same request draws only what is
    missing and ends with the same bytes."""
    request = dict(seeds=range(10), labels="random", overrides={"batch_per_device": 1})
    whole = sample(latent_run[0], output=tmp_path / "whole.npz", **request)
    drawn, draw_batch = [], Sampler.draw_batch

    def counting(self, variables, seeds, labels, *more):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(list(seeds))
        return draw_batch(self, variables, seeds, labels, *more)

    monkeypatch.setattr(Sampler, "draw_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        sample(latent_run[0], output=tmp_path / "again.npz", **request)
    parts = tmp_path / "again.npz.parts"
    assert len(list(parts.glob("*.npy"))) == 3 and not (tmp_path / "again.npz").exists()
    (parts / ".00000006-00000008.npy.partial").write_bytes(b"half a file")
    drawn.clear()
    again = sample(latent_run[0], output=tmp_path / "again.npz", **request)
    assert drawn == [[6, 7], [8, 9]] and not parts.exists()
    assert again.read_bytes()[-2000:] == whole.read_bytes()[-2000:]
    np.testing.assert_array_equal(arrays_of(again)["arr_0"], arrays_of(whole)["arr_0"])


def test_parts_of_another_request_are_refused(latent_run, tmp_path, monkeypatch):
    monkeypatch.setattr(SampleFiles, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    output = tmp_path / "l.npz"
    with pytest.raises(KeyboardInterrupt):
        sample(latent_run[0], seeds=range(4), output=output)
    before = sorted(
        (path.name, path.stat().st_mtime_ns) for path in (tmp_path / "l.npz.parts").iterdir()
    )
    for change, name in (
        (dict(seeds=range(1, 5)), "another seeds"),
        (
            dict(seeds=range(4), overrides={"sampler.num_steps": 3}),
            "another sampling.sampler.num_steps .4, now 3.",
        ),
    ):
        with pytest.raises(UserError, match=name):
            sample(latent_run[0], output=output, **change)
    assert before == sorted(
        (path.name, path.stat().st_mtime_ns) for path in (tmp_path / "l.npz.parts").iterdir()
    )


@pytest.mark.parametrize("content", ["{", "null", "[]", ""])
def test_damaged_request(latent_run, tmp_path, content):
    (tmp_path / "l.npz.parts").mkdir()
    (tmp_path / "l.npz.parts" / "request.json").write_text(content)
    with pytest.raises(UserError, match=r"request.json is damaged .*: delete .*l.npz.parts"):
        sample(latent_run[0], seeds=[0], output=tmp_path / "l.npz")


def test_num_steps_takes_the_place_of_the_configs_respacing(tmp_path):
    weights = Weights(WEIGHTS["a"], weight_config(sampling__sampler__respacing="2"))
    three, two = (
        arrays_of(sample(weights, seeds=[0, 1], output=tmp_path / f"{name}.npz", **change))["arr_0"]
        for name, change in (("a", dict(overrides={"sampler.num_steps": 3})), ("b", {}))
    )
    assert np.abs(three - two).max() > 1e-3


def test_refused_requests_leave_nothing(latent_run, tmp_path):
    for change, message in (
        (dict(overrides={"sampler.num_steps": 1001}), "more steps than the schedule's 1000"),
        (
            dict(overrides={"sampler": "heun", "sampler.num_steps": 1001}),
            "num_steps 1001 is more than the schedule's 1000",
        ),
        (dict(overrides={"sampler.respacing": "ddim999"}), "no whole stride"),
        (dict(overrides={"guidance.scale": -0.5}), "sampling.guidance.scale is -0.5"),
        (
            dict(overrides={"guidance.channels": 5}),
            "sampling.guidance.channels is 5: the model has only 4",
        ),
        (
            dict(overrides={"sampler": "plms"}),
            "--sampler plms is unknown: use ddpm, ddim, euler, heun, dpm_solver",
        ),
        (
            dict(overrides={"sampler": "heun", "sampler.respacing": "10"}),
            "--sampler.respacing has no effect with sampler heun",
        ),
        (dict(overrides={"sampler": "ddim", "sampler.eta": -1.0}), "sampling.sampler.eta is -1.0"),
        (dict(labels="10"), "label 10 is outside the classes 0-9"),
        (dict(labels=[-1]), "label -1 is outside the classes 0-9"),
        (dict(labels="tench"), "'tench' is a name, and the classes of this model"),
        (dict(overrides={"pixel_rounding": "up"}), "sampling.pixel_rounding is 'up': use edm, adm"),
        (
            dict(overrides={"guidance.scale": float("inf")}),
            "guidance.scale is inf: it must be finite and at least 0",
        ),
        (dict(overrides={"guidance.power": 0.0}), "guidance.power is 0.0: it must be above 0"),
        (dict(overrides={"sampler.num_steps": 2, "sampler.respacing": "3"}), "leave out either"),
        (dict(overrides={"sampler.eta": 0.5}), "--sampler.eta has no effect with sampler ddpm"),
        (
            dict(overrides={"guidance.workdir": "x"}),
            "--guidance.workdir has no effect with guidance power_cosine",
        ),
        (
            dict(overrides={"sampler": "heun", "sampler.clip_denoised": True}),
            "--sampler.clip_denoised has no effect with sampler heun",
        ),
        (dict(labels=[]), "--labels is empty"),
    ):
        with pytest.raises(UserError, match=message):
            sample(latent_run[0], seeds=[0], output=tmp_path / "out" / "l.npz", **change)
    for output in (tmp_path / "l.png", tmp_path):
        with pytest.raises(UserError, match=r"must be a file that ends in \.npz"):
            sample(latent_run[0], seeds=[0], output=output)
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        Weights(__file__, weight_config())
    assert not list(tmp_path.iterdir())


def test_discrete_samplers_need_the_discrete_process(run):
    with pytest.raises(
        UserError, match=r"sampling.sampler.name is ddim, which needs the process ddpm"
    ):
        sample(run[0], seeds=[0], overrides={"sampler": "ddim"})


# --- Labels and pixels


def test_both_published_rounding_rules():
    x = np.array([-1.2, -1, -0.999, 0, 0.002, 0.9999, 1, 1.2], np.float32)
    exact = np.asarray(x, np.float64)
    np.testing.assert_array_equal(
        to_pixels(x, "edm"), np.clip(127.5 * exact + 128, 0, 255).astype(np.uint8)
    )
    np.testing.assert_array_equal(
        to_pixels(x, "adm"), np.clip((exact + 1) * 127.5, 0, 255).astype(np.uint8)
    )
    assert to_pixels(x, "adm")[3] == 127 and to_pixels(x, "edm")[3] == 128


def test_pixel_rounding_is_applied(run, tmp_path):
    images = [
        arrays_of(
            sample(
                run[0],
                seeds=range(4),
                output=tmp_path / f"{rule}.npz",
                overrides={"pixel_rounding": rule},
            )
        )["arr_0"].astype(int)
        for rule in ("edm", "adm")
    ]
    difference = images[0] - images[1]
    assert set(np.unique(difference)) == {0, 1}


def test_unconditional_models_take_autoguidance_only(tmp_path):
    config = small_config(model__num_classes=0, sampling__guidance__scale=1.0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with pytest.raises(UserError, match=r"unconditional: leave out --guidance.scale"):
        sample(tmp_path, seeds=[0], overrides={"guidance.scale": 2.0})
    with pytest.raises(UserError, match=r"name its run by --guidance.workdir"):
        sample(tmp_path, seeds=[0], overrides={"guidance.scale": 2.0, "guidance": "autoguidance"})
