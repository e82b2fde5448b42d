"""Averages of a length chosen after training, against golden coefficients, the definition, and a
run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_latent_config

from diffit_jax.errors import UserError
from diffit_jax.experiment import config as experiment
from diffit_jax.run.power_ema import gamma_of, power_rate, reconstruction
from diffit_jax.run.state import setup_experiment
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.sampling.request import Run, reconstruct_variables
from diffit_jax.sampling.sample import sample
from diffit_jax.training.step import ema_update
from diffit_jax.training.train import train

# EDM2's formulas, in float64.
GAMMAS = {
    0.010: 96.99490,
    0.030: 30.31737,
    0.050: 16.97220,
    0.075: 10.28912,
    0.100: 6.93720,
    0.150: 3.55787,
    0.200: 1.82621,
    0.250: 0.71982,
}


@pytest.mark.parametrize("length", GAMMAS)
def test_gamma_golden(length):
    gamma = gamma_of(length)
    np.testing.assert_allclose(gamma, GAMMAS[length], atol=6e-6)
    np.testing.assert_allclose(
        np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))), length, rtol=1e-9
    )


def test_factors_golden():
    """Snapshots at times 1, 2, 3, 4 with lengths 0.05 and 0.10 each; six decimals."""
    times, lengths = np.repeat([1, 2, 3, 4], 2), [0.05, 0.10] * 4
    np.testing.assert_allclose(
        reconstruction(times, lengths, 4, 0.075),
        [0, -1e-6, 1.31e-4, -7.88e-4, 1.1582e-2, -4.4665e-2, 0.336424, 0.697317],
        atol=6e-7,
    )
    np.testing.assert_allclose(
        reconstruction(times, lengths, 4, 0.15),
        [-5.62e-4, 1.944e-3, -1.3148e-2, 3.802e-2, -7.7958e-2, 0.200409, -0.264062, 1.115358],
        atol=6e-7,
    )
    # One that is there.
    np.testing.assert_allclose(reconstruction(times, lengths, 4, 0.10), [0] * 7 + [1], atol=1e-6)
    assert reconstruction(times, lengths, 3, 0.10)[6:].tolist() == [0, 0]
    np.testing.assert_allclose(
        reconstruction(1000 * times, lengths, 4000, 0.15),
        reconstruction(times, lengths, 4, 0.15),
        atol=1e-6,
    )


def test_rate_keeps_its_digits():
    gamma = gamma_of(0.1)
    assert float(power_rate(gamma, jnp.int32(0))) == 1
    for update in (1, 10, 10**4, 10**7):
        exact = -np.expm1((gamma + 1) * np.log1p(-1 / (update + 1)))
        np.testing.assert_allclose(power_rate(gamma, jnp.int32(update)), exact, rtol=1e-6)
    # Late in training plain float32 arithmetic would lose them.
    plain = 1 - (np.float32(1) - np.float32(1) / np.float32(10**7 + 1)) ** np.float32(gamma + 1)
    assert abs(plain / exact - 1) > 0.05


def test_average_is_the_weighted_mean():
    """After N updates, update n has weight close to its share of ∫ t^gamma dt, exactly (n^(g+1) -
    (n-1)^(g+1)) / N^(g+1)."""
    gamma, values, average = (
        gamma_of(0.1),
        np.random.default_rng(0).normal(size=50),
        jnp.float32(7.0),
    )
    for update, value in enumerate(values):
        average = ema_update(average, jnp.float32(value), power_rate(gamma, jnp.int32(update)))
    edges = np.arange(51.0) ** (gamma + 1)
    np.testing.assert_allclose(average, np.sum(np.diff(edges) / edges[-1] * values), rtol=1e-5)


def test_any_length_after_a_random_walk():
    """Thirty-two snapshots of a walk of 4,000 steps: reconstructed averages of 0.075 and 0.15
    against ones that were tracked.

    The distance is far below how much the two lengths differ.
    """
    rng, tracked = np.random.default_rng(1), {}
    walk = np.cumsum(rng.normal(size=4000))
    lengths = (0.05, 0.10, 0.075, 0.15)
    averages, snapshots = dict.fromkeys(lengths, 0.0), []
    for update, value in enumerate(walk):
        for length in lengths:
            rate = (
                -np.expm1((gamma_of(length) + 1) * np.log1p(-1 / (update + 1))) if update else 1.0
            )
            averages[length] += rate * (value - averages[length])
        if (update + 1) % 125 == 0:
            snapshots += [(update + 1, length, averages[length]) for length in (0.05, 0.10)]
    tracked = averages
    times, kept, values = map(np.array, zip(*snapshots, strict=True))
    for length in (0.075, 0.15):
        ours = reconstruction(times, kept, 4000, length) @ values
        assert abs(ours - tracked[length]) < 0.01 * abs(tracked[0.15] - tracked[0.05])


def test_a_run_with_snapshots(tmp_path):
    """Resumed in the middle; a length that was tracked comes back as it was, another lies apart,
    and sampling takes either."""
    config = lambda **more: small_latent_config(
        ema={"halflife_images": 64, "power_lengths": (0.05, 0.10), "snapshot_steps": 2},
        training__checkpoint_steps=3,
        **more,
    )
    train(config(training__total_steps=3), workdir=tmp_path)
    state = train(config(training__total_steps=8), workdir=tmp_path)
    whole = train(config(training__total_steps=8), workdir=tmp_path / "whole")
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Checkpoints(tmp_path / "ema_snapshots").steps() == [2, 3, 4, 6, 8]
    setup = setup_experiment(config())
    step, variables = reconstruct_variables(tmp_path, setup, 0.10)
    assert step == 8
    for ours, theirs in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(state.power_emas[1]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    _, other = reconstruct_variables(tmp_path, setup, 0.07)
    distance = lambda a, b: max(
        np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert distance(other["params"], variables["params"]) > 1e-5
    path = sample(Run(tmp_path, ema_length=0.07), seeds=[0, 1], output=tmp_path / "s.npz")
    assert path.exists()


def test_impossible_lengths(latent_run):
    for length in (0, 0.3, -1):
        with pytest.raises(UserError, match=r"EMA length .* must lie between 0 and 0.289"):
            gamma_of(length)
    with pytest.raises(
        UserError, match=r"has no snapshots of averages: train with ema.power_lengths"
    ):
        sample(Run(latent_run[0], ema_length=0.1), seeds=[0])
    with pytest.raises(
        UserError, match=r"ema.power_lengths has 0.4: each must be between 0 and 0.289"
    ):
        experiment.build(
            small_latent_config(ema={"halflife_images": 64, "power_lengths": (0.05, 0.4)})
        )
