"""EDM against golden values, closed forms and a plain float64 transcription of Algorithm 2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import samplers
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.guidance import unguided
from diffit_jax.errors import UserError

# sigma: c_skip, c_out, c_in, c_noise, lambda, for sigma_data = 0.5, computed in float64 from EDM's
# Table 1.
GOLDEN = {
    0.5: (0.5, 0.35355339, 1.41421356, -0.17328680, 8.0),
    1.0: (0.2, 0.44721360, 0.89442719, 0.0, 5.0),
    80.0: (3.9061e-5, 0.49999023, 0.01249976, 1.09550666, 4.00015625),
    0.002: (0.999984, 0.00199998, 1.999984, -1.55365202, 250004.0),
}
GRID_18 = (
    "80 57.585985 40.785574 28.374585 19.352453 12.910082 8.400935 5.315195 3.256822 "
    "1.923340 1.088171 .585348 .296442 .139516"
)
GRID_18 += " .0599473 .0229345 .00752802 .002 0"


@pytest.mark.parametrize("sigma", GOLDEN)
def test_preconditioning_golden(sigma):
    process = EDM()
    c_skip, c_out, c_in, c_noise, weight = GOLDEN[sigma]
    ours = process.preconditioning(jnp.float32(sigma))
    # The golden values have 5 to 9 digits, float32 has 7.
    np.testing.assert_allclose(ours, (c_skip, c_out, c_in, c_noise), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(process.loss_weight(jnp.float32(sigma)), weight, rtol=1e-6)


def test_output_scale_cancels_the_loss_weight():
    process, sigma = EDM(sigma_data=0.7), jnp.geomspace(0.002, 80, 50)
    np.testing.assert_allclose(
        process.preconditioning(sigma)[1] ** 2 * process.loss_weight(sigma), 1, rtol=1e-5
    )


def test_sampling_grid_golden():
    # The golden values have six digits.
    np.testing.assert_allclose(EDM().sigmas(18), [float(t) for t in GRID_18.split()], rtol=5e-6)
    grid = EDM().sigmas(40)
    np.testing.assert_allclose(
        grid[:5], [80, 69.450946, 60.117395, 51.880318, 44.630202], rtol=2e-8
    )
    np.testing.assert_allclose(grid[-5:], [0.0108120, 0.00643711, 0.00367659, 0.002, 0], rtol=5e-6)
    with pytest.raises(UserError, match="num_steps 1 is too small"):
        EDM().sigmas(1)


def test_denoise_is_equation_7():
    process = EDM(sigma_data=0.6)
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    sigma = jnp.array([0.01, 1.0, 50.0])
    seen = {}

    def network(x, noise_level, conditioning):
        seen.update(x=x, noise_level=noise_level, conditioning=conditioning)
        return jnp.sin(x).astype(jnp.bfloat16)  # a network may compute in less than float32

    out = process.denoise(network, x, sigma, {"label": "passed on"})
    assert out.dtype == jnp.float32 and seen["conditioning"] == {"label": "passed on"}
    for i, s in enumerate(np.array([0.01, 1.0, 50.0])):
        total = s**2 + 0.6**2
        np.testing.assert_allclose(seen["x"][i], x[i] / np.sqrt(total), rtol=1e-5)
        np.testing.assert_allclose(seen["noise_level"][i], np.log(s) / 4, rtol=1e-5, atol=1e-7)
        f = np.asarray(jnp.sin(seen["x"][i]).astype(jnp.bfloat16), np.float64)
        np.testing.assert_allclose(
            out[i], 0.6**2 / total * x[i] + s * 0.6 / np.sqrt(total) * f, rtol=1e-4, atol=1e-6
        )


def test_loss_of_a_known_network():
    """A network that answers 0 has D = c_skip (x + n), whose weighted squared error is 1 on average
    for data of variance sigma_data²."""
    process, batch = EDM(sigma_data=0.5), 4096
    x = 0.5 * jax.random.normal(jax.random.key(0), (batch, 4, 4, 1))
    keys = jax.random.split(jax.random.key(1), batch)
    loss, _ = jax.jit(lambda x, keys: process.loss(lambda x, *_: jnp.zeros_like(x), x, {}, keys))(
        x, keys
    )
    assert loss.shape == (batch,) and loss.dtype == jnp.float32
    # Mean of 4096 × 16 squares of unit variance: standard error 0.006.
    assert abs(float(loss.mean()) - 1) < 0.03


def test_loss_draws_log_normal_noise_levels():
    process, levels = EDM(log_sigma_mean=-0.8, log_sigma_std=1.6), []
    keys = jax.random.split(jax.random.key(1), 20_000)
    process.loss(
        lambda x, level, _: levels.append(level) or x, jnp.zeros((20_000, 1, 1, 1)), {}, keys
    )
    log_sigma = 4 * np.asarray(levels[0], np.float64)
    # Four standard errors.
    assert abs(log_sigma.mean() + 0.8) < 0.05 and abs(log_sigma.std() - 1.6) < 0.04


def test_loss_of_an_example_does_not_depend_on_the_batch():
    process = EDM()
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
    keys = jax.random.split(jax.random.key(1), 6)
    whole, _ = process.loss(lambda x, *_: x, x, {}, keys)
    part, _ = process.loss(lambda x, *_: x, x[2:4], {}, keys[2:4])
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-6)


def algorithm_2(denoise, noise, sigmas, heun):
    """EDM's Algorithm 2 as printed, in float64; `noise(i)` is the i-th draw, 0 the initial one."""
    steps = len(sigmas) - 1
    x, evaluations = sigmas[0] * noise(0), 0
    for i in range(steps):
        gamma = (
            min(heun.churn_amount / steps, np.sqrt(2) - 1)
            if heun.churn_sigma_low <= sigmas[i] <= heun.churn_sigma_high
            else 0
        )
        raised = sigmas[i] * (1 + gamma)
        x = x + np.sqrt(raised**2 - sigmas[i] ** 2) * heun.churn_noise * noise(i + 1)
        slope = (x - denoise(x, raised)) / raised
        following = x + (sigmas[i + 1] - raised) * slope
        evaluations += 1
        if sigmas[i + 1] != 0:
            second = (following - denoise(following, sigmas[i + 1])) / sigmas[i + 1]
            following = x + (sigmas[i + 1] - raised) * (slope + second) / 2
            evaluations += 1
        x = following
    return x, evaluations


