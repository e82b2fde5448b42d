"""Discrete diffusion against golden tables, losses and trajectories of the released code's
diffusion, and scalar cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import WEIGHTS, golden, loss_at

from diffit_jax import models
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.schedule import Schedule, respaced_timesteps
from diffit_jax.errors import UserError
from diffit_jax.interop import official

PROCESS = DDPM()


@pytest.fixture(scope="module")
def network_a():
    return official.load(WEIGHTS["a"])


# --- Tables


def test_schedule_golden():
    """Float64 tables; two ways to compute them differ by 4e-13 at most."""
    tables = golden("schedule_linear1000.npz")
    compared = 0
    for key, expected in tables.items():
        name, _, respacing = key.removesuffix("]").partition("[")
        if name == "log_one_minus_alphas_cumprod":  # not needed here
            continue
        steps = PROCESS.schedule_for(respacing)
        if name == "betas_squaredcos":
            name, steps = "betas", DDPM(schedule="cosine").schedule_for()
        ours = getattr(steps, {"timestep_map": "timesteps"}.get(name, name))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12, err_msg=key)
        compared += 1
    assert compared == 42


def test_respacing_of_250():
    """246 gaps of 4 and three of 5, after 164, 497 and 830."""
    timesteps = respaced_timesteps(1000, "250")
    gaps = np.diff(timesteps)
    assert (
        (gaps == 4).sum() == 246
        and timesteps[:-1][gaps == 5].tolist() == [164, 497, 830]
        and timesteps[-1] == 999
    )
    assert (
        respaced_timesteps(1000, "1").tolist() == [0] and len(respaced_timesteps(1000, "")) == 1000
    )


def test_respacing_sums_up_its_stride():
    """Where a place ends in a half, ADM's rounding depends on how it was computed: 21 strides of
    49.95 reach 499.49999…, not 499.5."""
    for counts in ([21], [23], [31], [249], [251], [369, 48], [375, 139], [7, 33, 61]):
        expected, start = [], 0
        for section, count in enumerate(counts):
            size = 1000 // len(counts) + (section < 1000 % len(counts))
            place = 0.0
            for _ in range(count):
                expected.append(start + round(place))
                place += (size - 1) / (count - 1)
            start += size
        assert respaced_timesteps(1000, ",".join(map(str, counts))).tolist() == expected
    assert respaced_timesteps(1000, "21")[10] == 499


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("1001", "has more steps than the schedule's 1000"),
        ("600,600", "has more steps than the schedule's 1000"),
        ("600,10", "wants 600 steps of a section of 500"),
        ("ddim3000", "has more steps than the schedule's 1000"),
        ("ddim999", "no whole stride gives 999"),
        ("many", "'many' is not a respacing"),
        ("0", "'0' is not a respacing"),
        ("ddim10,10", "is not a respacing"),
    ],
)
def test_impossible_respacings(respacing, message):
    with pytest.raises(UserError, match=message):
        PROCESS.schedule_for(respacing)


def test_schedule_scales_with_its_length():
    """Linear betas of other lengths keep the noise at the end: alpha_bar is 4e-5 at 1,000 steps;
    cosine betas never pass 0.999."""
    for count in (250, 4000):
        assert 3e-5 < Schedule.make("linear", count).alphas_cumprod[-1] < 6e-5
    assert Schedule.make("cosine", 1000).betas.max() == 0.999


def test_timestep_of_inverts_the_levels():
    levels = PROCESS.schedule_for().sqrt_recipm1_alphas_cumprod
    np.testing.assert_array_equal(PROCESS.schedule_for().timestep_of(levels), np.arange(1000))
    assert PROCESS.schedule_for().timestep_of(np.array([1e-9, 1e9])).tolist() == [0, 999]
    between = PROCESS.schedule_for().timestep_of(np.sqrt(levels[10:11] * levels[11:12]))
    np.testing.assert_allclose(between, 10.5)


# --- One step and losses


def test_scalar_golden():
    """x_0 = 0.3, epsilon = 0.5, predicted 0.4, v = 0.2, computed in float64 from the formulas."""
    constant = jnp.array([0.4, 0.2]) * jnp.ones((3, 1, 1, 2))
    x0, noise, k = jnp.full((3, 1, 1, 1), 0.3), jnp.full((3, 1, 1, 1), 0.5), jnp.array([500, 1, 0])
    steps = PROCESS.schedule_for()
    noisy = PROCESS.diffuse(x0, k, noise, steps)
    p = PROCESS.predict(constant, noisy, k, steps)
    flat = lambda x: np.ravel(x)
    np.testing.assert_allclose(flat(noisy)[[0, 2]], [0.5638332515, 0.3049849996], rtol=1e-6)
    np.testing.assert_allclose(flat(p.x0)[0], 0.6442967113, rtol=1e-5)
    np.testing.assert_allclose(
        flat(PROCESS.posterior(x0, noisy, k, steps)[0])[0], 0.5614265056, rtol=1e-6
    )
    np.testing.assert_allclose(flat(p.mean)[0], 0.5624793846, rtol=1e-6)
    np.testing.assert_allclose(
        flat(p.log_variance), [-4.5995351527, -9.3439018773, -9.4528942773], rtol=1e-6
    )
    _, parts = loss_at(PROCESS, lambda *_: constant, x0, k, noise, {})
    # The first is a difference of nearly equal numbers: (m_1 - m_2)² / variance / 2, where m has 7
    # digits.
    np.testing.assert_allclose(parts["vb"][1:], [0.0746870673, 1.5566440339], rtol=2e-5)
    np.testing.assert_allclose(parts["vb"][0], 7.961143e-5, rtol=5e-3)


def test_distributions_golden():
    data, steps = golden("train_losses.npz"), PROCESS.schedule_for()
    half = lambda name: jnp.asarray(data[name][:4])
    k = half("t")
    # Bound 1e-5 of the largest value: x_0 of the noisiest step is a difference of numbers 150 times
    # as large.
    close = lambda ours, name: np.testing.assert_allclose(
        ours, half(name), rtol=0, atol=1e-5 * np.abs(half(name)).max()
    )
    noisy = PROCESS.diffuse(half("x0"), k, half("noise"), steps)
    close(noisy, "x_t")
    mean, log_variance = PROCESS.posterior(half("x0"), half("x_t"), k, steps)
    close(mean, "q_post_mean")
    close(np.broadcast_to(log_variance, mean.shape), "q_post_logvar")
    p = PROCESS.predict(half("model_out"), half("x_t"), k, steps)
    close(p.mean, "p_mean")
    close(p.log_variance, "p_logvar")
    close(p.x0, "p_xstart")


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("hybrid", PROCESS),
        ("rescaled", DDPM(loss_type="hybrid_rescaled")),
        ("kl", DDPM(loss_type="kl")),
        ("spaced25", DDPM(respacing="25")),
    ],
)
def test_losses_golden(network_a, name, process):
    """Relative 1e-5; a float32 port measures 2e-6. The respaced case shows that the network is told
    the original timestep."""
    data = golden("train_losses.npz")
    k = data["t25" if name == "spaced25" else "t"]
    loss, parts = jax.jit(
        lambda variables: loss_at(
            process,
            models.as_network(network_a[0], variables),
            jnp.asarray(data["x0"]),
            jnp.asarray(k),
            jnp.asarray(data["noise"]),
            {"label": data["y"]},
        )
    )(network_a[1])
    np.testing.assert_allclose(loss, data[f"{name}_loss"], rtol=1e-5)
    for part in ("mse", "vb"):
        if f"{name}_{part}" in data:
            np.testing.assert_allclose(parts[part], data[f"{name}_{part}"], rtol=1e-5)
    assert set(parts) == set(process.loss_terms)


def test_hybrid_gradient_golden(network_a):
    """Gradients of the mean hybrid loss, within 1e-4 of each one's maximum (measured 4e-5); they
    show the stop-gradient inside vb."""
    module, variables = network_a
    data = golden("train_losses.npz")

    def mean_loss(params):
        network = models.as_network(module, variables | {"params": params})
        loss, _ = loss_at(
            PROCESS,
            network,
            jnp.asarray(data["x0"]),
            jnp.asarray(data["t"]),
            jnp.asarray(data["noise"]),
            {"label": data["y"]},
        )
        return loss.mean()

    gradient = jax.jit(jax.grad(mean_loss))(variables["params"])
    attention = gradient["blocks"]["attention"]
    ours = {
        "final_bias": gradient["final"]["bias"],
        "final_weight": gradient["final"]["kernel"].T,
        "rpb0": attention["relative_position_bias"][0],
        "qkv_temb0": attention["time_qkv_kernel"][0].reshape(64, -1).T,
        "patch": gradient["patch_embed"]["kernel"]
        .reshape(2, 2, 4, 64)
        .transpose(3, 0, 1, 2),  # (out, row, column, in)
        "ytable": gradient["time"]["label"]["embedding"],
    }
    for name, value in ours.items():
        expected = data[f"hybrid_grad_{name}"]
        np.testing.assert_allclose(
            value, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


def test_bound_trains_the_variance_alone():
    process, x0 = DDPM(), jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    y = jax.random.normal(jax.random.key(2), (4, 2, 2, 2)) * 0.3

    def bound(y):
        k = jnp.array([0, 1, 500, 999])
        return loss_at(process, lambda *_: y, x0, k, noise, {})[1]["vb"].sum()

    gradient = jax.grad(bound)(y)
    assert not gradient[..., 0].any() and np.abs(gradient[..., 1]).min() > 0


def test_loss_draws_uniform_steps_and_does_not_depend_on_the_batch():
    seen, process = [], DDPM(variance="fixed_small", loss_type="mse")
    keys = jax.random.split(jax.random.key(1), 20_000)
    process.loss(lambda x, t, _: seen.append(t) or x, jnp.zeros((20_000, 1, 1, 1)), {}, keys)
    steps = np.asarray(seen[0])
    # Four standard errors.
    assert steps.min() == 0 and steps.max() == 999 and abs(steps.mean() - 499.5) < 9
    # Four standard deviations of a bin.
    assert np.abs(np.histogram(steps, 10)[0] - 2000).max() < 180
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
    whole, _ = process.loss(lambda x, *_: x, x, {}, keys[:6])
    part, _ = process.loss(lambda x, *_: x, x[2:4], {}, keys[2:4])
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_fixed_variances(clip):
    steps, k = PROCESS.schedule_for("10"), jnp.array([0, 9])
    x, y = jnp.ones((2, 1, 1, 1)), jnp.full((2, 1, 1, 1), 0.1)
    small = DDPM(variance="fixed_small", loss_type="mse").predict(y, x, k, steps, clip)
    large = DDPM(variance="fixed_large", loss_type="mse").predict(y, x, k, steps, clip)
    np.testing.assert_allclose(
        np.ravel(small.log_variance), steps.posterior_log_variance_clipped[[0, 9]], rtol=1e-6
    )
    np.testing.assert_allclose(np.ravel(large.log_variance)[1], np.log(steps.betas[9]), rtol=1e-6)
    np.testing.assert_array_equal(small.mean, large.mean)
    assert (float(np.abs(small.x0).max()) <= 1) == clip
