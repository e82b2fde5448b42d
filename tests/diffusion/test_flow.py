"""Flow matching against the original codes: paths, denoisers, times, losses and gradients.

Bounds are those of the golden data: float32 rounding of the originals (measured at most 4e-7)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.flow_network import assert_within, network_of, parameters, recorded

from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.interpolants import INTERPOLANTS
from diffit_jax.errors import UserError
from diffit_jax.runtime.backend import enable_x64

TRAINING = recorded("sit_training")
DENOISER = recorded("sit_denoiser")
LIGHTNING = recorded("lightning_loss")
TIMES = recorded("times")
REPA = recorded("repa")
PATHS = {"linear": "linear", "gvp": "cosine", "vp": "vp"}  # their names, ours


@pytest.mark.parametrize("theirs", PATHS)
def test_paths_and_their_derivatives(theirs):
    """The originals' derivatives are by u = 1 - t."""
    t = 1 - TRAINING["t"].astype(np.float64)
    interpolant = INTERPOLANTS[PATHS[theirs]]
    place = interpolant.at(t)
    for name, ours in (
        ("alpha", place.alpha),
        ("sigma", place.noise),
        ("d_alpha", -place.alpha_slope),
        ("d_sigma", -place.noise_slope),
        ("d_alpha_over_alpha", -place.alpha_slope / place.alpha),
        ("drift_var", interpolant.diffusion(t)),
    ):
        assert_within(ours, TRAINING[f"{theirs}.{name}"], 2e-6)
    # Twice the formula of a diffusion with this path.
    squared = -place.alpha_slope / place.alpha * place.noise**2 + place.noise * place.noise_slope
    np.testing.assert_allclose(interpolant.diffusion(t), squared, rtol=1e-9)
    # Time inverts noise over signal; derivatives are those of differences.
    np.testing.assert_allclose(interpolant.time(place.noise, place.alpha), t, rtol=1e-12)
    after, before = interpolant.at(t + 1e-6), interpolant.at(t - 1e-6)
    for slope, one, other in zip(place[2:], after[:2], before[:2], strict=True):
        np.testing.assert_allclose(slope, (one - other) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("theirs", PATHS)
def test_losses_and_conversions_of_the_original(theirs, prediction):
    flow = Flow(path=PATHS[theirs], prediction=prediction, clock="u")
    network = network_of(parameters(TRAINING, jnp.float32))
    data, noise = TRAINING["x1_data"], TRAINING["x0_noise"]
    t_B, labels = jnp.asarray(1 - TRAINING["t"]), {"label": TRAINING["label"]}
    noised = flow.noised_at(jnp.asarray(data), t_B, jnp.asarray(noise))
    assert_within(noised.x_BHWC, TRAINING[f"{theirs}.xt"], 2e-6)
    assert_within(noised.level_B, TRAINING["t"], 2e-7)
    if prediction == "velocity":
        assert_within(noised.target_BHWC, TRAINING[f"{theirs}.ut"], 2e-6)
    y_BHWC = network(noised.x_BHWC, noised.level_B, labels)
    assert_within(y_BHWC, TRAINING[f"{theirs}.net"], 2e-6)
    for weighting in ("none", "velocity", "likelihood"):
        if prediction == "velocity" and weighting != "none":
            continue
        weighted = Flow(path=PATHS[theirs], prediction=prediction, clock="u", weighting=weighting)
        again = weighted.noised_at(jnp.asarray(data), t_B, jnp.asarray(noise))
        loss_B, terms = weighted.loss_of(again, y_BHWC)
        assert_within(loss_B, TRAINING[f"{theirs}.{prediction}.loss.{weighting}"], 2e-6)
        assert not terms
    # dz/du is minus dz/dt.
    sigma_B = jnp.float32(flow.sigma_of(1 - np.float64(TRAINING["t"])))
    velocity = flow.velocity(network, noised.x_BHWC, sigma_B, labels)
    assert_within(-velocity, TRAINING[f"{theirs}.{prediction}.ode_drift"], 2e-6)
    for training, name in ((True, "train"), (False, "ode")):
        low, high = flow.interval(training)
        np.testing.assert_allclose(
            [1 - high, 1 - low],
            TRAINING[f"{theirs}.{prediction}.interval.{name}"],
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize("clock", ["u", "t"])
@pytest.mark.parametrize("theirs", PATHS)
def test_denoiser_and_weight_in_float64(theirs, clock):
    """A network that is told t = 1 - u and returns dz/dt is the same one. Measured 3e-14."""
    golden = DENOISER
    with enable_x64():
        network = network_of(parameters(golden, jnp.float64))

        def told_u(x_BHWC, told_B, conditioning):
            if clock == "u":
                return network(x_BHWC, told_B, conditioning)
            return -network(x_BHWC, 1 - told_B, conditioning)

        flow, labels = Flow(path=PATHS[theirs], clock=clock), {"label": golden["label"]}
        sigma = jnp.asarray(golden["sigma"])
        noisy, data = jnp.asarray(golden["noisy"]), jnp.asarray(golden["data"], jnp.float64)
        c_skip, c_out, c_in, told = flow.preconditioning(sigma)
        sign = 1 if clock == "u" else -1
        for ours, name in (
            (c_skip, "c_skip"),
            (sign * c_out, "c_out"),
            (c_in, "c_in"),
            (told if clock == "u" else 1 - told, "t"),
            (c_in[:, None, None, None] * noisy, "z"),
            (flow.loss_weight(sigma), "loss_weight"),
        ):
            assert_within(ours, golden[f"{theirs}.{name}"], 1e-12)
        denoised = flow.denoise(told_u, noisy, sigma, labels)
        assert_within(denoised, golden[f"{theirs}.denoised"], 1e-12)
        error_B = jnp.mean((denoised - data) ** 2, axis=(1, 2, 3))
        assert_within(flow.loss_weight(sigma) * error_B, golden[f"{theirs}.loss"], 1e-12)
        # The loss of training, without the detour over sigma.
        noise = (noisy - data) / sigma[:, None, None, None]
        noised = flow.noised_at(data, jnp.asarray(flow.time_of(golden["sigma"])), noise)
        loss_B, _ = flow.loss_of(noised, told_u(noised.x_BHWC, noised.level_B, labels))
        assert_within(loss_B, golden[f"{theirs}.loss"], 1e-12)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_the_denoiser_is_the_velocity_at_equal_noise_levels(path, prediction):
    """x = z - t v on the linear path, and the like: of data with a standard deviation of 0.5."""
    deviation = 0.5
    with enable_x64():
        network = network_of(parameters(DENOISER, jnp.float64))
        flow, labels = (
            Flow(path=path, prediction=prediction, sigma_data=deviation),
            {"label": DENOISER["label"]},
        )
        t = np.array([0.03, 0.4, 0.97])
        place, sigma = INTERPOLANTS[path].at(t), flow.sigma_of(t)
        np.testing.assert_allclose(sigma, deviation * place.noise / place.alpha, rtol=1e-14)
        np.testing.assert_allclose(flow.time_of(sigma), t, rtol=1e-12)
        alpha, s, alpha_slope, s_slope = (each[:, None, None, None] for each in place)
        turn = s * alpha_slope - s_slope * alpha
        y = DENOISER["noisy"]
        x = alpha * y
        velocity = flow.velocity(network, jnp.asarray(x), jnp.asarray(sigma), labels)
        clean = (s * velocity - s_slope * x) / turn
        denoised = flow.denoise(network, jnp.asarray(y), jnp.asarray(sigma), labels)
        np.testing.assert_allclose(denoised, clean, rtol=0, atol=1e-11)
        # D(y; sigma) = d D₁(y / d; sigma / d).
        unit = Flow(path=path, prediction=prediction)
        ours = deviation * unit.denoise(network, y / deviation, sigma / deviation, labels)
        np.testing.assert_allclose(denoised, ours, rtol=0, atol=1e-12)


def test_times_near_the_noise_are_exact_in_float32():
    """At sigma = 1e6, 1 - t as a difference would be wrong by 6 %."""
    for path in ("linear", "cosine"):
        sigma = jnp.float32([1e-3, 1.0, 1e3, 1e6])
        told = Flow(path=path, clock="u").preconditioning(sigma)[3]
        with enable_x64():
            exact = Flow(path=path, clock="u").preconditioning(jnp.asarray(sigma, jnp.float64))[3]
        np.testing.assert_allclose(told, exact, rtol=3e-7)


def test_lightning_losses_and_gradients():
    flow = Flow(clock="u", direction_weight=1.0)
    data, noise = jnp.asarray(LIGHTNING["x1_data"]), jnp.asarray(LIGHTNING["x0_noise"])
    noised = flow.noised_at(data, jnp.asarray(1 - LIGHTNING["t"]), noise)

    def total(parameters):
        network = network_of(parameters)
        y_BHWC = network(noised.x_BHWC, noised.level_B, {"label": LIGHTNING["label"]})
        loss_B, terms = flow.loss_of(noised, y_BHWC)
        return loss_B.mean(), (loss_B, terms["direction"], y_BHWC)

    given = parameters(LIGHTNING, jnp.float32)
    (loss, (loss_B, direction_B, y_BHWC)), gradient = jax.value_and_grad(total, has_aux=True)(given)
    assert_within(y_BHWC, LIGHTNING["net"], 2e-6)
    assert_within(loss_B - direction_B, LIGHTNING["loss"], 2e-6)
    assert_within(direction_B, LIGHTNING["cos_loss"], 2e-6)
    assert_within(loss, LIGHTNING["total"], 2e-6)
    for name, of in gradient.items():
        assert_within(of, LIGHTNING[f"gradient.{name}"], 5e-6)
    assert flow.loss_terms == ("direction",) and not Flow().loss_terms


def test_the_direction_of_nothing_has_no_gradient():
    """A network whose last layer is zero returns 0, where the cosine's slope is infinite."""
    flow = Flow(direction_weight=1.0)
    noised = flow.noised_at(jnp.ones((2, 2, 2, 3)), jnp.float32([0.0, 0.5]), jnp.ones((2, 2, 2, 3)))

    def loss(y_BHWC):
        loss_B, terms = flow.loss_of(noised, y_BHWC)
        return loss_B.sum(), terms["direction"]

    gradient, direction_B = jax.grad(loss, has_aux=True)(jnp.zeros((2, 2, 2, 3)))
    assert np.all(np.isfinite(gradient)) and np.array_equal(direction_B, [1, 1])


def test_times_of_training_are_those_of_sd3():
    quantile = TIMES["quantile"].astype(np.float64)
    from scipy.stats import norm

    for key in TIMES:
        words = key.split(".", 1)
        if words[0] == "logit_normal":
            mean, std = words[1].removeprefix("mean").split(".std")
            flow = Flow(times="logit_normal", time_mean=float(mean), time_std=float(std))
            assert_within(flow.times_of(norm.ppf(quantile)), TIMES[key], 2e-8)
        elif words[0] == "mode":
            flow = Flow(times="mode", mode_scale=float(words[1].removeprefix("scale")))
            assert_within(flow.times_of(quantile), TIMES[key], 2e-8)
    weights = {name: Flow(weighting=name).weight(jnp.asarray(TIMES["t"])) for name in
               ("sigma_sqrt", "cosmap")}  # fmt: skip
    assert_within(weights["cosmap"], TIMES["weight.cosmap"], 1e-6)
    assert_within(weights["sigma_sqrt"], TIMES["weight.sigma_sqrt"], 1e-6)
    # Its distribution has that density.
    t = Flow(times="cosmap").times_of(quantile)
    slope = np.gradient(quantile[1:-1], t[1:-1])[1:-1]
    with enable_x64():
        density = Flow(weighting="cosmap").weight(jnp.asarray(t))[2:-2]
    np.testing.assert_allclose(slope, density, rtol=1e-3)


def test_shifts_and_grids():
    t = TIMES["t"].astype(np.float64)
    for key in TIMES:
        if key.startswith("shift"):
            shift = float(key.removeprefix("shift"))
            assert_within(Flow().shifted(t, shift), TIMES[key], 2e-8)
    assert_within(
        Flow().shifted(np.arange(1, 1001) / 1000, 3.0), TIMES["sd3.sigmas1000.shift3"], 1e-6
    )
    for points in (11, 51):
        flow = Flow(sampling_shift=1 / 0.3)  # theirs is of u, from noise to data
        grid = 1 - flow.sampling_times(points - 1)
        assert_within(grid, TIMES[f"lightning.grid{points}.shift0.3"], 1e-6)
    # A shift is a factor of sigma on every path, and of data of any deviation.
    for path in INTERPOLANTS:
        flow = Flow(path=path, sigma_data=0.7)
        inner = np.linspace(0.05, 0.9, 7)
        shifted = flow.shifted(inner, 2.5)
        np.testing.assert_allclose(flow.sigma_of(shifted), 2.5 * flow.sigma_of(inner), rtol=1e-9)
        times = Flow(path=path, sampling_shift=2.0).sampling_times(6)
        low, high = flow.interval()
        assert (times[0], times[-1]) == (high, low) and np.all(np.diff(times) < 0)


@pytest.mark.parametrize("distribution", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_repas_times_and_losses(path, distribution):
    """Its clock is t, as ours."""
    times = {"uniform": "uniform", "lognormal": "log_normal"}[distribution]
    draws = {"uniform": "loss.uniform", "lognormal": "loss.normal"}[distribution]
    flow = Flow(path=path, times=times)
    t_B = flow.times_of(jnp.asarray(REPA[draws]))
    assert_within(t_B, REPA[f"{path}.{distribution}.t"], 2e-6)
    noised = flow.noised_at(jnp.asarray(REPA["data"]), t_B, jnp.asarray(REPA["loss.noise"]))
    network = network_of(parameters(REPA, jnp.float32))
    y_BHWC = network(noised.x_BHWC, noised.level_B, {"label": REPA["label"]})
    loss_B, _ = flow.loss_of(noised, y_BHWC)
    assert_within(loss_B, REPA[f"{path}.{distribution}.loss"], 2e-6)


@pytest.mark.parametrize("times", ["uniform", "logit_normal", "log_normal", "mode", "cosmap"])
def test_drawn_times_have_their_distribution(times):
    """Their distribution function at five points, within four standard errors of 20,000 draws;
    a shift of 2 doubles noise relative to signal."""
    flow = Flow(times=times, time_mean=-0.4, time_std=1.2, path="cosine", sigma_data=0.5)
    keys = jax.random.split(jax.random.key(3, impl="threefry2x32"), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(flow.draw_time))(keys), np.float64)
    assert drawn.min() >= 0 and drawn.max() <= 1
    points = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    from scipy.stats import norm

    uniform = np.linspace(0, 1, 100_001)
    expected = {
        "uniform": lambda: points,
        "logit_normal": lambda: norm.cdf((np.log(points / (1 - points)) + 0.4) / 1.2),
        "log_normal": lambda: norm.cdf((np.log(np.tan(math.pi / 2 * points)) + 0.4) / 1.2),
        "mode": lambda: [np.mean(flow.times_of(uniform) <= point) for point in points],
        "cosmap": lambda: 2 / math.pi * np.arctan2(points, 1 - points),
    }[times]()
    found = np.mean(drawn[:, None] <= points, axis=0)
    error = np.sqrt(np.array(expected) * (1 - np.array(expected)) / len(drawn))
    assert np.all(np.abs(found - expected) < 4 * error + 1e-4)
    sigma = np.asarray(jax.jit(jax.vmap(flow.draw_sigma))(keys[:100]))
    np.testing.assert_allclose(sigma, flow.sigma_of(drawn[:100]), rtol=2e-5)
    other = Flow(
        times=times, time_mean=-0.4, time_std=1.2, path="cosine", sigma_data=0.5, shift=2.0
    )
    twice = np.asarray(jax.vmap(other.draw_sigma)(keys[:100]))
    inside = sigma < 1e3  # behind it float32's times are coarse
    np.testing.assert_allclose(twice[inside], 2 * sigma[inside], rtol=1e-3)


def test_a_network_told_timesteps_is_the_same_denoiser():
    """DDPM's network at equal noise levels: what fine-tuning begins with. Measured 3e-7; within
    DDPM's range, and at its levels to rounding."""
    from diffit_jax.diffusion.ddpm import DDPM

    ddpm, flow = DDPM(), Flow(clock="timesteps", prediction="noise", weighting="velocity")
    network = network_of(parameters(TRAINING, jnp.float32))

    def scaled(x_BHWC, timestep_B, conditioning):
        return network(x_BHWC, timestep_B / 1000, conditioning)

    low, high = flow.interval(training=True)
    np.testing.assert_allclose(flow.sigma_of(np.array([low, high])), ddpm.sigma_range, rtol=1e-9)
    labels = {"label": TRAINING["label"]}
    for sigma in ([0.02, 1.3, 40.0], [0.0101, 0.4, 157.0]):
        sigma_B = jnp.float32(sigma)
        noisy = TRAINING["x1_data"] + sigma_B[:, None, None, None] * TRAINING["x0_noise"]
        theirs = ddpm.denoise(scaled, noisy, sigma_B, labels)
        ours = flow.denoise(scaled, noisy, sigma_B, labels)
        assert_within(ours, np.asarray(theirs), 1e-6)
        # And by its velocity, x = z - t v.
        t_B = jnp.float32(flow.time_of(np.float64(sigma)))
        z_BHWC = noisy * (1 - t_B)[:, None, None, None]
        velocity = flow.velocity(scaled, z_BHWC, sigma_B, labels)
        clean = z_BHWC - t_B[:, None, None, None] * velocity
        assert_within(clean / np.asarray(theirs).std(), theirs / np.asarray(theirs).std(), 1e-4)
    # Its weighted loss is that of the velocity.
    t_B = jnp.float32([0.1, 0.5, 0.9])
    data, noise = jnp.asarray(TRAINING["x1_data"]), jnp.asarray(TRAINING["x0_noise"])
    noised = flow.noised_at(data, t_B, noise)
    loss_B, _ = flow.loss_of(noised, scaled(noised.x_BHWC, noised.level_B, labels))
    z_BHWC = (1 - t_B)[:, None, None, None] * data + t_B[:, None, None, None] * noise
    error = flow.velocity(scaled, z_BHWC, t_B / (1 - t_B), labels) - (noise - data)
    np.testing.assert_allclose(loss_B, jnp.mean(error**2, axis=(1, 2, 3)), rtol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weighting="velocity"), "process.weighting is velocity, which does not go with"),
        (dict(prediction="noise", weighting="cosmap"), "use none, velocity, likelihood"),
        (dict(clock="timesteps"), "such networks predict noise"),
        (dict(prediction="score", direction_weight=1.0), "compares velocities"),
        (dict(shift=0.0), "process.shift is 0.0: it must be above 0"),
        (dict(sampling_shift=-1.0), "process.sampling_shift is -1.0: it must be above 0"),
        (dict(path="sine"), "process.path is 'sine': use linear, cosine, vp"),
        (dict(clock="s"), "process.clock is 's': use t, u, timesteps"),
        (dict(times="lognormal"), "process.times is 'lognormal': use uniform"),
        (dict(mode_scale=2.0), "process.mode_scale is 2.0"),
        (dict(sigma_data=0.0), "process.sigma_data is 0.0"),
    ],
)
def test_flows_that_cannot_be(settings, message):
    with pytest.raises(UserError) as caught:
        Flow(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_noise_and_times_are_functions_of_the_key():
    """Each example's of its own key, however a batch is split."""
    flow = Flow(times="logit_normal")
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 6)
    data = jnp.ones((6, 2, 2, 1))
    whole = flow.noise(data, keys)
    for half in (slice(0, 2), slice(2, 6)):
        part = flow.noise(data[half], keys[half])
        for one, other in itertools.chain(
            zip(part[:4], whole[:4], strict=True), [(part.draws["noise"], whole.draws["noise"])]
        ):
            np.testing.assert_array_equal(one, other[half])
