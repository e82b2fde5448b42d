"""Optimisers against their formulas, and what a step does with accumulation, clipping and gradients
that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.configs import small_config, small_flow_config, small_latent_config, small_map_config

from diffit_jax import models
from diffit_jax.data.sources import ShuffledBatches
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.experiment.sections import Optimizer
from diffit_jax.models.diffit.latent import LatentDiffiT
from diffit_jax.run.objective import Objective, objective_of
from diffit_jax.run.optimizer import decays, learning_rate, make_optimizer
from diffit_jax.run.state import Setup, create_state, open_training_data
from diffit_jax.runtime import parallel
from diffit_jax.training import train as loop
from diffit_jax.training.step import compile_train_step
from diffit_jax.training.train import train

PLAIN = dict(learning_rate=0.1, warmup_steps=0)


def test_cosine_schedule():
    settings = Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine", decay_steps=110)
    rates = [float(learning_rate(settings, update)) for update in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 5e-4, 0, 0], atol=1e-9)
    with pytest.raises(UserError, match=r"optimizer\.decay_steps is 0: it must be above 10"):
        Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine")


def one_update(settings, gradient, params, model=None):
    optimizer = make_optimizer(settings, model)
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    return jax.tree.map(np.asarray, update)


def test_weight_decay_is_adamws_and_spares_what_is_no_matrix():
    params = {
        "a": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([2.0])},
        "label": {"embedding": jnp.ones(3)},
    }
    gradient = jax.tree.map(jnp.ones_like, params)
    ours = one_update(Optimizer(**PLAIN, weight_decay=0.3), gradient, params)
    plain = one_update(Optimizer(**PLAIN), gradient, params)
    np.testing.assert_allclose(
        ours["a"]["kernel"], plain["a"]["kernel"] - 0.1 * 0.3 * np.array([2.0, -1.0]), rtol=1e-6
    )
    np.testing.assert_array_equal(ours["a"]["bias"], plain["a"]["bias"])
    np.testing.assert_array_equal(ours["label"]["embedding"], plain["label"]["embedding"])


@pytest.mark.parametrize("config", [small_config(), small_latent_config()])
def test_what_decays(config):
    experiment = build(config)
    params = jax.eval_shape(lambda: create_state(experiment, parallel.make_mesh())).params
    metadata = models.parameter_metadata(experiment.model)
    assert metadata.keys() == dict(parallel.named(params)).keys()
    for path, decaying in jax.tree_util.tree_leaves_with_path(decays(params, metadata)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decaying == name.endswith("kernel"), name
        assert not (decaying and ("bias" in name or "norm" in name or "embedding" in name))


def test_lamb_measures_each_layer_by_itself():
    """Against the formula, layer by layer: Adam's first step has entries ±1, so a layer's update is
    as long as √(its size)."""
    rng = np.random.default_rng(0)
    stack, single = (
        rng.normal(size=(3, 4, 2)) * np.array([1, 10, 0])[:, None, None],
        rng.normal(size=5),
    )
    params = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        {"blocks": {"kernel": stack}, "final": {"bias": single}},
    )
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    ours = one_update(
        Optimizer(**PLAIN, name="lamb", epsilon=1e-12),
        gradient,
        params,
        LatentDiffiT(8, hidden_size=8, depth=1, num_heads=1),
    )
    sign = lambda g: np.sign(np.asarray(g))
    for layer in range(3):
        norm = np.linalg.norm(stack[layer])
        ratio = norm / np.sqrt(8) if norm else 1.0  # an all-zero layer moves by Adam's step
        np.testing.assert_allclose(
            ours["blocks"]["kernel"][layer],
            -0.1 * ratio * sign(gradient["blocks"]["kernel"][layer]),
            rtol=1e-5,
        )
    expected = -0.1 * np.linalg.norm(single) / np.sqrt(5) * sign(gradient["final"]["bias"])
    np.testing.assert_allclose(ours["final"]["bias"], expected, rtol=1e-5)
    whole = one_update(Optimizer(**PLAIN, name="lamb", epsilon=1e-12), gradient, params)
    # One ratio for the stack is something else.
    assert np.abs(whole["blocks"]["kernel"] - ours["blocks"]["kernel"]).max() > 0.1


def test_models_name_their_stacks():
    for config, names in (
        (small_config(), ("encoder_0", "decoder_0")),
        (small_latent_config(), ("blocks",)),
    ):
        model = build(config).model
        assert model.stacked == names
        params = jax.eval_shape(
            lambda c=config: create_state(build(c), parallel.make_mesh())
        ).params
        depth = model.num_blocks[0] if hasattr(model, "num_blocks") else model.depth
        for name in set(names) & params.keys():
            assert {leaf.shape[0] for leaf in jax.tree.leaves(params[name])} == {depth}


def test_long_gradients_are_shortened():
    params, gradient = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([3.0, 4.0])}
    optimizer = make_optimizer(Optimizer(**PLAIN, max_gradient_norm=1.0))
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    (adam,) = [
        part
        for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if hasattr(part, "mu")
    ]
    np.testing.assert_allclose(adam.mu["kernel"], 0.1 * np.array([0.6, 0.8]), rtol=1e-6)


def run_steps(config, batches_of, objective=None):
    """State after one step for each batch, from a fresh one."""
    experiment = build(config)
    setup = Setup(experiment, parallel.make_mesh(), objective or objective_of(experiment))
    state, step = create_state(setup.experiment, setup.mesh), None
    for batch in batches_of:
        batch = parallel.put_batch(setup.mesh, batch, len(batch["label"]))
        if step is None:
            step, collected, _ = compile_train_step(setup, state, batch)
        state, collected = step(state, collected, batch, {})
    return state, {name: float(value) for name, value in collected.compute().items()}


def synthetic(config, count):
    experiment = build(config)
    data = ShuffledBatches(open_training_data(experiment), experiment.training.batch_size, 0)
    return [data[index] for index in range(count)]


def test_a_bad_batch_moves_the_data_on_and_nothing_else():
    """Good, bad, good equals a run whose second batch never counted, but for the random numbers of
    the third, which follow the data."""
    config = small_latent_config(optimizer={"learning_rate": 1e-2, "warmup_steps": 4})
    first, bad, last = synthetic(config, 3)
    bad = bad | {"latent": np.full_like(bad["latent"], np.nan)}
    before, _ = run_steps(config, [first])
    after, values = run_steps(config, [first, bad])
    assert (int(after.step), int(after.skipped), int(after.consecutive_skipped)) == (2, 1, 1)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert np.isfinite(values["loss"]) and values["skipped"] == 1  # the mean is over updates
    end, values = run_steps(config, [first, bad, last])
    assert (int(end.step), int(end.skipped), int(end.consecutive_skipped)) == (3, 1, 0)
    # The third batch was the second update: the schedule stood still.
    np.testing.assert_allclose(values["learning_rate"], 1e-2 / 4, rtol=1e-6)
    counts = [int(leaf) for leaf in jax.tree.leaves(end.opt_state) if leaf.dtype == jnp.int32]
    assert counts and set(counts) == {2}


@pytest.mark.parametrize("replace", [False, True])
def test_gradients_that_are_not_finite_are_replaced_only_if_asked_for(replace):
    """With a finite loss: EDM's code makes them 0 and ±100,000, ours skips the update."""

    @jax.custom_vjp
    def spoiled(x):
        return jnp.sum(x)

    spoiled.defvjp(
        lambda x: (jnp.sum(x), x.shape),
        lambda shape, g: (jnp.resize(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 2.0]), shape),),
    )

    class Spoiled(Objective):
        def __call__(self, experiment, variables, frozen, examples, *, key_B, **more):
            loss_B = jnp.full(len(key_B), spoiled(variables["params"]["final"]["bias"]))
            return loss_B, {"mse": jnp.zeros(len(key_B)), "vb": jnp.zeros(len(key_B))}

    config = small_latent_config(optimizer__replace_nonfinite=replace, optimizer__warmup_steps=0)
    state, _ = run_steps(config, synthetic(config, 1), Spoiled())
    assert int(state.skipped) == (not replace)
    (adam,) = [
        part
        for part in jax.tree.leaves(
            state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if hasattr(part, "mu")
    ]
    first = np.array([0, 1e4, -1e4, 0.2]) * replace  # a tenth of the gradient
    np.testing.assert_allclose(adam.mu["final"]["bias"][:4], first, rtol=1e-6)


def test_too_many_bad_batches_end_the_run(tmp_path, monkeypatch):
    """The last good checkpoint is named, and stays."""

    class Poisoned:
        def __init__(self, source):
            self._source = source
            self.image_shape, self.num_classes = source.image_shape, source.num_classes

        def __len__(self):
            return len(self._source)

        def read(self, indices):
            batch = self._source.read(indices)
            return batch | {"latent": batch["latent"] * np.inf}

    train(small_latent_config(training__total_steps=2), workdir=tmp_path)
    monkeypatch.setattr(
        loop, "open_training_data", lambda experiment: Poisoned(open_training_data(experiment))
    )
    with pytest.raises(
        UserError, match=r"the last 4 batches up to step 6 had .* checkpoint 2 in .*, the last good"
    ):
        train(
            small_latent_config(training__max_bad_steps=3, training__checkpoint_steps=100),
            workdir=tmp_path,
        )
    assert (tmp_path / "checkpoints" / "2").exists()


TERMS = {
    small_latent_config: ("mse",),
    small_flow_config: ("direction", "inner"),
    small_map_config: ("flow_error", "map_error", "inner"),
}


@pytest.mark.parametrize("make", TERMS)
def test_accumulation_is_the_whole_batch(make):
    config = make()
    whole, values = run_steps(config, synthetic(config, 2))
    parts, part_values = run_steps(make(training__accumulation=4), synthetic(config, 2))
    for name in ("loss", *TERMS[make]):
        np.testing.assert_allclose(part_values[name], values[name], rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert dataclasses.is_dataclass(parts)
