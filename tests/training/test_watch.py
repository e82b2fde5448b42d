"""What a run says about itself, and that its loop neither moves data to the host nor compiles
anew."""

import time

import jax
import numpy as np
import pytest
from support.configs import small_config, small_latent_config, small_token_config

from diffit_jax.data.sources import batches
from diffit_jax.experiment.config import build
from diffit_jax.models.diffit.image import ImageDiffiT
from diffit_jax.models.model import traced_multiply_adds
from diffit_jax.run.objective import flops_per_image
from diffit_jax.run.state import create_state, open_training_data, setup_experiment
from diffit_jax.runtime import parallel
from diffit_jax.training.loop import Compilations, Watch
from diffit_jax.training.step import compile_train_step
from diffit_jax.training.train import train


def test_multiply_adds_of_an_image_network():
    """One stage without attention heads to speak of: counted by hand, layer by layer."""
    model = ImageDiffiT(
        image_size=8,
        image_channels=3,
        channels=(16,),
        num_blocks=(2,),
        window=4,
        time_width=32,
        head_width=8,
    )
    pixels, width = 64, 16
    block = pixels * 9 * width**2  # convolution
    block += pixels * 3 * width**2 + 2 * 32 * width  # q, k, v; time to query and value
    block += 2 * pixels * 16 * width + pixels * width**2  # attention over 16 tokens, and after it
    block += pixels * 8 * width**2  # MLP
    ends = 2 * pixels * 9 * 3 * width  # tokenizer and head
    assert traced_multiply_adds(model) == 2 * block + ends + 256 * 32 + 32 * 32


def test_report(monkeypatch):
    experiment, mesh = build(small_latent_config()), parallel.make_mesh()
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Watch(experiment, mesh)
    monkeypatch.setattr(watch, "_peak", 1e9)
    watch.start(10)
    for _ in range(4):
        with watch.data_wait():
            clock[0] += 0.5
    clock[0] += 6
    values = watch.report(30)
    assert values["steps_per_s"] == 20 / 8 and values["data_wait_share"] == 2 / 8
    assert values["images_per_s"] == 20 and values["images_per_s_per_chip"] == 10
    flops = 6 * traced_multiply_adds(experiment.model) * 10
    np.testing.assert_allclose(
        [values["tflops_per_s_per_chip"], values["mfu"]], [flops / 1e12, flops / 1e9]
    )
    clock[0] += 1
    assert watch.report(31)["steps_per_s"] == 1


def test_an_encoder_counts_until_its_loss_ends(monkeypatch):
    experiment = build(small_token_config("repa", representation__stop_step=30))
    clock, watch = [0.0], Watch(experiment, parallel.make_mesh())
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch.start(10)
    found = []
    for step in (20, 30, 40, 50):
        clock[0] += 1
        values = watch.report(step)
        found.append(values["tflops_per_s_per_chip"] * 1e12 / values["images_per_s_per_chip"])
    expected = [flops_per_image(experiment, update) for update in (10, 20, 30, 40)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert expected[0] == expected[1] > expected[2] == expected[3]


@pytest.mark.parametrize("config", [small_config(), small_latent_config(training__accumulation=2)])
def test_steady_state_moves_nothing_and_compiles_nothing(config):
    """Ten updates under a transfer guard: batches go to the devices explicitly, nothing comes back,
    and no program is built."""
    setup = setup_experiment(config)
    experiment, mesh = setup.experiment, setup.mesh
    state = create_state(experiment, mesh)
    data = batches(open_training_data(experiment), experiment.training.batch_size, 0)
    batch = parallel.put_batch(mesh, next(data), 8)
    step, collected, _ = compile_train_step(setup, state, batch)
    state, collected = step(state, collected, batch, {})
    compilations = Compilations()
    with (
        jax.transfer_guard_host_to_device("disallow"),
        jax.transfer_guard_device_to_host("disallow"),
    ):
        for _ in range(10):
            state, collected = step(state, collected, parallel.put_batch(mesh, next(data), 8), {})
        jax.block_until_ready(state)
    assert compilations.count == 0 and int(state.step) == 11
    with (
        pytest.raises(Exception, match=r"[Dd]isallowed"),
        jax.transfer_guard("disallow"),
    ):  # the guard is awake
        jax.jit(lambda x: x + 1)(np.ones(3))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="the profiler of jaxlib 0.7.2 crashed the process in two of five runs",
)
def test_profile_and_cache_are_reported(tmp_path, caplog):
    with caplog.at_level("INFO", logger="diffit_jax"):
        train(
            small_latent_config(training__total_steps=4),
            workdir=tmp_path / "run",
            profile_steps=(2, 3),
        )
    assert (
        "training step: compilation cache" in caplog.text
        and "wrote a trace of steps 2-3" in caplog.text
    )
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
