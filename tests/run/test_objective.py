"""Objectives of other kinds than the process's loss: with parameters of their own, a teacher, and
two noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config, small_latent_config
from support.processes import at_question, checkpoints_of
from support.trees import assert_equal_trees

from diffit_jax import models
from diffit_jax.experiment.config import build
from diffit_jax.run.objective import AVERAGE, Objective
from diffit_jax.run.state import abstract_state
from diffit_jax.runtime import distributed, interruption, parallel
from diffit_jax.sampling.request import Run
from diffit_jax.sampling.sample import sample
from diffit_jax.training.train import train


class Projection(Objective):
    """A linear head that guesses an image's mean grey from the network's output, and a teacher's
    weight beside it."""

    def terms(self, experiment):
        return (*experiment.process.loss_terms, "projection")

    def init(self, experiment, key):
        size = np.prod(experiment.model.sample_shape)
        return {"head": {"kernel": 0.01 * jax.random.normal(key, (size, 1)), "bias": jnp.zeros(1)}}

    def __call__(self, experiment, variables, frozen, examples, *, key_B, **more):
        loss_B, terms = super().__call__(
            experiment, variables, frozen, examples, key_B=key_B, **more
        )
        x_BHWC, _ = experiment.space.to_model(examples, key_B, frozen)
        head = variables["objective"]["head"]
        y = models.as_network(experiment.model, variables)(x_BHWC, jnp.zeros(len(x_BHWC)), {})
        y = y[..., : x_BHWC.shape[-1]]  # without the variance
        guess_B = (y.reshape(len(y), -1) @ head["kernel"] + head["bias"])[:, 0]
        error_B = (guess_B - frozen["offset"] - x_BHWC.mean((1, 2, 3))) ** 2
        return loss_B + error_B, {**terms, "projection": error_B}


def projection():
    objective = Projection()
    objective.frozen = {"offset": jnp.float32(0.25)}
    return objective


def test_a_projection_head_is_trained_saved_and_resumed(tmp_path, monkeypatch):
    """It has an item of its own in checkpoints, an interrupted run ends as one that was not, bit
    for bit, and who only samples sees nothing of it."""
    config = small_latent_config(training__total_steps=4)
    whole = train(config, workdir=tmp_path / "whole", objective=projection())
    assert set(whole.objective) == {"params", "opt_state"}
    fresh = projection().init(
        build(config), jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 1)
    )
    moved = whole.objective["params"]["head"]["kernel"] - fresh["head"]["kernel"]
    assert np.abs(moved).max() > 1e-4
    plain = abstract_state(build(config), parallel.make_mesh(jax.devices()[:1]))
    for ours, theirs in ((whole.params, plain.params), (whole.ema, plain.ema)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.structure(whole.opt_state) == jax.tree.structure(plain.opt_state)

    monkeypatch.setattr(distributed.PreemptionNotice, "reached", at_question(3))
    with pytest.raises(interruption.Preempted):
        train(config, workdir=tmp_path / "halves", objective=projection())
    monkeypatch.undo()
    assert checkpoints_of(tmp_path / "halves") == [2, 3]
    assert (tmp_path / "halves/checkpoints/3/objective").exists()
    assert_equal_trees(train(config, workdir=tmp_path / "halves", objective=projection()), whole)
    for raw in (False, True):
        assert sample(Run(tmp_path / "whole", raw=raw), seeds=[0]).exists()


def test_without_parameters_the_checkpoint_is_what_it_was(latent_run):
    workdir, state = latent_run
    items = {path.name for path in (workdir / "checkpoints/6").iterdir() if path.is_dir()}
    assert items == {"state", "ema", "constants", "facts"} and state.objective == {}


class OfAverage(Objective):
    """The distance between the network and its own running average."""

    uses = (AVERAGE,)

    def __call__(self, experiment, variables, frozen, examples, *, key_B, **more):
        x_BHWC, _ = experiment.space.to_model(examples, key_B, frozen)
        level_B = jnp.zeros(len(x_BHWC))
        ours, teachers = (
            models.as_network(experiment.model, each)(x_BHWC, level_B, {})
            for each in (variables, frozen[AVERAGE])
        )
        error_B = ((ours - teachers) ** 2).mean((1, 2, 3))
        return error_B + 0.0 * more["update"], dict.fromkeys(self.terms(experiment), error_B)


def test_a_teacher_that_is_the_average(tmp_path):
    """It is the network itself before the first update: nothing moves, but the loss is finite."""
    config = small_latent_config(training__total_steps=3)
    state = train(config, workdir=tmp_path, objective=OfAverage())
    assert int(state.skipped) == 0
    assert_equal_trees(state.params, state.ema)


class AtTwoLevels(Objective):
    """Less noise shall not be denoised worse: an example at a noise level, and at half of it."""

    def __call__(self, experiment, variables, frozen, examples, *, key_B, **more):
        process = experiment.process
        x_BHWC, _ = experiment.space.to_model(examples, key_B, frozen)
        noised = process.noise(x_BHWC, key_B)
        less = process.noised_at(x_BHWC, noised.draws["sigma"] / 2, noised.draws["noise"])
        network = models.as_network(experiment.model, variables)
        losses = [
            process.loss_of(one, network(one.x_BHWC, one.level_B, {}))[0] for one in (noised, less)
        ]
        return sum(losses), {}


def test_an_objective_with_two_noise_levels_trains(tmp_path):
    state = train(small_config(training__total_steps=3), workdir=tmp_path, objective=AtTwoLevels())
    assert int(state.step) == 3 and int(state.skipped) == 0
