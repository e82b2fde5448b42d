"""What really happens to runs: kills at any moment, full disks, damaged data, clocks that jump.
Nothing good is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import warm
from support.configs import small_latent_config
from support.processes import checkpoints_of, environment, write_config
from support.trees import assert_equal_trees

from diffit_jax.data.sources import DataSpec, open_dataset
from diffit_jax.errors import UserError
from diffit_jax.experiment.config import build
from diffit_jax.run.state import abstract_state, restore_state
from diffit_jax.runtime import parallel
from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.training.train import train

ROOT = Path(__file__).parents[2]


def start(command, tmp_path, *flags, config=None):
    """A command in a process of its own, on two devices."""
    if config is not None:
        path = write_config(tmp_path / "config.py", config)
        flags = ("--config", str(path), *flags)
    arguments = [warm.python(), str(ROOT / "launch" / f"{command}.py"), *map(str, flags)]
    return subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path
    )


def finish(process, timeout=240):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def final_state(workdir, config):
    experiment = build(config)
    return restore_state(
        Checkpoints(workdir / "checkpoints", keep=3),
        abstract_state(experiment, parallel.make_mesh()),
    )


def test_four_kills_lose_nothing(tmp_path):
    """SIGKILL at four random moments (start-up, steps, asynchronous saves); the run ends bit for
    bit as one that was left alone.

    A checkpoint that was there after one kill is still there, or followed by a newer one, after the
    next.
    """
    config, seldom = (
        small_latent_config(
            training__total_steps=250, training__checkpoint_steps=steps, training__log_steps=50
        )
        for steps in (7, 250)
    )
    whole = start("train", tmp_path, "--workdir", tmp_path / "whole", config=seldom)
    status, errors = finish(whole)
    assert status == 0, errors
    moments, workdir, newest, killed = random.Random(4), tmp_path / "run", 0, []
    for kill in range(4):
        process = start("train", tmp_path, "--workdir", workdir, config=config)
        deadline = time.monotonic() + 120
        if kill % 3:  # else perhaps before anything is there
            while (
                max(checkpoints_of(workdir), default=0) <= newest
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.15))
        else:
            time.sleep(moments.uniform(0.5, 3))
        process.send_signal(signal.SIGKILL)
        status, errors = finish(process)
        assert status == -signal.SIGKILL, (status, errors)  # it was still running
        found = max(checkpoints_of(workdir), default=0)
        assert found >= newest
        newest = found
        killed.append(newest)
    assert 0 < newest < 250 and len(set(killed)) > 2, killed
    status, errors = finish(start("train", tmp_path, "--workdir", workdir, config=config))
    assert status == 0 and f"resuming at step {newest}" in errors, errors
    assert_equal_trees(final_state(workdir, config), final_state(tmp_path / "whole", config))
    # Half-written ones are cleaned away.
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


def test_sigterm_saves_and_says_resume_me(tmp_path):
    config = small_latent_config(training__total_steps=100_000, training__checkpoint_steps=50_000)
    process = start("train", tmp_path, "--workdir", tmp_path / "run", config=config)
    while not list((tmp_path / "run" / "events").glob("*")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process, timeout=60)
    (saved,) = checkpoints_of(tmp_path / "run")
    assert status == 75 and f"preempted: checkpoint {saved} of 100000 steps is saved" in errors, (
        errors
    )


def test_sigterm_in_the_middle_of_sampling(latent_run, tmp_path):
    """What is drawn stays; the same command goes on and ends with the samples of an uninterrupted
    one."""
    flags = (
        "--workdir",
        latent_run[0],
        "--seeds",
        "0-399",
        "--batch_per_device",
        "1",
        "--sampler.num_steps",
        "20",
    )
    whole = start("sample", tmp_path, *flags, "--output", tmp_path / "whole.npz")
    process = start("sample", tmp_path, *flags, "--output", tmp_path / "s.npz")
    parts = tmp_path / "s.npz.parts"
    while not (parts / "00000006-00000008.npy").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    drawn = len(list(parts.glob("*.npy")))
    assert (
        status == 75
        and f"preempted: {2 * drawn} of 400 samples are saved" in errors
        and drawn < 200
    ), errors
    status, errors = finish(start("sample", tmp_path, *flags, "--output", tmp_path / "s.npz"))
    assert status == 0 and finish(whole)[0] == 0, errors
    with np.load(tmp_path / "s.npz") as ours, np.load(tmp_path / "whole.npz") as theirs:
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB where one can be mounted, else None."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_during_a_save(small_disk, tmp_path, monkeypatch):
    """The run ends and says so; the checkpoint before is whole, and the run goes on from it
    elsewhere. Prints which disk it was."""
    config = small_latent_config(
        training__total_steps=40, training__checkpoint_steps=2, training__keep_checkpoints=50
    )
    if small_disk is not None:
        print("a tmpfs of 3 MB")
        workdir = small_disk / "run"
    else:
        print("ENOSPC injected at the writer")
        workdir = tmp_path / "run"
        import orbax.checkpoint as ocp

        manager_save, count = ocp.CheckpointManager.save, []

        def full(self, *arguments, **more):
            count.append(1)
            if len(count) > 2:
                raise OSError(28, "No space left on device")
            return manager_save(self, *arguments, **more)

        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(
        UserError,
        match=r"could not be written to .*: make room; checkpoint \d+ is the last good one|cannot "
        r"be written",
    ) as error:
        train(config, workdir=workdir)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    saved = checkpoints_of(workdir)
    assert saved
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workdir, elsewhere)
    state = train(
        small_latent_config(training__total_steps=saved[-1] + 2, training__keep_checkpoints=50),
        workdir=elsewhere,
    )
    assert int(state.step) == saved[-1] + 2


def test_a_damaged_record_is_named(tmp_path):
    open_dataset("digits", "train", str(tmp_path), DataSpec((8, 8, 1), 10))
    (record,) = tmp_path.rglob("*train*.array_record*")
    content = bytearray(record.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = os.urandom(4000)
    record.write_bytes(bytes(content))
    with pytest.raises(
        UserError, match=r"data set digits in .* is damaged .*: delete it to have it prepared anew"
    ) as error:
        open_dataset("digits", "train", str(tmp_path), DataSpec((8, 8, 1), 10))
    assert "\n" not in str(error.value)


CLOCK = """
import sys, time
sys.path.insert(0, {tests!r})
from support.configs import small_latent_config
from support.processes import compile_quickly
from diffit_jax.training import train as verb

