"""Samplers of flows: against SiT's and REPA's trajectories, and against a closed form.

Float32 bounds are those of the golden data (originals to 4e-7 of float64 formulas)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.flow_network import assert_within, network_of, parameters, recorded
from support.mixture import SHAPE, cumulative, exact_end, ideal_network
from support.processes import OPTIMISED

from diffit_jax.diffusion import samplers
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.general_sampler import General
from diffit_jax.diffusion.guidance import TimeInterval, apply_guidance, unguided
from diffit_jax.diffusion.samplers import DPMSolver, Euler, Heun
from diffit_jax.diffusion.sde import SDE
from diffit_jax.errors import UserError
from diffit_jax.runtime.backend import enable_x64

ODE, SDES, REPA = (recorded(name) for name in ("sit_ode", "sit_sde", "repa"))
PATHS = {"linear": "linear", "gvp": "cosine", "vp": "vp"}
SOLVERS = {
    "euler": dict(solver="euler"),
    "heun2": dict(alpha=1.0, correct_last=True),
    "midpoint": dict(alpha=0.5, correct_last=True),
}


def drawn(sampler, flow, network, noises, labels, guidance=None, frames=0):
    """Samples of given noises, (1 + steps, B, H, W, C)."""
    sampler.check(flow)
    evaluate = sampler.model_fn(flow, network)
    guided = unguided(evaluate)
    if guidance is not None:
        guided = apply_guidance(guidance, evaluate, flow.time_of, null_label=5)
    conditioning = {"label": jnp.asarray(labels)}

    def draw(noises):
        return sampler.draw(flow, guided, lambda i: noises[i], conditioning, frames)

    return jax.jit(draw)(noises)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("theirs", PATHS)
def test_trajectories_of_sit(theirs, prediction, method):
    """Ten steps from noise to data. The estimates on the way tell the states there. A noise
    prediction's first step amplifies rounding by 1,000."""
    flow = Flow(path=PATHS[theirs], prediction=prediction, clock="u")
    settings = dict(grid="flow", schedule="flow", **SOLVERS[method])
    try:
        sampler = General(10, **settings)
        sampler.check(flow)
    except UserError as error:  # SiT evaluates noise and score near the clean end
        assert prediction != "velocity" and method == "heun2" and "velocities are" in str(error)
        sampler = General(10, **settings | {"correct_last": False})
    states = ODE[f"{theirs}.{prediction}.{method}"]
    network = network_of(parameters(ODE, jnp.float32))
    found = drawn(sampler, flow, network, ODE["start"][None], ODE["label"], frames=10)
    tolerance = 1e-4 if prediction == "noise" else 2e-6
    if sampler.correct_last or method == "euler":
        assert_within(found.samples, states[-1], tolerance)
    # Estimates of the clean sample from the original's states.
    for step, t in enumerate(flow.sampling_times(10)[:-1]):
        place = flow.interpolant.at(t)
        sigma_B = jnp.full(3, flow.sigma_of(t), jnp.float32)
        velocity = flow.velocity(network, states[step], sigma_B, {"label": ODE["label"]})
        clean = (place.noise * velocity - place.noise_slope * states[step]) / place.turn
        assert_within(found.frames[step], np.asarray(clean), tolerance)


CASES = sorted(key for key in SDES if key.count(".") == 3)


@pytest.mark.parametrize("case", CASES)
def test_stochastic_samplers_of_sit(case):
    """SiT's N points are N steps with the last one, N - 1 without; the network is evaluated once
    where SiT's code evaluates it twice."""
    theirs, form, method, last = case.split(".")
    flow = Flow(path=PATHS[theirs], clock="u")
    sampler = SDE(
        9 if last == "None" else 10,
        solver=method.lower(),
        diffusion=form.lower().replace("-", "_"),
        last=last.lower(),
    )
    calls, network = [], network_of(parameters(SDES, jnp.float32))

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return network(*arguments)

    noises = np.concatenate([SDES["start"][None], SDES["noise"]])
    found = drawn(sampler, flow, counted, noises, SDES["label"])
    jax.effects_barrier()
    states = SDES[case]
    assert_within(found.samples, states[-1 if last != "None" else 8], 2e-6)
    steps = sampler.num_steps
    expected = steps if method == "Euler" else 2 * steps - (last != "None")
    assert len(calls) == expected


@pytest.mark.parametrize("guided", ["plain", "guided", "interval"])
@pytest.mark.parametrize("case", ["euler", "heun", "linear.sde", "cosine.sde"])
def test_samplers_of_repa_in_float64(case, guided):
    """Its clock is t, its Heun ends by Euler's step (2N - 1 evaluations). Measured 1e-15."""
    scale, low, high = REPA["guidance"]
    guidance = {
        "plain": None,
        "guided": TimeInterval(float(scale)),
        "interval": TimeInterval(float(scale), t_low=float(low), t_high=float(high)),
    }[guided]
    with enable_x64():
        path = "cosine" if case.startswith("cosine") else "linear"
        flow, network = Flow(path=path), network_of(parameters(REPA, jnp.float64))
        sampler = {"euler": Euler(10), "heun": Heun(10)}.get(case, SDE(10, diffusion="linear"))
        noises = np.concatenate([REPA["start"][None], REPA["noise"]]).astype(np.float64)
        found = drawn(sampler, flow, network, noises, REPA["label"], guidance)
        assert found.samples.dtype == jnp.float64
        assert_within(found.samples, REPA[f"{case}.{guided}"], 1e-12)


# --- A closed form: a mixture of two normal distributions for each number of a sample.

