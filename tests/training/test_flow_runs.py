"""Runs by flow matching: training, drawing, weights, and flows made of other networks."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.commands import assert_one_line_error, launch
from support.configs import small_flow_config, small_latent_config
from support.samples import assert_samples_follow_their_seeds
from support.trees import assert_equal_trees

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.evaluation.info import info
from diffit_jax.experiment.config import build
from diffit_jax.interop import official
from diffit_jax.run.state import setup_experiment
from diffit_jax.sampling.analysis import analyse
from diffit_jax.sampling.convert import weights_to_workdir, workdir_to_weights
from diffit_jax.sampling.request import Run, Weights
from diffit_jax.sampling.sample import sample
from diffit_jax.training.loggers import read_figures
from diffit_jax.training.train import train


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """(workdir, final state) of a run of six updates."""
    workdir = tmp_path_factory.mktemp("flow")
    return workdir, train(small_flow_config(), workdir=workdir)


@pytest.fixture(scope="module")
def weights(flow_run, tmp_path_factory):
    """Its exported weights."""
    path = tmp_path_factory.mktemp("weights") / "flow.safetensors"
    workdir_to_weights(flow_run[0], weights=path)
    return path


def test_all_parts_of_the_loss_are_logged(flow_run):
    figures = read_figures(flow_run[0])
    for update, loss in figures["loss"].items():
        inner, direction = figures["inner"][update], figures["direction"][update]
        # Both heads return 0 at first: the inner loss is that of the outer one.
        assert 0 < direction < loss < 2 * loss and inner > 0
        if update == 2:
            np.testing.assert_allclose(loss, 1.5 * inner, rtol=0.02)


def test_what_a_run_says_of_its_clock(flow_run):
    assert "    t is 0 at data and 1 at noise; the network is told t" in info(flow_run[0])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(flow_run, tmp_path):
    train(small_flow_config(training__total_steps=3), workdir=tmp_path)
    assert_equal_trees(train(small_flow_config(), workdir=tmp_path), flow_run[1])


SETTINGS = {
    "as configured": {},
    "euler, CFG-Zero*": {"sampler": "euler", "guidance": "cfg_zero"},
    "heun, an interval of t": {
        "sampler": "heun", "guidance": "time_interval", "guidance.t_high": 0.7
    },
    "along the path": {"sampler": "general", "sampler.grid": "flow", "sampler.schedule": "flow",
                       "sampler.shift": 2.0, "guidance": "interval"},
    "dpm_solver, within": {"sampler": "dpm_solver", "guidance": "internal"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_sampler_and_guidance_draws(flow_run, name, tmp_path):
    assert_samples_follow_their_seeds(flow_run[0], SETTINGS[name], tmp_path)


def test_attention_is_followed_from_all_noise(flow_run):
    """Down the noise levels of steps even in t: the first stands for an infinite one."""
    run = Run(flow_run[0])
    setup = setup_experiment(run.config, to_train=False)
    found = analyse.follow(setup, run.load(setup)[0], images=2, steps=3)
    np.testing.assert_allclose(found.sigmas[0], 1e6)
    assert np.isfinite(found.denoised).all() and len(found.layers) == 2


def test_weights_carry_the_inner_head_and_the_process(flow_run, weights, tmp_path):
    """They draw what the run draws, to the bit, and are read back number for number."""
    module, variables = official.load(weights)
    assert module.inner_head == 1 and not module.learn_sigma
    averages = jax.device_get(flow_run[1].ema)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], averages)
    config = json.loads((flow_run[0] / "config.json").read_text())
    ours = sample(Run(flow_run[0]), seeds=range(2), output=tmp_path / "run.npz")
    theirs = sample(Weights(weights, config), seeds=range(2), output=tmp_path / "weights.npz")
    np.testing.assert_array_equal(np.load(ours)["arr_0"], np.load(theirs)["arr_0"])
    assert any("flow" in line for line in info(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": {"name": "ddpm"}}, "are of the process flow, and the config has ddpm"),
        ({"process": {"name": "flow", "clock": "u"}}, "with process.clock t, and the config has u"),
        (
            {"process": {"name": "flow", "prediction": "noise"}},
            "with process.prediction velocity, and the config has noise: set it to velocity",
        ),
        ({"process": {"name": "flow", "path": "cosine"}}, "process.path linear"),
    ],
)
def test_weights_of_another_prediction_or_clock(weights, change, message, tmp_path):
    config = small_flow_config().to_dict() | change
    for refused in (
        lambda: Weights(weights, config),
        lambda: weights_to_workdir(weights, workdir=tmp_path / "run", config=config),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__inner_head=2), "model.inner_head is 2, but the network has 2 blocks"),
        (dict(model__inner_head=0), "but the network has no inner head"),
        (dict(process__shift=0.0), "process.shift is 0.0: it must be above 0"),
        (dict(model__learn_sigma=True), "wants a network with 4 output channels"),
        (
            dict(sampling__guidance={"kind": "cfg_zero", "scale": 2.0},
                 sampling__sampler={"name": "dpm_solver", "num_steps": 4}),
            "which compares velocities: use the sampler euler, heun, sde",
        ),
        (dict(sampling__sampler={"name": "ddim", "num_steps": 4}), "needs the process ddpm"),
        (
            dict(process={"name": "edm"}, model__inner_head=1),
            "sampler.name is sde, which needs the process flow",
        ),
        (
            dict(process={"name": "edm"}, sampling__sampler={"name": "euler", "num_steps": 4},
                 sampling__guidance={"kind": "time_interval", "scale": 2.0}),
            "guidance.kind is time_interval, which needs the process flow",
        ),
        (dict(process__weighting="velocity"), "process.weighting is velocity, which does not go"),
    ],
)  # fmt: skip
def test_experiments_that_cannot_be(changes, message):
    with pytest.raises(UserError) as caught:
        build(small_flow_config(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- A flow made of DDPM's network.


@pytest.fixture(scope="module")
def released(latent_run, tmp_path_factory):
    """Weights in the released layout, with a learned variance, of the small latent run."""
    path = tmp_path_factory.mktemp("released") / "ddpm.safetensors"
    workdir_to_weights(latent_run[0], weights=path)
    return path


def test_a_flow_begins_as_the_network_that_it_is_made_of(latent_run, released, tmp_path):
    """One command; the denoisers at equal noise levels differ by rounding: 1e-5 at most of the
    largest value (measured 2e-7). Then it trains and draws."""
    config = small_flow_config()
    asked = ["--weights", str(released), "--to_workdir", str(tmp_path / "flow")]
    config.sampling.guidance = {"kind": "constant", "scale": 1.5}
    result = launch("convert", *asked, config=config, tmp_path=tmp_path)
    assert result.returncode == 0, result.stderr
    run = Run(tmp_path / "flow")
    setup = setup_experiment(run.config, to_train=False)
    process = setup.experiment.process
    assert (process.clock, process.prediction, process.weighting) == (
        "timesteps", "noise", "velocity",
    )  # fmt: skip
    assert setup.experiment.model.output_channels == 4
    variables, _ = run.load(setup)
    before = build(small_latent_config())
    theirs = latent_run[1].ema_variables
    rng = np.random.default_rng(0)
    label = {"label": jnp.array([1, 5, 10])}
    network = models.as_network(setup.experiment.model, variables)
    plain = models.as_network(before.model, theirs)
    for sigma in ([0.02, 0.5, 2.0], [8.0, 40.0, 150.0]):
        sigma_B = jnp.float32(sigma)
        x = rng.normal(size=(3, 8, 8, 4)) + np.reshape(sigma, (-1, 1, 1, 1)) * rng.normal(
            size=(3, 8, 8, 4)
        )
        x = jnp.float32(x)
        ours = jax.jit(process.denoise, static_argnums=0)(network, x, sigma_B, label)
        other = jax.jit(before.process.denoise, static_argnums=0)(plain, x, sigma_B, label)
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5 * np.abs(other).max())
    changed = copy.deepcopy(run.config)
    changed["training"] |= {"total_steps": 2}
    state = train(changed, workdir=tmp_path / "flow")
    assert int(state.step) == 2
    drawn = sample(tmp_path / "flow", seeds=[0], overrides={"sampler": "heun"})
    assert np.isfinite(np.load(drawn)["arr_0"]).all()
    # And what it has become is a file of its own.
    workdir_to_weights(tmp_path / "flow", weights=tmp_path / "tuned.safetensors")
    assert Weights(tmp_path / "tuned.safetensors", state_config(tmp_path / "flow")).config


def state_config(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_networks_that_no_flow_can_be_made_of(released, weights, tmp_path):
    config = small_flow_config().to_dict()
    with pytest.raises(UserError, match="are of the process ddpm, and the config has flow"):
        Weights(released, config)  # sampled, not converted
    module, variables = official.load(released)
    cosine = small_latent_config(process={"name": "ddpm", "schedule": "cosine"}).to_dict()
    carried = {"diffit_jax_config": cosine}
    official.save(tmp_path / "cosine.safetensors", module, variables, metadata=carried)
    asked = ["--weights", str(tmp_path / "cosine.safetensors"), "--to_workdir", str(tmp_path / "x")]
    result = launch("convert", *asked, config=small_flow_config(), tmp_path=tmp_path)
    assert_one_line_error(result, "process.schedule cosine: a flow can be made of one with linear")
    assert not (tmp_path / "x").exists()