compile_quickly()  # the same initial weights, bit for bit

real, offset, jumps = time.time, [0.0], iter((-86_400.0, 31_536_000.0))
time.time = lambda: real() + offset[0]
save = verb.save_state

def save_then_jump(*arguments):  # which is done when the clock jumps
    save(*arguments)
    arguments[0].wait()
    offset[0] = next(jumps, 0.0)

verb.save_state = save_then_jump
config = small_latent_config(training__checkpoint_minutes=10.0, training__log_steps=1)
verb.train(config, workdir={workdir!r})
"""


def test_a_clock_that_jumps_changes_nothing(tmp_path, latent_run):
    """A day back, then a year ahead: checkpoints by time follow a clock that only runs on, and
    nothing else asks for the time of day."""
    code = CLOCK.format(tests=str(Path(__file__).parents[1]), workdir=str(tmp_path / "run"))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert_equal_trees(
        final_state(tmp_path / "run", small_latent_config()).params, latent_run[1].params
    )
    assert checkpoints_of(tmp_path / "run") == [2, 4, 6]


def test_checkpoints_by_time_and_kept_for_good(tmp_path):
    """So old that every report saves one; multiples of four stay beyond the newest."""
    config = small_latent_config(
        training__total_steps=11, training__log_steps=1, training__checkpoint_steps=1000
    )
    config.training.update(checkpoint_minutes=1e-9, keep_every_steps=4, keep_checkpoints=2)
    train(config, workdir=tmp_path)
    assert checkpoints_of(tmp_path) == [4, 8, 10, 11]