@pytest.mark.parametrize("churn", [(), (40, 0.05, 50, 1.003), (5,)])
def test_heun_equals_algorithm_2(churn):
    process, shape, calls = EDM(), (2, 2, 1), []
    heun = samplers.Heun(7, *churn)
    keys = samplers.sample_keys(jnp.array([3, 11], jnp.uint32))
    sigmas = process.sigmas(7)

    def denoise(x, sigma, _):
        jax.debug.callback(lambda s: calls.append(float(s)), sigma[0])
        return jnp.tanh(x / (1 + sigma[:, None, None, None]))

    ours = jax.jit(
        lambda keys: (
            heun.solve(
                unguided(denoise), lambda i: samplers.step_noise(keys, i, shape), {}, sigmas
            ).samples
        )
    )(keys)
    jax.effects_barrier()
    draw = lambda i: np.asarray(samplers.step_noise(keys, i, shape), np.float64)
    expected, evaluations = algorithm_2(lambda x, s: np.tanh(x / (1 + s)), draw, sigmas, heun)
    # Relative to the initial noise of size 80, float32's 6e-8 is 5e-6.
    np.testing.assert_allclose(ours, expected, atol=5e-5)
    assert len(calls) == evaluations == 13


def test_negative_churn():
    with pytest.raises(UserError, match=r"churn_amount is -1: it must be at least 0"):
        samplers.Heun(2, churn_amount=-1)


def test_noise_is_a_function_of_the_seed_number_alone():
    whole = samplers.step_noise(
        samplers.sample_keys(jnp.arange(10, dtype=jnp.uint32)), 4, (3, 3, 1)
    )
    other = samplers.step_noise(samplers.sample_keys(jnp.array([7, 2], jnp.uint32)), 4, (3, 3, 1))
    np.testing.assert_array_equal(other, whole[jnp.array([7, 2])])
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    assert (
        np.abs(
            whole
            - samplers.step_noise(
                samplers.sample_keys(jnp.arange(10, dtype=jnp.uint32)), 5, (3, 3, 1)
            )
        ).max()
        > 0.1
    )


@pytest.mark.parametrize(
    "change", [dict(sigma_min=90.0), dict(sigma_min=0.0), dict(sigma_data=-1.0)]
)
def test_impossible_noise_levels(change):
    with pytest.raises(UserError, match=next(iter(change))):
        EDM(**change)
