"""Preflight: what it reports, that configs still fit, and that their estimates have not become
worse."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import warm
from support.configs import config_of, small_config, small_latent_config
from support.counts import multiply_adds
from support.processes import write_config

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.preflight import compiler, preflight
from diffit_jax.preflight import report as preflight_report
from diffit_jax.preflight.figures import Sweep
from diffit_jax.run.state import fresh_state
from diffit_jax.runtime import parallel
from diffit_jax.runtime.parallel import MeshShape

ROOT = Path(__file__).parents[2]
# libtpu's version → config → [topology, estimated seconds of a training step];
# tests/studies/estimates.py writes it.
BASELINES = json.loads((ROOT / "tests" / "golden" / "estimates.json").read_text())
TOLERATED = 1.05


@pytest.fixture(scope="module", autouse=True)
def answers(tmp_path_factory):
    """The compiler's cache, which begins with the answers of tests/golden/preflight: a program that
    is word for word the same as when they were given is not compiled again, nor is one of an
    earlier test. tests/studies/estimates.py renews them."""
    place = tmp_path_factory.mktemp("preflight") / "answers"
    renewed = os.environ.get("RENEW_ANSWERS")
    if renewed:
        place = Path(renewed)
    else:
        shutil.copytree(ROOT / "tests" / "golden" / "preflight", place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "CACHE", place)
        yield place


def large_latent(**overrides):
    """With 16 × 16 tokens, which the kernel serves."""
    sizes = dict(
        model__input_size=32,
        model__hidden_size=256,
        model__num_heads=2,
        model__dtype="bfloat16",
        model__attention="auto",
    )
    return small_latent_config(**sizes | {"training__batch_size": 32} | overrides)


def command(tmp_path, *arguments, config=None):
    """`launch/preflight.py` in a process of its own, with a home, and so a cache, of its own."""
    if config is not None:
        arguments = ("--config", str(write_config(tmp_path / "config.py", config)), *arguments)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "HOME": str(tmp_path)
    }
    arguments = [warm.python(), str(ROOT / "launch" / "preflight.py"), *map(str, arguments)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture(scope="module")
def reported(answers):
    """(config, its report)."""
    config = large_latent(mesh={"data": 1, "fsdp": 4})
    return config, preflight.preflight(config, topology="v5e:2x2")


def test_report(reported):
    """Sizes and rates that can be counted otherwise."""
    config, report = reported
    setting, memory, train = report.setting, report.memory, report.train
    assert (
        report.fits
        and setting.chips == 4
        and setting.attention == "pallas (the kernel serves this network)"
        and setting.batch_per_chip == 8
    )
    experiment = build(config)
    work = 3 * 2 * sum(multiply_adds(experiment.model).values()) * 32
    assert train.flops == pytest.approx(work, rel=0.01)
    assert train.mfu == pytest.approx(train.flops / train.step_s / 4 / 197e12)
    assert train.step_s == max(train.compute_s, train.collectives_s) and train.between_slices_s == 0
    assert train.serial_s == train.compute_s + train.collectives_s
    assert train.images_per_s_per_chip == 8 / train.step_s
    assert (
        0 < train.kernels_s < train.compute_s
        and not train.unpriced_kernels
        and not train.unknown_loops
    )
    held = memory.held
    # fsdp divides all that is large: parameters, two moments, one average.
    assert held.optimizer == pytest.approx(2 * held.ema, rel=0.01) and held.ema < held.parameters
    assert memory.total < memory.limit == 15.75 * 2**30
    state = jax.eval_shape(
        lambda: fresh_state(models.init_variables(experiment.model, jax.random.key(0)), experiment)
    )
    assert report.checkpoint_bytes == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    assert report.sample.batch.images == 2 * 4 and report.sample.batch.step_s > 0
    assert report.run.hours == pytest.approx(6 * train.step_s / 3600)
    assert report.run.data_bytes_per_s_per_host == pytest.approx(
        32 / train.step_s * (32 * 32 * 4 * 4 + 4)
    )
    assert len(train.dearest) == compiler.TOP_OPS and any(
        "attention.py" in entry.source for entry in train.dearest
    )
    text = preflight_report.render(report)
    assert (
        "ESTIMATES, not measurements" in text and text.endswith("\nFITS") and "all-gather" in text
    )
    assert "dearest place" in preflight_report.explain(report)


def test_the_second_time_comes_from_the_cache(reported, monkeypatch):
    config, first = reported
    monkeypatch.setattr(compiler, "_ask", None)  # nobody is asked
    second = preflight.preflight(config, topology="v5e:2x2")
    assert second.train.compute_s == first.train.compute_s
    with pytest.raises(TypeError):
        preflight.preflight(large_latent(model__depth=3), topology="v5e:2x2", programs=["train"])


def test_kinds_of_experiments():
    """An image network with EDM, accumulation and two more averages, over two slices."""
    config = small_config(training__batch_size=64, training__accumulation=2)
    config.ema.power_lengths = (0.05, 0.10)
    report = preflight.preflight(config, topology="v5e:2x4", num_slices=2, programs=["train"])
    assert (
        report.setting.chips == 16
        and report.setting.averages == 3
        and report.setting.num_heads is None
    )
    assert report.train.step_s >= report.train.between_slices_s
    assert len(report.memory.held.power_emas) == 2 and min(report.memory.held.power_emas) > 0
    assert report.train.between_slices_s > 0 and "power_ema_1" in preflight_report.render(report)
    assert "2 slices of v5e:2x4" in preflight_report.render(report)
    setting = dataclasses.replace(report.setting, calibrated=False)
    text = preflight_report.render(dataclasses.replace(report, setting=setting))
    assert "not calibrated" in text


def test_what_is_not_priced_is_said(reported):
    """Autoguidance's second network is not known."""
    config, report = reported
    assert "NOT PRICED" not in preflight_report.render(report)
    config = ConfigDict(config.to_dict())
    config.sampling.guidance = dict(kind="autoguidance", scale=2.0)
    guided = preflight.preflight(config, topology="v5e:2x2", programs=["sample"])
    assert guided.train is None and guided.fits and guided.sample.batch.images == 8
    assert "NOT PRICED: sampling's autoguidance" in preflight_report.render(guided)


