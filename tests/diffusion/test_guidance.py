"""Guidance against its formulas, its invariances, and the number of network evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import SAMPLERS as METHODS
from diffit_jax.diffusion import samplers
from diffit_jax.diffusion.ddpm import DDPM
from diffit_jax.diffusion.edm import EDM
from diffit_jax.diffusion.flow import Flow
from diffit_jax.diffusion.guidance import (
    GUIDANCE,
    Autoguidance,
    CFGZero,
    Constant,
    Internal,
    Interval,
    PowerCosine,
    TimeInterval,
    Unguided,
    apply_guidance,
    drop_labels,
    unguided,
)
from diffit_jax.errors import UserError

NULL = 10


def evaluate(x, level, conditioning):
    """An evaluation with twice the sample's channels, in which every argument matters."""
    y = (
        jnp.sin(x) * jnp.cos(level)[:, None, None, None]
        + 0.1 * conditioning["label"][:, None, None, None] ** 2
    )
    return jnp.concatenate([y, y + 1], axis=-1)


def guide(x, level, conditioning):
    return evaluate(x, level, conditioning) * 0.9 - 0.1


@pytest.fixture
def arguments():
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 4))
    return x, jnp.array([0.1, 1.0, 2.0, 3.0]), {"label": jnp.array([1, 2, 3, 9])}


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["constant", "autoguidance"])
def test_mixture_is_the_formula(arguments, kind, scale, channels):
    """Guided in the first channels of the sample, the main evaluation in the others and in what
    lies beyond the sample's channels."""
    x, level, conditioning = arguments
    main = evaluate(x, level, conditioning)
    uncond = (
        guide(x, level, conditioning)
        if kind == "autoguidance"
        else evaluate(x, level, {"label": jnp.full(4, NULL)})
    )
    guided = apply_guidance(
        GUIDANCE[kind](scale, channels=channels), evaluate, np.zeros_like, NULL, guide
    )
    y = guided.mixed(x, level, conditioning, scale)
    count = channels or 4
    np.testing.assert_allclose(
        y[..., :count], (uncond + scale * (main - uncond))[..., :count], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(y[..., count:], main[..., count:])


def test_power_cosine_golden():
    """1 + (s - 1) (1 - cos(π (1 - t / 1000)^4)) / 2, computed in float64 for scales 3.8 (MDT) and
    4.4 (DiffiT); six decimals."""
    timesteps = np.array([999, 900, 750, 500, 250, 100, 0])
    for scale, golden in (
        (3.8, [1, 1, 1.000105, 1.026901, 1.636545, 3.059374, 3.8]),
        (4.4, [1, 1, 1.000128, 1.032665, 1.772948, 3.500668, 4.4]),
    ):
        scales = PowerCosine(scale, skip_tolerance=0).scales(timesteps / 1000, None)
        np.testing.assert_allclose(scales, golden, rtol=0, atol=6e-7)


@pytest.mark.parametrize(("tolerance", "percent"), [(0, 9), (1e-3, 32), (0.03, 49)])
def test_power_cosine_scale_is_one_in_high_noise(tolerance, percent):
    scales = PowerCosine(4.4, skip_tolerance=tolerance).scales(np.arange(1000) / 1000, None)
    assert int(100 * np.mean(scales == 1)) == percent


def test_interval_is_open_below_and_closed_above():
    scales = Interval(2.0, sigma_low=0.5, sigma_high=2.0).scales(
        np.zeros(4), np.array([0.5, 0.51, 2.0, 2.01])
    )
    assert scales.tolist() == [1, 2, 2, 1]


def counting(calls, evaluation=evaluate):
    """An evaluation that notes how many examples each call has, when the program runs."""

    def counted(x, level, conditioning):
        jax.debug.callback(lambda _: calls.append(len(x)), x[0, 0, 0, 0])
        return evaluation(x, level, conditioning)

    return counted


PROCESS = DDPM()
BATCH = 2


def first_half(evaluation):
    """A denoiser from an evaluation of twice the channels."""
    return lambda x, level, conditioning: evaluation(x, level, conditioning)[..., : x.shape[-1]]


def run(sampler, guidance, calls=None, weak_calls=None):
    """Samples of one sampler with `evaluate` guided somehow."""
    calls, weak_calls = [] if calls is None else calls, [] if weak_calls is None else weak_calls
    wrap = (lambda e: e) if sampler in ("ddpm", "ddim") else first_half
    noise = samplers.seeded_noise(jnp.arange(BATCH, dtype=jnp.uint32), (2, 2, 4))
    conditioning = {"label": jnp.array([1, 2])}
    process = PROCESS if sampler in ("ddpm", "ddim") else EDM()

    @jax.jit
    def draw():
        guided = apply_guidance(
            guidance,
            wrap(counting(calls)),
            PROCESS.time_of,
            NULL,
            wrap(counting(weak_calls, guide)),
        )
        return METHODS[sampler](num_steps=10).draw(process, guided, noise, conditioning).samples

    out = np.asarray(draw())
    jax.effects_barrier()
    return out


SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpm_solver")
EVALUATIONS = {name: 19 if name == "heun" else 10 for name in SAMPLERS}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equivalences_and_evaluations_over_every_sampler(sampler):
    count = EVALUATIONS[sampler]
    calls = []
    plain = run(sampler, Unguided(), calls)
    assert calls == [BATCH] * count  # no guidance: the network alone

    calls, weak_calls = [], []
    np.testing.assert_array_equal(run(sampler, Autoguidance(1.0), calls, weak_calls), plain)
    assert calls == [BATCH] * count and not weak_calls  # weight 1: the main network alone

    calls, weak_calls = [], []
    assert np.abs(run(sampler, Autoguidance(2.0), calls, weak_calls) - plain).max() > 1e-3
    assert calls == weak_calls == [BATCH] * count

    calls = []
    constant = run(sampler, Constant(2.0), calls)
    assert calls == [2 * BATCH] * count and np.abs(constant - plain).max() > 1e-3
    calls = []
    # The full interval.
    np.testing.assert_array_equal(run(sampler, Interval(2.0), calls), constant)
    assert calls == [2 * BATCH] * count

    calls = []
    run(sampler, Interval(2.0, sigma_low=0.3, sigma_high=3.0), calls)
    levels = (
        PROCESS.schedule_for("10").sqrt_recipm1_alphas_cumprod[::-1]
        if sampler in ("ddpm", "ddim")
        else EDM().sigmas(10)[:-1]
    )
    if sampler == "heun":
        levels = np.repeat(levels, 2)[:-1]
    assert calls == [2 * BATCH if 0.3 < level <= 3 else BATCH for level in levels]
    assert 0 < calls.count(2 * BATCH) < count

    calls = []
    run(sampler, PowerCosine(4.4), calls)
    # The noisiest steps are not guided.
    assert calls == sorted(calls) and 0 < calls.count(BATCH) < count


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_skipping_changes_no_more_than_the_skipped_guidance(sampler):
    exact = run(sampler, PowerCosine(4.4, skip_tolerance=0))
    skipped = run(sampler, PowerCosine(4.4, skip_tolerance=1e-3))
    assert np.abs(exact - skipped).max() < 1e-3 * np.abs(exact).max()


# --- Of velocities, and of an inner head: against float64 numpy.

CFG = dict(rtol=1e-5, atol=1e-5)


def inner_too(x, level, conditioning):
    """A network's output and that of its inner head."""
    y = evaluate(x, level, conditioning)
    return y, 0.7 * y + jnp.cos(y)


def projected(plain, other):
    """plain's share along other, of each example: a = <v_c, v_u> / |v_u|²."""
    plain, other = np.asarray(plain, np.float64), np.asarray(other, np.float64)
    products = [
        (one * two).sum() / (two * two).sum() for one, two in zip(plain, other, strict=True)
    ]
    return np.array(products)[:, None, None, None] * other


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_cfg_zero_is_the_formula(arguments, scale, channels):
    """v = a v_u + scale (v_c - a v_u), a over the guided channels of each example."""
    x, level, conditioning = arguments
    guided = apply_guidance(CFGZero(scale, channels=channels), evaluate, np.zeros_like, NULL)
    found = guided.mixed(x, level, conditioning, scale)
    main, count = np.asarray(evaluate(x, level, conditioning), np.float64), channels or 4
    uncond = evaluate(x, level, {"label": jnp.full(4, NULL)})
    along = projected(main[..., :count], uncond[..., :count])
    expected = along + scale * (main[..., :count] - along)
    np.testing.assert_allclose(found[..., :count], expected, **CFG)
    np.testing.assert_array_equal(found[..., count:], main[..., count:].astype(np.float32))
    # Of a network that returns 0, as it does before its first update, it is plain guidance.
    nothing = apply_guidance(CFGZero(scale), lambda x, *_: 0 * x, np.zeros_like, NULL)
    np.testing.assert_array_equal(nothing.mixed(x, level, conditioning, scale), 0 * x)


@pytest.mark.parametrize(("steps", "still"), [(10, 0), (18, 1), (50, 2)])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_cfg_zero_stands_still_at_first(sampler, steps, still):
    """In 4 % of the steps, rounded, the network is not evaluated; then at the time of its step."""
    times = []

    def velocity(x, told, conditioning):
        jax.debug.callback(lambda t: times.append(float(t)), told[0])
        return x + conditioning["label"][:, None, None, None]

    flow, method = Flow(), METHODS[sampler](num_steps=steps)
    evaluation = method.model_fn(flow, velocity)
    guided = apply_guidance(CFGZero(2.0), evaluation, flow.time_of, NULL)
    noise = samplers.seeded_noise(jnp.arange(BATCH, dtype=jnp.uint32), (2, 2, 4))
    labels = {"label": jnp.array([1, 2])}
    jax.jit(lambda: method.draw(flow, guided, noise, labels).samples)()
    jax.effects_barrier()
    evaluations = 1 if sampler == "euler" else 2
    assert len(times) == steps * evaluations - (sampler == "heun") - still * evaluations
    np.testing.assert_allclose(max(times), 1 - still / steps, rtol=1e-6)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("scale", [0.5, 1.4])
def test_internal_guidance_is_the_formula(arguments, scale, channels):
    """v = v_i + scale (v_f - v_i) by one evaluation; and guidance by labels of what that gives."""
    x, level, conditioning = arguments
    calls = []

    def counted(x, level, conditioning):
        calls.append(len(x))
        return inner_too(x, level, conditioning)

    def within(labels):
        outer, inner = (np.asarray(y, np.float64) for y in inner_too(x, level, {"label": labels}))
        mixed = inner + scale * (outer - inner)
        return np.concatenate([mixed[..., :count], outer[..., count:]], axis=-1), outer

    count, by_label = channels or 4, 1.35
    guidance = Internal(scale, channels=channels, label_scale=by_label)
    guided = apply_guidance(guidance, evaluate, np.zeros_like, NULL, with_inner=counted)
    found = guided.mixed(x, level, conditioning, scale)
    with_label, outer = within(conditioning["label"])
    assert calls == [4]
    np.testing.assert_allclose(found, with_label, **CFG)
    without, _ = within(jnp.full(4, NULL))
    expected = without + by_label * (with_label - without)
    found = guided.mixed_by_label(x, level, conditioning, scale, by_label)
    assert calls == [4, 8]
    np.testing.assert_allclose(found[..., :count], expected[..., :count], **CFG)
    np.testing.assert_allclose(found[..., count:], outer[..., count:], **CFG)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_solver", "sde"])
def test_where_along_a_flow_guidance_acts(sampler):
    """In the steps that start within an interval of t, its ends included."""
    sizes = []

    def network(x, told, conditioning):
        jax.debug.callback(lambda _: sizes.append(len(x)), x[0, 0, 0, 0])
        y = x + conditioning["label"][:, None, None, None]
        return y, 0.9 * y

    flow, method = Flow(), METHODS[sampler](num_steps=10)
    plain = method.model_fn(flow, lambda *given: network(*given)[0])
    noise = samplers.seeded_noise(jnp.arange(BATCH, dtype=jnp.uint32), (2, 2, 4))
    labels = {"label": jnp.array([1, 2])}
    times = flow.sampling_times(10)[:-1]
    if sampler == "sde":
        times = method.times(flow)
    repeats = 2 if sampler == "heun" else 1
    expected = [
        2 * BATCH if 0.3 <= round(t, 9) <= 0.7 else BATCH for t in np.repeat(times, repeats)
    ]
    for guidance in (
        TimeInterval(2.0, t_low=0.3, t_high=0.7),
        Internal(1.4, label_scale=1.35, label_t_low=0.3, label_t_high=0.7),
        Internal(1.0, label_scale=1.35, label_t_low=0.3, label_t_high=0.7),
    ):
        sizes.clear()
        guided = apply_guidance(
            guidance, plain, flow.time_of, NULL, with_inner=method.model_fn(flow, network)
        )
        jax.jit(lambda guided=guided: method.draw(flow, guided, noise, labels).samples)()
        jax.effects_barrier()
        assert sizes == expected[: len(sizes)] and len(sizes) == 10 * repeats - (sampler == "heun")
    sizes.clear()
    guided = apply_guidance(
        Internal(1.4), plain, flow.time_of, None, with_inner=method.model_fn(flow, network)
    )
    jax.jit(lambda: method.draw(flow, guided, noise, labels).samples)()
    jax.effects_barrier()
    assert set(sizes) == {BATCH}  # one evaluation


def test_guidance_of_no_use_is_no_guidance():
    for guidance in (Constant(1.0), Unguided(), Constant(1.0005)):
        assert (
            apply_guidance(guidance, evaluate, np.zeros_like).plain is evaluate
            and not guidance.active
        )
    assert unguided(evaluate).scales(np.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="constant", scale=-1), "guidance.scale is -1: it must be at least 0"),
        (
            dict(kind="interval", scale=2, sigma_low=3, sigma_high=2),
            "guidance.sigma_low 3 must lie between 0 and",
        ),
        (dict(kind="time_interval", scale=2, t_low=0.7, t_high=0.3), "guidance.t_low 0.7 must lie"),
        (dict(kind="time_interval", scale=2, t_high=1.5), "guidance.t_high is 1.5: it must be"),
        (
            dict(kind="internal", scale=2, label_t_low=1, label_t_high=0),
            "guidance.label_t_low 1 must",
        ),
        (dict(kind="cfg_zero", scale=2, zero_share=1.0), "guidance.zero_share is 1.0"),
        (
            dict(kind="constant", scale=1, channels=-1),
            r"guidance\.channels is -1: it must be at least 0",
        ),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        GUIDANCE[arguments.pop("kind")](**arguments)


