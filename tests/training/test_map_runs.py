"""Runs of flow maps: training, drawing in a few steps, and maps made of other networks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.commands import assert_one_line_error, launch
from support.configs import small_config, small_flow_config, small_map_config
from support.samples import assert_samples_follow_their_seeds
from support.trees import assert_equal_trees

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.run.state import setup_experiment
from diffit_jax.sampling.convert import weights_to_workdir, workdir_to_weights
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.training.loggers import read_figures
from diffit_jax.training.train import train

DMF = {
    "name": "flow_map", "times": "logit_normal", "share": 0.5, "pair_means": (0.4, -1.2),
    "flow_times": "own", "map_loss": "log", "guidance_kappa": 0.6, "guidance_high": 0.7,
}  # fmt: skip


def made_of_a_flow(**overrides):
    """The config of a map that a trained flow becomes."""
    config = small_flow_config(
        process=DMF, model__end_time_in="blocks", model__end_time_from=1,
        sampling__sampler={"name": "map", "num_steps": 1}, sampling__guidance={"kind": "none"},
    )  # fmt: skip
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    return config


@pytest.fixture(scope="module")
def map_run(tmp_path_factory):
    """(workdir, final state) of a run of six updates, of iMF with everything in it."""
    workdir = tmp_path_factory.mktemp("map")
    return workdir, train(small_map_config(), workdir=workdir)


def test_errors_are_logged_beside_the_loss(map_run, capfd):
    """Which is nearly 1.5 whatever they are: that of the map, and half that of the inner head."""
    figures = read_figures(map_run[0])
    for update, loss in figures["loss"].items():
        assert abs(loss - 1.5) < 0.01
        assert figures["flow_error"][update] > 0.5 < figures["map_error"][update]
        assert abs(figures["inner"][update] - 1) < 0.01


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(map_run, tmp_path):
    train(small_map_config(training__total_steps=3), workdir=tmp_path)
    assert_equal_trees(train(small_map_config(), workdir=tmp_path), map_run[1])


SETTINGS = {
    "as configured": {},
    "one step, told more": {"sampler.num_steps": 1, "sampler.told_scale": 7.5,
                            "sampler.told_low": 0.4, "sampler.told_high": 0.65},
    "restarted": {"sampler.num_steps": 4, "sampler.restart": True, "sampler.shift": 1.5},
    "its flow": {"sampler": "heun", "sampler.num_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_way_to_draw(map_run, name, tmp_path):
    assert_samples_follow_their_seeds(map_run[0], SETTINGS[name], tmp_path)


def test_many_steps_get_a_word_and_too_many_an_error(map_run, tmp_path, caplog):
    caplog.set_level("INFO")
    steps = {"sampler.num_steps": 9}
    sample(map_run[0], seeds=[0], output=tmp_path / "9.npz", overrides=steps)
    assert "9 steps of a map, which is made for 1 to 4" in caplog.text
    with pytest.raises(UserError, match="num_steps is 101: a map is made for 1 to 4 steps"):
        sample(map_run[0], seeds=[0], overrides={"sampler.num_steps": 101})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_map_config(process__share=1.5), "process.share is 1.5"),
        (small_map_config(process__share=0.05), "which is 0 examples of 8 in 1 parts"),
        (small_map_config(process__share=0.95), "which is 8 examples of 8"),
        (
            small_map_config(process__share=0.3, training__accumulation=4),
            "training.accumulation is 4, which does not divide the 2 examples",
        ),
        (small_map_config(training__label_dropout=0.0), "which training.label_dropout 0 does not"),
        (small_map_config(model__end_time_in="none"), "the network is told one time alone"),
        (small_flow_config(model__end_time_in="sum"), "which the process flow_map alone has"),
        (small_map_config(model__guidance_in="none"), "process.guidance_told is True, and"),
        (small_map_config(model__num_classes=0), "guide by labels, but model.num_classes is 0"),
        (
            small_map_config(sampling__guidance={"kind": "constant", "scale": 1.5}),
            "this map was trained with guidance inside (process.guidance_…), and would be guided "
            "twice: use none",
        ),
        (
            small_flow_config(
                sampling__sampler={"name": "map", "num_steps": 1},
                sampling__guidance={"kind": "none"},
            ),
            "sampler.name is map, which needs the process flow_map",
        ),
        (
            small_config(sampling__sampler={"name": "map", "num_steps": 1}),
            "a network trained to jump: use euler, heun or dpm_solver",
        ),
        (
            made_of_a_flow(model__end_time_from=2),
            "model.end_time_from is 2, but the network has 2 blocks",
        ),
    ],
)
def test_experiments_that_cannot_be(config, message):
    with pytest.raises(UserError) as caught:
        build(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- A map made of a flow, or of DDPM's network.


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """(workdir, final state) of a flow with an inner head."""
    workdir = tmp_path_factory.mktemp("flow")
    return workdir, train(small_flow_config(), workdir=workdir)


def test_a_map_begins_as_the_flow_that_it_is_made_of(flow_run, tmp_path):
    """One command; where both times are equal it is the same to the bit, its averages are the
    flow's, and it trains, draws in one step, and is a file of weights."""
    asked = ["--workdir", str(flow_run[0]), "--to_workdir", str(tmp_path / "map")]
    result = launch("convert", *asked, config=made_of_a_flow(), tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    run = Run(tmp_path / "map")
    setup = setup_experiment(run.config, to_train=False)
    assert setup.experiment.process.guidance_kappa == 0.6
    variables, _ = run.load(setup)
    assert_equal_trees(variables["params"], jax.device_get(flow_run[1].ema))
    flow = build(small_flow_config())
    x, t_B = jax.random.normal(jax.random.key(0), (3, 8, 8, 4)), jnp.array([0.0, 0.5, 1.0])
    label = {"label": jnp.array([1, 5, 10])}
    ours = models.as_network(setup.experiment.model, variables)(x, t_B, {**label, "end_time": t_B})
    theirs = models.as_network(flow.model, flow_run[1].ema_variables)(x, t_B, label)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    changed = {**run.config, "training": {**run.config["training"], "total_steps": 2}}
    assert int(train(changed, workdir=tmp_path / "map").step) == 2
    workdir_to_weights(tmp_path / "map", weights=tmp_path / "map.safetensors")
    config = json.loads((tmp_path / "map" / "config.json").read_text())
    for key, value in (("end_time_in", "sum"), ("guidance_in", "sum")):
        other = {**config, "model": {**config["model"], key: value}}
        with pytest.raises(UserError, match=f"of a network with model.{key}"):
            Weights(tmp_path / "map.safetensors", other)
    one = sample(Run(tmp_path / "map"), seeds=range(2), output=tmp_path / "run.npz")
    other = sample(
        Weights(tmp_path / "map.safetensors", config), seeds=range(2), output=tmp_path / "w.npz"
    )
    np.testing.assert_array_equal(np.load(one)["arr_0"], np.load(other)["arr_0"])


def test_weights_become_a_map(latent_run, flow_run, tmp_path):
    """Those of DDPM's network by way of a flow, that predicts noise; and those of a flow."""
    config = made_of_a_flow(model__inner_head=0).to_dict()
    released = tmp_path / "ddpm.safetensors"
    workdir_to_weights(latent_run[0], weights=released)
    weights_to_workdir(released, workdir=tmp_path / "of_ddpm", config=config)
    run = Run(tmp_path / "of_ddpm")
    process = setup_experiment(run.config, to_train=False).experiment.process
    assert (process.clock, process.prediction) == ("timesteps", "noise")
    changed = {**run.config, "training": {**run.config["training"], "total_steps": 2}}
    state = train(changed, workdir=tmp_path / "of_ddpm")
    assert np.isfinite(np.load(sample(tmp_path / "of_ddpm", seeds=[0]))["arr_0"]).all()
    assert int(state.skipped) == 0
    flow = tmp_path / "flow.safetensors"
    workdir_to_weights(flow_run[0], weights=flow)
    with pytest.raises(UserError, match="has flow_map: diffit convert makes a map of it"):
        Weights(flow, config)
    weights_to_workdir(flow, workdir=tmp_path / "of_flow", config=config)
    params = Run(tmp_path / "of_flow").load(
        setup_experiment(Run(tmp_path / "of_flow").config, to_train=False)
    )[0]["params"]
    assert_equal_trees(params, jax.device_get(flow_run[1].ema))


def test_networks_that_no_map_can_be_made_of(latent_run, flow_run, map_run, tmp_path):
    for workdir, config, message in (
        (latent_run[0], made_of_a_flow(), "holds a run of the process ddpm, and"),
        (flow_run[0], small_flow_config(), "run of the process flow, and --config has flow"),
        (map_run[0], made_of_a_flow(), "holds a run of the process flow_map"),
        (flow_run[0], small_map_config(), "becomes a map with 'blocks' and 'none'"),
        (flow_run[0], made_of_a_flow(model__end_time_from=7), "the network has 2 blocks"),
        (flow_run[0], made_of_a_flow(model__qk_norm=True), "has no QK-norm, which cannot be added"),
    ):  # fmt: skip
        asked = ["--workdir", str(workdir), "--to_workdir", str(tmp_path / "x")]
        result = launch("convert", *asked, config=config, tmp_path=tmp_path)
        assert_one_line_error(result, message)
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="a file of weights has no place for what"):
        workdir_to_weights(map_run[0], weights=tmp_path / "map.safetensors")
    assert not (tmp_path / "map.safetensors").exists()


def test_samples_say_how_many_evaluations_they_took(map_run, flow_run, tmp_path, caplog):
    """Of all networks, guidance's among them: the record and the log."""
    caplog.set_level("INFO")
    for workdir, settings, count in (
        (map_run[0], {"sampler.num_steps": 1}, 1),
        (map_run[0], {"sampler.num_steps": 4}, 4),
        (flow_run[0], {"sampler": "heun", "guidance": "internal", "guidance.label_scale": 1.0}, 7),
        (flow_run[0], {"sampler": "euler", "guidance": "constant", "guidance.scale": 2.0}, 8),
        (flow_run[0], {"sampler": "euler", "guidance": "cfg_zero", "guidance.zero_share": 0.5}, 4),
    ):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        sample(workdir, seeds=[0], output=path, overrides=settings)
        assert json.loads(path.with_suffix(".json").read_text())["evaluations"] == count
        assert f"{count} evaluations of the network for a sample" in caplog.text