def test_two_commands_at_once(tmp_path):
    """Each says that it fits; a second process with the TPU's compiler is no obstacle."""
    running = [
        command(
            tmp_path,
            "--topology",
            "v5p:2x2x1",
            "--programs",
            "train",
            "--json",
            tmp_path / "r.json",
            config=large_latent(),
        )
    ]
    running.append(command(tmp_path, "--topology", "v5e:2x2", "--calibrate"))
    results = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert (
        results[0][0].rstrip().endswith("FITS")
        and json.loads((tmp_path / "r.json").read_text())["fits"]
    )
    assert "8192 x 8192 x 8192" in results[1][0] and "of the peak (estimate)" in results[1][0]


def test_a_config_that_does_not_fit_says_by_how_much(tmp_path):
    """XL's blocks, everything kept for the backward pass: status 1, and the sizes."""
    config = config_of("imagenet512_latent")
    config.model.depth = 28
    config.model.remat = "none"
    process = command(
        tmp_path,
        "--topology",
        "v5e:2x2",
        "--batch_per_chip",
        32,
        "--programs",
        "train",
        "--explain",
        config=config,
    )
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and errors.rstrip().endswith(
        "error: it does not fit (see above)"
    ), errors
    assert "DOES NOT FIT: the train step needs" in out and "too much" in out and "remat=full" in out


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (12.00G) "
            "exceeds available HBM (9.50G).",
            (12, 9.5),
        ),
        (
            "Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm. Exceeded hbm "
            "capacity by 2.45G.",
            (18.2, 15.75),
        ),
    ],
)
def test_shortages_are_read_from_the_compilers_messages(message, expected):
    shortage = compiler.shortage_in(f"RESOURCE_EXHAUSTED: {message}")
    assert (shortage.needed, shortage.available) == tuple(size * 2**30 for size in expected)
    vmem = compiler.shortage_in(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 80.20M of 64.00M vmem."
    )
    assert "vmem" in vmem.reason and vmem.needed is None


