"""Statistics of attention that is known, spectra of images that are known, and the verb."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config, small_latent_config
from support.golden import GOLDEN

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models import ImageDiffiT, LatentDiffiT
from diffit_jax.models.diffit.attention import Attended
from diffit_jax.models.model import Model
from diffit_jax.models.placement import Dense
from diffit_jax.preflight.figures import TooLarge
from diffit_jax.preflight.preflight import _chosen, price_analysis
from diffit_jax.run.state import Setup, setup_experiment
from diffit_jax.runtime.backend import chip_of
from diffit_jax.sampling.analysis import heads, spectra
from diffit_jax.sampling.analysis.analyse import Way, analyse, follow, program
from diffit_jax.sampling.request import Weights, config_for_weights
from diffit_jax.sampling.sampler import batch_shapes

SIDE, WIDTH = 4, 3  # of the window; of a head
TOKENS = SIDE * SIDE
NO_TIME = jnp.zeros((1, 2))


def attended(q=0.0, k=0.0, bias=0.0, q_time=None, v_time=0.0, k_time=0.0):
    """One image, one window, two heads; the time token (1, 2) picks a row of `q_time` (2, D)."""
    shape = (1, 1, 2, TOKENS, WIDTH)

    def q_of_time(time_BT):
        if q_time is None:
            return jnp.zeros((1, 1, 2, 1, WIDTH))
        return jnp.broadcast_to((time_BT @ q_time)[:, None, None, None], (1, 1, 2, 1, WIDTH))

    one = (1, 1, 2, 1, WIDTH)
    return Attended(
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), shape) + q_of_time(jnp.array([[1.0, 0]])),
        jnp.broadcast_to(jnp.asarray(k, jnp.float32), shape),
        jnp.ones(shape),
        jnp.array([[1.0, 0]]),
        q_of_time,
        jnp.broadcast_to(jnp.asarray(k_time, jnp.float32), one),
        jnp.broadcast_to(jnp.asarray(v_time, jnp.float32), one),
        jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (2, TOKENS, TOKENS)),
        SIDE,
    )


def test_uniform_attention():
    found = heads.measure(attended(), NO_TIME, (0.5, 0.5))
    np.testing.assert_allclose(found["entropy"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["reach"][0, 0], heads.distances(SIDE).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(found["reach"][0, 0, 0], 2.40582, rtol=1e-5)
    np.testing.assert_allclose(found["excess_reach"], 0, atol=1e-6)
    np.testing.assert_allclose(found["map"], 1 / TOKENS, rtol=1e-6)
    for name in ("change", "q_from_time", "v_from_time", "logits_time", "key_effect"):
        np.testing.assert_allclose(found[name], 0, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_attention_of_a_known_reach(distance):
    """Only to tokens so far away, which every token has, in the same row or column."""
    away = heads.distances(SIDE)
    found = heads.measure(attended(bias=np.where(away == distance, 0, -1e9)), NO_TIME, (0, 0))
    np.testing.assert_allclose(found["reach"], distance, rtol=1e-6)
    counts = (away == distance).sum(-1)
    np.testing.assert_allclose(
        found["entropy"][0, 1], np.log(counts) / np.log(TOKENS), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found["map"][0, 0], (away[0] == distance) / counts[0], atol=1e-6)
    # A uniform bias apart, the bias is all that moves logits.
    np.testing.assert_allclose(found["logits_position"], 1, rtol=1e-6)


def test_attention_that_time_switches():
    """At one time all look at the first token, at the other at the last."""
    k = np.zeros((TOKENS, WIDTH))
    k[0, 0], k[-1, 1] = 1, 1
    switch = 100 * jnp.eye(2, WIDTH)
    layer = attended(k=k, q_time=switch, v_time=1.0, k_time=[3.0, 1.0, 2.0])
    found = heads.measure(layer, jnp.array([[0, 1.0]]), (0.5, 0.5))
    np.testing.assert_allclose(found["change"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], 0, atol=1e-5)
    np.testing.assert_array_equal(found["map"][0, 0], np.eye(TOKENS)[0])
    np.testing.assert_allclose(found["logits_time"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["q_from_time"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["v_from_time"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["key_effect"], 0, atol=1e-6)  # however large it is
    same = heads.measure(layer, layer.time_BT, (0.5, 0.5))
    np.testing.assert_allclose(same["change"], 0, atol=1e-6)


def test_a_split_of_known_variances():
    draws = np.random.default_rng(0)
    parts = []
    for axis, (size, variance) in enumerate(((6, 1.0), (5, 4.0), (7, 2.0))):
        values = draws.normal(size=size)
        values = (values - values.mean()) / values.std() * np.sqrt(variance)
        parts.append(values.reshape([-1 if axis == other else 1 for other in range(3)]))
    split = heads.split_variance(3 + sum(parts))
    expected = {"time": 1 / 7, "image": 4 / 7, "position": 2 / 7, "rest": 0}
    assert split.keys() == expected.keys()
    np.testing.assert_allclose(list(split.values()), list(expected.values()), atol=1e-12)
    product = parts[0] * parts[1] + 0 * parts[2]
    np.testing.assert_allclose(heads.split_variance(product)["rest"], 1, atol=1e-12)
    assert not any(heads.split_variance(np.full((2, 3, 4), 0.7)).values())


def test_the_spectrum_of_a_wave():
    side, amplitude = 16, 0.8
    for periods in (0, 3, 8):
        wave = amplitude * np.cos(2 * np.pi * periods * np.arange(side) / side)
        image = np.broadcast_to(wave[None, :, None], (side, side, 2))
        power = spectra.radial_power(image)
        away = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side, 1 / side)] * 2))
        ring = (np.rint(away) == periods).sum()
        whole = amplitude**2 if periods in (0, 8) else amplitude**2 / 2  # of a cosine: half
        expected = np.zeros(9)
        expected[periods] = whole / ring
        np.testing.assert_allclose(power, expected, atol=1e-12)


def test_when_a_frequency_settles():
    side, steps = 8, 6
    x = 2 * np.pi * np.arange(side) / side
    waves = {number: np.cos(number * x)[None, :, None] for number in (1, 2, 3)}
    there = {1: 1, 2: 3, 3: 5}  # from which step a wave is whole
    estimates = np.zeros((steps, 2, side, side, 1))
    for step in range(steps):
        for number, wave in waves.items():
            estimates[step] += wave * (1.0 if step >= there[number] else 0.5)
    # 0.5 of an amplitude are a quarter of the power: too little at a tenth, enough at a half.
    assert spectra.settled_at(estimates)[1:4].tolist() == [1, 3, 5]
    assert spectra.settled_at(estimates, share=0.5)[1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "model",
    [
        ImageDiffiT(
            8, 1, channels=(8, 16), num_blocks=(1, 2), time_width=16, head_width=8, window=4
        ),
        LatentDiffiT(8, 1, hidden_size=16, depth=2, num_heads=2, time_in="token"),
    ],
)
def test_a_measured_network_is_the_network(model):
    variables = models.init_variables(model, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, *model.sample_shape))
    level = jnp.array([0.3, -1.0])

    def statistics(layer):
        weights = heads.weights_of(layer.q, layer.k, layer.bias)
        return {"weights": weights}

    y, found = jax.jit(
        lambda v: models.measured_network(model, v, statistics)(x, level, {}), static_argnums=()
    )(variables)
    plain, kept = jax.jit(lambda v: model.apply(v, x, level, {}, mutable=["intermediates"]))(
        variables
    )
    np.testing.assert_allclose(y, plain, atol=1e-6)
    kept = jax.tree.leaves(kept)
    assert sum(len(one) for one in kept) == len(found)
    flat = [one for stack in kept for one in stack]
    for layer, one in zip(found.values(), flat, strict=True):
        np.testing.assert_allclose(layer["weights"], one, atol=1e-6)


def test_time_that_stands_still_at_its_own_level_is_no_other():
    setup = setup_experiment(small_config(model__time_in="bias"), to_train=False)
    variables = models.init_variables(setup.experiment.model, jax.random.key(0))
    found = follow(setup, variables, images=3, steps=4, frozen=0.5)
    assert found.denoised.shape == (4, 3, 8, 8, 1) and list(found.layers) == [
        "encoder_0[0]",
        "encoder_0[1]",
    ]
    for layer in found.layers.values():
        assert layer["entropy"].shape == (4, 3, 1, 64)
        np.testing.assert_allclose(layer["map"][2], layer["map_frozen"][2], atol=1e-6)
        np.testing.assert_array_equal(layer["k_from_time"], 0)
    assert setup.experiment.process.sigmas(4)[0] == found.sigmas[0]


def test_the_verb_writes_a_report_with_pictures(tmp_path):
    weights = GOLDEN / "edm_snapshot.pkl"
    source = Weights(weights, config_for_weights(None, str(weights)))
    folder = analyse(source, output=tmp_path / "out", images=2, steps=3)
    names = {path.name for path in folder.iterdir()}
    pictures = {f"{name}.png" for name in ("maps", "heads", "time", "variance", "spectra")}
    assert names == pictures | {"report.md", "analysis.npz"}
    with np.load(folder / "analysis.npz") as arrays:
        layers = arrays["layers"].tolist()
        assert layers == ["enc_4x4_block0", "dec_4x4_in0", "dec_4x4_block1"]
        assert arrays["enc_4x4_block0/entropy"].shape == (3, 1)
        assert arrays["power"].shape == (3, 5)
    assert "no weight by more than" in (folder / "report.md").read_text()
    with pytest.raises(UserError, match="holds an analysis"):
        analyse(source, output=tmp_path / "out", images=2, steps=3)
    for change, message in (
        (dict(images=1), "--images is 1"),
        (dict(steps=1), "--steps is 1"),
        (dict(query=(0.5, 1.0)), "--query"),
        (dict(frozen=2.0), "--frozen is 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            analyse(source, output=tmp_path / "b", **change)
    assert not (tmp_path / "b").exists()


def test_no_array_of_queries_and_keys_leaves_a_layer():
    config = small_latent_config(model__input_size=16)  # 64 tokens
    setup = setup_experiment(config, to_train=False)
    sigmas = setup.experiment.process.sigmas(5)
    way = Way(4, tuple(sigmas.tolist()))
    denoised, layers = jax.eval_shape(
        program(setup, way), setup.variables, batch_shapes(setup.mesh, 4)
    )
    assert denoised.shape == (5, 4, 16, 16, 4) and len(layers) == 2
    for layer in layers.values():
        assert layer["map"].shape == (5, 4, 2, 64)
        for array in layer.values():
            assert array.shape[-2:] != (64, 64)
    assert _chosen(config, ["analyse"]) == ["analyse"]
    priced = []
    answer = price_analysis(
        setup,
        chip_of("v5e:2x2"),
        4,
        lambda lowered: priced.append(lowered) or TooLarge(reason="no"),
    )
    assert isinstance(answer, TooLarge) and len(priced) == 1


class Plain(Model):
    """A network without attention."""

    @property
    def sample_shape(self):
        return 8, 8, 1

    @nn.compact
    def __call__(self, x_BHWC, noise_level_B, conditioning, capture=None):
        return Dense(1)(x_BHWC)


def test_a_network_without_attention_is_refused():
    setup = setup_experiment(small_config(), to_train=False)
    experiment = dataclasses.replace(setup.experiment, model=Plain(num_classes=10))
    setup = Setup(experiment, setup.mesh, setup.objective)
    variables = models.init_variables(experiment.model, jax.random.key(0))
    with pytest.raises(UserError, match="Plain has no attention: there is nothing to analyse"):
        follow(setup, variables, images=2, steps=2)