def test_what_guidance_needs():
    with pytest.raises(UserError, match="autoguidance needs a second, weaker network"):
        apply_guidance(Autoguidance(2.0), evaluate, np.zeros_like, NULL)
    with pytest.raises(UserError, match="guides by labels, which the model does not have"):
        apply_guidance(Constant(2.0), evaluate, np.zeros_like)


def test_drop_labels_rate_and_independence_of_the_batch():
    labels, keys = jnp.arange(20_000) % 10, jax.random.split(jax.random.key(0), 20_000)
    dropped = drop_labels({"label": labels}, keys, 0.1, NULL)["label"]
    changed = np.asarray(dropped != labels)
    assert (dropped[changed] == NULL).all() and abs(
        changed.mean() - 0.1
    ) < 0.01  # 4.7 standard errors
    np.testing.assert_array_equal(
        drop_labels({"label": labels[5:9]}, keys[5:9], 0.1, NULL)["label"], dropped[5:9]
    )


def test_drop_labels_leaves_the_rest_alone():
    conditioning = {"label": jnp.arange(3)}
    assert (
        drop_labels(conditioning, jax.random.split(jax.random.key(0), 3), 0.0, NULL) is conditioning
    )
    assert drop_labels({}, jax.random.split(jax.random.key(0), 3), 0.5, NULL) == {}
