"""Training: the update against its parts, resuming bit for bit, and what a run leaves behind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import small_config
from support.trees import assert_equal_trees

from diffit_jax.data.sources import SyntheticSource, batches
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.experiment.sections import EMA, Optimizer
from diffit_jax.run.optimizer import learning_rate, make_optimizer
from diffit_jax.run.state import abstract_state, create_state
from diffit_jax.runtime import parallel
from diffit_jax.training.loggers import events_in
from diffit_jax.training.step import ema_rate, ema_update, make_train_step, step_metrics
from diffit_jax.training.train import train


def test_ema_rate_is_edms():
    settings = EMA(halflife_images=500_000, rampup_ratio=0.05)
    # The steady decay for batches of 512 and 256, and EDM's ramp-up: beta = 0.5^(batch /
    # max(min(halflife, 5 % of the images), 1e-8)).
    for batch, beta in ((512, 0.99929047), (256, 0.99964517)):
        assert abs(1 - float(ema_rate(settings, jnp.int32(10**6), batch)) - beta) < 1e-8
    # The first update replaces the initial parameters.
    assert float(ema_rate(settings, jnp.int32(0), 512)) == 1
    for step in (1, 100, 10_000):
        expected = 1 - 0.5 ** (512 / min(500_000, step * 512 * 0.05))
        np.testing.assert_allclose(ema_rate(settings, jnp.int32(step), 512), expected, rtol=1e-6)
    # A half-life of 10⁹ images: 1 - beta = 1.77e-7 would lose most of its digits in float32
    # arithmetic.
    tiny = ema_rate(EMA(1e9, 1e9), jnp.int32(10**6), 256)
    np.testing.assert_allclose(tiny, -np.expm1(-np.log(2) * 256 / 1e9), rtol=1e-6)


def test_ema_halves_in_its_halflife():
    average, rate = (
        jnp.ones(3),
        ema_rate(EMA(halflife_images=640, rampup_ratio=1e9), jnp.int32(1), 64),
    )
    for _ in range(10):
        average = ema_update(average, jnp.zeros(3), rate)
    np.testing.assert_allclose(average, 0.5, rtol=1e-5)


def test_learning_rate_ramps_up():
    settings = Optimizer(learning_rate=2e-3, warmup_steps=200)
    np.testing.assert_allclose(
        [learning_rate(settings, step) for step in (0, 50, 200, 10**6)],
        [0, 5e-4, 2e-3, 2e-3],
        rtol=1e-6,
    )
    assert float(learning_rate(Optimizer(learning_rate=2e-3, warmup_steps=0), 0)) == np.float32(
        2e-3
    )


def test_optimizer_is_adam():
    """Two updates against Adam's formulas in float64."""
    settings = Optimizer(learning_rate=0.1, warmup_steps=0, beta1=0.8, beta2=0.9, epsilon=1e-3)
    optimizer, value, mean, square = make_optimizer(settings), np.array([1.0, -2.0]), 0.0, 0.0
    params = jnp.asarray(value, jnp.float32)
    state = optimizer.init(params)
    for count, gradient in ((1, np.array([0.5, 3.0])), (2, np.array([-1.0, 0.1]))):
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state)
        params = params + update
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        value = value - 0.1 * (mean / (1 - 0.8**count)) / (
            np.sqrt(square / (1 - 0.9**count)) + 1e-3
        )
        np.testing.assert_allclose(params, value, rtol=1e-5)


def test_state_is_what_eval_shape_says():
    experiment, mesh = build(small_config()), parallel.make_mesh()
    state = create_state(experiment, mesh)
    abstract = abstract_state(experiment, mesh)
    for real, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (
            shape.shape,
            shape.dtype,
        ) and real.sharding == shape.sharding
    assert_equal_trees(state.params, state.ema)


def test_update_does_not_depend_on_the_number_of_devices():
    experiment = build(small_config())
    images, results = SyntheticSource((8, 8, 1), 10), []
    for count in (1, 2):
        mesh = parallel.make_mesh(jax.devices()[:count])
        sharding = parallel.replicated(mesh)
        state = create_state(experiment, mesh)
        start, empty = (
            jax.device_get(state.params),
            jax.device_put(step_metrics(experiment).empty(), sharding),
        )
        step, data = (
            jax.jit(make_train_step(experiment), out_shardings=sharding),
            batches(images, 8, seed=0),
        )
        losses = []
        for _ in range(3):
            state, metrics = step(state, empty, parallel.put_batch(mesh, next(data), 8), {})
            losses.append(float(metrics.compute()["loss"]))
        results.append((losses, jax.device_get(state.params)))
    # The same random numbers, bit for bit; the sums over the batch are only taken in another order.
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    # Adam turns rounding noise of parameters that hardly matter into full steps, so compare with
    # the distance travelled.
    norm = lambda one, other: np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    )
    assert norm(results[0][1], results[1][1]) < 1e-3 * norm(results[0][1], start)