NOISE = np.linspace(-2.2, 2.2, 23).reshape(-1, *SHAPE)
END = exact_end(NOISE.ravel()).reshape(NOISE.shape)
FLOWS = {
    "linear": Flow(),
    "linear, told u": Flow(clock="u"),
    "cosine": Flow(path="cosine"),
    "deviation 0.6": Flow(sigma_data=0.6),
    "shifted": Flow(sampling_shift=2.0),
}
METHODS = {
    "euler": (Euler, 3.7),
    "heun": (Heun, 15),
    "midpoint": (
        lambda n: General(n, grid="flow", schedule="flow", alpha=0.5, correct_last=True),
        14,
    ),
    "dpm_solver": (DPMSolver, 4.2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FLOWS)
def test_samplers_converge_at_their_order_to_the_mixture(name, method):
    """Four times the steps divide the mean error by 4 and 16 (measured 3.8 to 4.0, and 14.6 to
    16.4); DPM-Solver's, whose ends are of first order on a grid even in t, by 4.6 to 10."""
    flow, (make, ratio) = FLOWS[name], METHODS[method]
    with enable_x64():
        errors = []
        for steps in (64, 256):
            found = drawn(make(steps), flow, ideal_network(flow), NOISE[None], np.zeros(23, int))
            errors.append(np.abs(np.asarray(found.samples) - END).mean())
    assert errors[0] / errors[1] > ratio and errors[1] < 5e-3


def test_steps_in_time_are_the_better_grid():
    """Measured with 9 steps: Heun in time 0.004, on EDM's noise levels 0.03."""
    flow = Flow()
    with enable_x64():
        network, labels = ideal_network(flow), np.zeros(23, int)

        def error(sampler):
            found = drawn(sampler, flow, network, NOISE[None], labels)
            return np.abs(np.asarray(found.samples) - END).mean()

        in_time = error(Heun(9))
        on_edms_levels = error(General(9))
        along_the_path = error(General(9, grid="edm", schedule="flow"))
        again = error(General(9, grid="flow", schedule="flow"))
    assert again == in_time
    assert in_time < 0.5 * on_edms_levels and in_time < along_the_path


optimised = functools.partial(jax.jit, compiler_options=OPTIMISED)
SDE_CASES = {
    "sigma": dict(),
    "linear, heun": dict(diffusion="linear", solver="heun"),
    "decreasing": dict(diffusion="decreasing"),
    "increasing_decreasing, tweedie": dict(diffusion="increasing_decreasing", last="tweedie"),
    "half, euler": dict(diffusion_norm=0.5, last="euler"),
    "none": dict(last="none"),
    "shifted": dict(shift=1.5),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("linear", case) for case in SDE_CASES), ("cosine", "linear, heun"), ("cosine", "sigma"),
     ("deviation 0.6", "sigma"), ("linear, told u", "decreasing")],
)  # fmt: skip
def test_stochastic_samples_are_of_the_mixture(name, case):
    """As those of the flow: quantiles of 20,000 samples, within four standard errors and what
    200 steps leave (measured at most 0.006)."""
    flow, sampler, count = FLOWS[name], SDE(200, **SDE_CASES[case]), 20_000
    noise = samplers.seeded_noise(jnp.arange(2, dtype=jnp.uint32), (100, 100, 1))
    evaluate = sampler.model_fn(flow, ideal_network(flow))
    draw = optimised(lambda: sampler.draw(flow, unguided(evaluate), noise, {}).samples)
    share = np.mean(np.asarray(draw()).reshape(-1, 1) <= [-1.0, -0.5, 0.2, 0.6, 0.9], axis=0)
    exact = cumulative(np.array([-1.0, -0.5, 0.2, 0.6, 0.9]))
    bound = 4 * np.sqrt(exact * (1 - exact) / count) + 0.01
    assert np.all(np.abs(share - exact) < bound), np.abs(share - exact) - bound


def test_churn_along_a_flow_samples_the_mixture():
    flow, count = FLOWS["deviation 0.6"], 20_000
    sampler = General(100, grid="flow", schedule="flow", churn_amount=20.0)
    sampler.check(flow)
    noise = samplers.seeded_noise(jnp.arange(2, dtype=jnp.uint32), (100, 100, 1))
    evaluate = sampler.model_fn(flow, ideal_network(flow))
    draw = optimised(lambda: sampler.draw(flow, unguided(evaluate), noise, {}).samples)
    share = np.mean(np.asarray(draw()).reshape(-1, 1) <= [-1.0, -0.5, 0.2, 0.6, 0.9], axis=0)
    exact = cumulative(np.array([-1.0, -0.5, 0.2, 0.6, 0.9]))
    assert np.all(np.abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / count) + 0.01)


@pytest.mark.parametrize(
    ("process", "sampler", "message"),
    [
        (EDM(), SDE(10), "sampler.name is sde, which needs the process flow"),
        (EDM(), General(10, grid="flow"), "sampler.grid is flow, which needs the process flow"),
        (EDM(), General(10, schedule="flow"), "sampler.schedule is flow, which needs"),
        (Flow(), Heun(10, churn_amount=5.0), "use the sampler sde, or general"),
        (Flow(), SDE(10, diffusion="sbdm"), "infinite at the start of the path linear"),
        (Flow(path="vp"), SDE(10, last_size=5e-4), "last_size is 0.0005, which lies outside"),
        (Flow(), General(10, schedule="flow", scaling="vp"), "the schedule flow has its own"),
        (Flow(), General(10, shift=2.0), "which only the grid flow has"),
        (Flow(), General(10, correct_last=True), "evaluates at the clean end"),
        (Flow(), samplers.DDIM(10), "which needs the process ddpm"),
    ],
)
def test_samplers_that_do_not_go_with_a_process(process, sampler, message):
    with pytest.raises(UserError) as caught:
        sampler.check(process)
    assert message in str(caught.value) and "\n" not in str(caught.value)