@pytest.mark.parametrize(
    ("topology", "shape"),
    [("v5e:4x4", MeshShape(fsdp=2, num_slices=2)), ("v5e:8x8", MeshShape(-1, -1, num_slices=2))],
)
def test_meshes_of_several_slices(topology, shape):
    """`data` goes over the slices, the other axes stay within one, also where they divide a
    physical axis."""
    mesh = parallel.make_mesh(compiler.topology_devices(topology, 2), shape)
    for position, slice_ in enumerate(np.split(mesh.devices, 2)):
        assert {device.slice_index for device in slice_.flat} == {position}
    with pytest.raises(
        UserError, match=r"mesh.num_slices is 1, but the devices form 2: set it to 2"
    ):
        parallel.make_mesh(compiler.topology_devices(topology, 2), MeshShape())


def test_sweep():
    """All combinations, the impossible ones with the reason; the best is the one with the highest
    rate."""
    config, rows = small_latent_config(training__batch_size=32), []
    asked = preflight.parse_sweep("num_heads=2,3,mesh=fsdp=1,fsdp=4")
    sweep = preflight.sweep(config, "v5e:2x2", 1, asked, rows.append)
    assert [tuple(trial.varied.values()) for trial in sweep.trials] == [
        ("2", "fsdp=1"),
        ("2", "fsdp=4"),
        ("3", "fsdp=1"),
        ("3", "fsdp=4"),
    ]
    possible, impossible = sweep.trials[:2], sweep.trials[2:]
    assert all("num_heads 3" in trial.error and trial.report is None for trial in impossible)
    rates = [trial.report.train.images_per_s_per_chip for trial in possible]
    assert sweep.best.rate == max(rates) and sweep.best in possible
    assert len(rows) == 6 and rows[-1].endswith("<- best that fits")
    assert "num_heads 3" in rows[4]
    assert Sweep(impossible).best is None and Sweep([]).best is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(topology="v9:2x2"), "--topology v9:2x2 is unknown: use v4:2x2x1"),
        (dict(topology="v5e"), "--topology v5e is unknown to the TPU compiler"),
        (dict(topology="v5e:3x5"), "--topology v5e:3x5 is unknown to the TPU compiler .*: use v4"),
        (dict(topology="v5e:2x2", programs=["evaluate"]), "--programs has 'evaluate'"),
        (dict(topology="v5e:2x2", programs=[]), "--programs is empty"),
        (
            dict(topology="v5e:2x2", config=small_config(mesh={"data": 3})),
            "does not make 4 devices",
        ),
        (dict(topology="v5e:4x4"), "training.batch_size 8 does not divide over 16 devices"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        preflight.preflight(**{"config": small_config()} | arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour", "--sweep has 'colour': write KEY=VALUE,VALUE,… with some of batch"),
        ("batch=2,colour=4", "--sweep has 'colour': write KEY"),
        ("batch=4/8", "batch=4/8: write values as in batch=4,8,16"),
        ("batch=four", "batch=four"),
        ("mesh=16", "mesh=16: write values"),
        ("mesh=fsdp=4+", "write values"),
    ],
)
def test_impossible_sweeps(text, message):
    with pytest.raises(UserError, match=message):
        preflight.parse_sweep(text)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"TPU compiler is not installed: bash launch/setup_env\.sh test"
    ):
        preflight.preflight(small_config(), topology="v5e:2x2")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", sorted(next(iter(BASELINES.values()))))
def test_configs_still_fit_and_are_no_slower(name):
    """Each config's training step on its topology: it fits, and the estimate is at most 5 % above
    that of this version of libtpu.

    Data and weights are not there, and not needed.
    """
    baselines = BASELINES.get(compiler.libtpu_version())
    assert baselines, (
        f"no estimates for libtpu {compiler.libtpu_version()}: run tests/studies/estimates.py"
    )
    topology, seconds = baselines[name]
    report = preflight.preflight(config_of(name), topology=topology, programs=["train"])
    assert report.fits and report.memory.headroom > 0
    train = report.train
    assert not train.unpriced_kernels and not train.unknown_loops and not train.even_conditionals
    # Much less than before would mean that something is not counted any more, or that the file is
    # old.
    assert 0.8 * seconds <= train.step_s <= TOLERATED * seconds, f"it was {seconds:.4f} s"
