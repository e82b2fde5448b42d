import dataclasses
import shutil

import jax
import numpy as np
import pytest
from support.configs import small_config, small_latent_config

from diffit_jax import models
from diffit_jax.data import pixels
from diffit_jax.diffusion import guidance
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.models.model import cast_before_use
from diffit_jax.run.state import create_state
from diffit_jax.runtime import parallel
from diffit_jax.sampling.sample import sample
from diffit_jax.sampling.sampler import Sampler, copy_bytes, copy_fits


@pytest.fixture(scope="module")
def lively():
    """An experiment and variables that make images of more than noise: fresh ones have a head of
    zeros."""
    experiment = build(small_config(sampling__sampler__num_steps=6))
    params = create_state(experiment, parallel.make_mesh()).params
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(0)
    return experiment, {
        "params": jax.tree.unflatten(
            tree, [leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.05 for leaf in leaves]
        ),
        "constants": {},
    }


def sampler_of(experiment, devices, batch_size):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    sampling = experiment.sampling.overridden({"batch_per_device": batch_size // devices})
    return Sampler(experiment.with_sampling(sampling), mesh), mesh


def draw(lively, seeds, labels, devices, batch_size):
    experiment, variables = lively
    sampler, mesh = sampler_of(experiment, devices, batch_size)
    return sampler.draw(jax.device_put(variables, parallel.replicated(mesh)), seeds, labels)


def test_samples_do_not_depend_on_batches_or_devices(lively):
    seeds, labels = np.arange(11), np.arange(11) % 10
    reference = draw(lively, seeds, labels, devices=1, batch_size=11)
    assert reference.std(axis=0).mean() > 0.05
    order = np.array([7, 3, 10, 0, 1])
    for devices, batch_size in ((1, 4), (2, 4), (2, 12)):
        # 1e-4 of [-1, 1].
        np.testing.assert_allclose(
            draw(lively, seeds, labels, devices, batch_size), reference, rtol=0, atol=2e-4
        )
    np.testing.assert_allclose(
        draw(lively, seeds[order], labels[order], 2, 2), reference[order], rtol=0, atol=2e-4
    )


def test_samplers_alike_are_traced_once(lively, monkeypatch):
    """Though their experiments differ elsewhere."""
    traced, apply_guidance = [], guidance.apply_guidance

    def counted(*arguments, **named):
        traced.append(1)
        return apply_guidance(*arguments, **named)

    monkeypatch.setattr(guidance, "apply_guidance", counted)
    experiment, variables = lively
    counts = []
    for steps, seed in ((5, 0), (5, 1), (4, 1)):
        sampling = experiment.sampling.overridden({"sampler.num_steps": steps})
        other = dataclasses.replace(experiment, seed=seed).with_sampling(sampling)
        mesh = parallel.make_mesh()
        placed = jax.device_put(variables, parallel.replicated(mesh))
        Sampler(other, mesh).draw(placed, [1, 2], [3, 4])
        counts.append(len(traced))
    assert counts == [1, 1, 2]


def test_uint8_samples_agree(lively):
    experiment, variables = lively
    seeds, images = np.arange(40), []
    for devices, batch_size in ((1, 40), (2, 8)):
        sampler, mesh = sampler_of(experiment, devices, batch_size)
        drawn = sampler.draw(
            jax.device_put(variables, parallel.replicated(mesh)), seeds, seeds % 10
        )
        images.append(np.asarray(pixels.to_pixels(drawn)).astype(int))
    difference = np.abs(images[0] - images[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_label_and_seed_matter(lively):
    images = draw(lively, [5, 5, 6], [1, 2, 1], devices=1, batch_size=3)
    assert np.abs(images[0] - images[1]).max() > 1e-2 and np.abs(images[0] - images[2]).max() > 1e-2


def test_sample_writes_npz_and_grid(run, tmp_path):
    workdir, _ = run
    path = sample(
        workdir,
        seeds=range(5),
        labels=[3, 4],
        output=tmp_path / "out" / "s.npz",
        overrides={"batch_per_device": 1},
    )
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [3, 4, 3, 4, 3]
        images = arrays["arr_0"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["s.json", "s.npz", "s.png"]
    with np.load(sample(workdir, seeds=[4, 0], labels=[3], output=tmp_path / "t.npz")) as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - images[[4, 0]]).max() <= 1


def test_sample_defaults(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)  # other tests expect the run without samples
    path = sample(
        workdir, seeds=[7, 12, 31], overrides={"guidance.scale": 1.0, "sampler.num_steps": 2}
    )
    assert (
        path.name == "samples_3x8x8x1-seeds=7_12_31,sampler.num_steps=2,guidance.scale=1.0.npz"
        and path.parent == workdir
    )
    with np.load(path) as arrays:
        assert arrays["arr_1"].tolist() == [7, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seeds=[0], labels=[3, 10]), "label 10 is outside the classes 0-9"),
        (dict(seeds=[-1]), "seeds must be at least one whole number"),
        (dict(seeds=[]), "seeds must be at least one whole number"),
        (dict(seeds=[0], overrides={"guidance.scale": -1.0}), "sampling.guidance.scale is -1.0"),
        (dict(seeds=[0], overrides={"sampler.num_steps": 1}), "sampling.sampler.num_steps is 1"),
        (
            dict(seeds=[0], overrides={"batch_per_device": 0}),
            "sampling.batch_per_device is 0: it must be between 1 and 1000000",
        ),
        (
            dict(seeds=[0], output="/dev/null/x/s.npz"),
            "output directory /dev/null/x cannot be written",
        ),
    ],
)
def test_bad_requests(run, arguments, message):
    workdir, _ = run
    with pytest.raises(UserError, match=message):
        sample(workdir, **arguments)


def test_nothing_to_sample_from(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        sample(tmp_path, seeds=[0])
    (tmp_path / "config.json").write_text(small_config().to_json())
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        sample(tmp_path, seeds=[0])
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_unconditional_model_takes_no_labels(tmp_path):
    config = small_config(model__num_classes=0, sampling__guidance__scale=1.0)
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(UserError, match="unconditional: leave out --labels"):
        sample(tmp_path, seeds=[0], labels=[0])
    with pytest.raises(UserError, match=r"unconditional: leave out --guidance.scale"):
        sample(tmp_path, seeds=[0], overrides={"guidance.scale": 2.0})


@pytest.mark.parametrize("config", [small_config, small_latent_config], ids=["image", "latent"])
def test_a_copy_in_bfloat16_changes_no_sample(config):
    """Casting once before the loop is casting in every evaluation: equal to a few bfloat16
    roundings (measured: bit for bit)."""
    experiment = build(config(model__dtype="bfloat16"))
    variables = models.init_variables(experiment.model, jax.random.key(0))
    cast = cast_before_use(experiment.model, variables)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(cast)
    }
    assert sum(flag for name, flag in names.items() if name.endswith("kernel")) >= 6 and not any(
        flag
        for name, flag in names.items()
        if "relative_position_bias" in name or name.split("/")[1] in ("final", "head")
    )
    mesh = parallel.make_mesh(shape=parallel.MeshShape(data=1, fsdp=2))
    variables = jax.device_put(
        variables, parallel.shardings(mesh, variables, models.parameter_metadata(experiment.model))
    )
    with_copy, without = (
        Sampler(experiment, mesh, copy=copy).draw(variables, [1, 2, 3], [0, 1, 2])
        for copy in (True, False)
    )
    np.testing.assert_allclose(with_copy, without, rtol=0, atol=2**-7 * np.abs(without).max())


def test_only_bfloat16_networks_are_copied():
    experiment = build(small_latent_config())
    shapes = jax.eval_shape(lambda: models.init_variables(experiment.model, jax.random.key(0)))
    assert copy_bytes(experiment.model, shapes) == 0
    half = experiment.model.clone(dtype="bfloat16")
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert total < copy_bytes(half, shapes) < 2 * total
    assert copy_fits(10, None) and copy_fits(10, 40) and not copy_fits(11, 40)


@pytest.mark.parametrize(
    ("asked", "count", "made"), [(3, None, 6), (100, 5, 6), (3, 1, 2), (2, 100, 4)]
)
def test_batches_are_padded_to_the_devices(asked, count, made):
    """On two devices."""
    experiment = build(small_config(sampling__batch_per_device=asked))
    assert Sampler(experiment, parallel.make_mesh(), count).batch_size == made