def test_run_leaves_its_files(run):
    workdir, state = run
    assert int(state.step) == 6
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert json.loads((workdir / "config.json").read_text())["model"]["window"] == 4
    assert [path.name for path in (workdir / "grids").iterdir()] == ["00000006.png"]
    (events,) = (workdir / "events").iterdir()
    names = scalar_names(events.read_bytes())
    speed = {
        "steps_per_s",
        "images_per_s",
        "images_per_s_per_chip",
        "tflops_per_s_per_chip",
        "data_wait_share",
        "compilations",
        "beside_share",
    }
    assert names == {"loss", "gradient_norm", "learning_rate", "skipped", "skipped_in_row"} | speed


def scalar_names(content):
    """Names of the scalars in a TensorBoard file."""
    return {
        value.tag
        for event in events_in(content)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def test_loss_falls():
    """Forty updates with a high learning rate on one repeated image."""
    experiment, mesh = (
        build(small_config(optimizer={"learning_rate": 2e-2, "warmup_steps": 0})),
        parallel.make_mesh(),
    )
    sharding = parallel.replicated(mesh)
    state = create_state(experiment, mesh)
    step = jax.jit(make_train_step(experiment), out_shardings=sharding)
    batch = parallel.put_batch(
        mesh, {"image": np.full((8, 8, 8, 1), 200, np.uint8), "label": np.zeros(8, np.int32)}, 8
    )
    losses = []
    for _ in range(40):
        empty = jax.device_put(step_metrics(experiment).empty(), sharding)
        state, metrics = step(state, empty, batch, {})
        losses.append(float(metrics.compute()["loss"]))
    # Measured 0.55; noise in a mean of 80 losses is about 0.1.
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_resumed_run_equals_uninterrupted_run(run, tmp_path):
    """Stopped after three of six updates, between two checkpoints' intervals, and started anew."""
    _, uninterrupted = run
    train(small_config(training__total_steps=3), workdir=tmp_path)
    assert_equal_trees(train(small_config(), workdir=tmp_path), uninterrupted)


def test_finished_run_is_left_alone(run):
    workdir, state = run
    before = sorted(
        (path.name, path.stat().st_mtime)
        for path in workdir.rglob("*")
        if "config" not in path.name
    )
    assert_equal_trees(train(small_config(), workdir=workdir), state)
    assert [entry for entry in before if "events" in entry[0]] == [
        entry
        for entry in sorted((path.name, path.stat().st_mtime) for path in workdir.rglob("*"))
        if "events" in entry[0]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__widow": 4}, "config key model.widow is unknown: did you mean model.window"),
        ({"extra": 1}, "config key extra is unknown"),
        (
            {"augmentation": {"probability": 0.1}},
            "config key model.augment_labels is 0, but the augmentation tells the network 9",
        ),
        ({"model__augment_labels": 9}, "model.augment_labels is 9, but .* set it to 0"),
        ({"augmentation": {"probability": 1.2}}, "augmentation.probability is 1.2"),
        ({"augmentation": {"rotate": 1.0}}, "augmentation.rotate is unknown: did you mean"),
        ({"model__dropout": 1.0}, "model.dropout is 1.0: it must be between 0 and 1, and not"),
        (
            {"process": {"name": "iddpm"}},
            "the process wants a network with 2 output channels, the model has 1",
        ),
        (
            {
                "sampling__sampler": {"name": "general", "num_steps": 3, "sigma_max": 200.0},
                "process": {"name": "ve"},
            },
            "sampling.sampler.sigma_max is 200, outside of the noise levels that the network",
        ),
        ({"model__name": "unet"}, "config key model.name is 'unet': use image_diffit"),
        ({"optimizer": {"learning_rate": 1e-3}}, "config key optimizer.warmup_steps is missing"),
        ({"training__batch_size": 7}, "training.batch_size 7 does not divide over 2 devices"),
        ({"training__log_steps": 0}, "training.log_steps is 0: it must be at least 1"),
        ({"training__label_dropout": 1.5}, "training.label_dropout is 1.5"),
        ({"model__image_size": 9}, "stage 0 is 9 pixels wide, which window 4 does not divide"),
        ({"model__num_blocks": (2, 2)}, "give one entry for each stage"),
        ({"model__window": 3}, "which window 3 does not divide"),
        ({"model__dtype": "float8"}, "model.dtype is 'float8'"),
        ({"model__num_classes": 0}, "guidance.scale guides by labels, but model.num_classes is 0"),
        ({"process__sigma_min": 100.0}, "sigma_min 100.0 must lie between 0 and sigma_max"),
        ({"seed": -1}, "config key seed is -1"),
        ({"model__mlp_ratio": 2.5}, "config key model.mlp_ratio is 2.5: it must be of type int"),
        ({"model__num_classes": -1}, "num_classes is -1: it must be at least 0"),
        ({"process__rho": 0.0}, "rho is 0.0: it must be between 0.1 and 1000"),
        (
            {"sampling__sampler": {"name": "ddpm", "num_steps": 3, "respacing": 250}},
            "config key sampling.sampler.respacing is 250: it must be of type str",
        ),
        (
            {"optimizer": {"learning_rate": "fast", "warmup_steps": 0}},
            "optimizer.learning_rate is 'fast': it must be of type float",
        ),
    ],
)
def test_impossible_configs_write_nothing(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(small_config(**change), workdir=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
