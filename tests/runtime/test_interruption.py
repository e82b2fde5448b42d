"""Signals at every stage of a command, and Ctrl-C: nothing is lost, and the status says whether to
run it again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import warm
from support.configs import small_latent_config
from support.processes import at_question, checkpoints_of, environment, write_config

ROOT = Path(__file__).parents[2]
# A config that takes its time: as an import does, in Python; or as a compilation does, in C, from
# which Python's handlers are not called.
SLOW = {
    "in Python": "import time\ntime.sleep(60)",
    "in C": "import numpy\na = numpy.random.rand(6000, 6000)\nnumpy.linalg.svd(a)",
}


def start(verb, folder, *flags, python=sys.executable, **more):
    """A command in a process of its own, on two devices; it imports for itself if nothing else is
    asked for."""
    command = [python, str(ROOT / "launch" / f"{verb}.py"), *map(str, flags)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=folder,
        **more,
    )


def end(process, timeout=60):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def wait_for(process, there, timeout=120):
    deadline = time.monotonic() + timeout
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][
            -2000:
        ]
        time.sleep(0.01)


def slow_start(tmp_path, how, **more):
    started = tmp_path / "started"
    (tmp_path / "slow.py").write_text(f"open({str(started)!r}, 'w').close()\n{SLOW[how]}\n")
    process = start("train", tmp_path, "--config", "slow.py", "--workdir", "run", **more)
    wait_for(process, started.exists)
    time.sleep(0.3)
    return process


@pytest.mark.parametrize("how", SLOW)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name
)
def test_a_signal_before_there_is_anything_to_save(tmp_path, how, number):
    """The command ends at once, wherever it is, with the status that brings the job back."""
    process = slow_start(tmp_path, how)
    process.send_signal(number)
    status, errors = end(process, timeout=10)
    assert (
        status == 75
        and errors.splitlines()[-1].startswith("preempted: ")
        and "run the same command again" in errors
    ), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", SLOW)
def test_ctrl_c_before_there_is_anything_to_save(tmp_path, how):
    process = slow_start(tmp_path, how)
    process.send_signal(signal.SIGINT)
    status, errors = end(process, timeout=10)
    assert (
        status == 130
        and errors.splitlines()[-1].startswith("interrupted: ")
        and "Traceback" not in errors
    ), errors


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As nohup hands SIGHUP over."""
    process = slow_start(
        tmp_path, "in Python", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process, timeout=10)[0] == 75


LONG = dict(
    training__total_steps=100_000, training__checkpoint_steps=50_000, training__log_steps=20
)


@pytest.fixture
def training(tmp_path):
    """(process, work directory) of a long training in its loop; and the same again."""
    config = write_config(tmp_path / "config.py", small_latent_config(**LONG))

    def begin():
        flags, seen = ("--config", config, "--workdir", "run"), []
        process = start("train", tmp_path, *flags, python=warm.python())
        for line in process.stderr:
            seen.append(line)
            if line.startswith("train "):
                return process
        raise AssertionError("".join(seen))

    return begin, tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_other_signals_save_like_sigterm(training, number):
    begin, workdir = training
    process = begin()
    process.send_signal(number)
    status, errors = end(process)
    (saved,) = checkpoints_of(workdir)
    assert status == 75 and f"checkpoint {saved} of 100000 steps is saved" in errors, errors


def test_ctrl_c_saves_first_and_twice_ends_at_once(training):
    """The first run keeps every step and says so; the second, which goes on from there, ends within
    a second and keeps what was there."""
    begin, workdir = training
    process = begin()
    process.send_signal(signal.SIGINT)
    status, errors = end(process)
    (saved,) = checkpoints_of(workdir)
    assert (
        status == 130
        and f"interrupted: checkpoint {saved} of 100000 steps is saved in {workdir}/checkpoints; "
        "run"
        in errors
    ), errors
    assert saved >= 20
    process = begin()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    status, errors = end(process, timeout=10)
    assert (
        status == 130
        and "Traceback" not in errors
        and errors.splitlines()[-1].startswith("interrupted: ")
    ), errors
    assert saved in checkpoints_of(workdir)


def test_ctrl_c_while_sampling_says_what_is_kept(latent_run, tmp_path):
    flags = (
        "--workdir",
        latent_run[0],
        "--seeds",
        "0-399",
        "--batch_per_device",
        "1",
        "--sampler.num_steps",
        "20",
        "--output",
        "s.npz",
    )
    process = start("sample", tmp_path, *flags, python=warm.python())
    parts = tmp_path / "s.npz.parts"
    wait_for(process, (parts / "00000006-00000008.npy").exists)
    process.send_signal(signal.SIGINT)
    status, errors = end(process)
    drawn = len(list(parts.glob("*.npy")))
    assert (
        status == 130
        and f"interrupted: {2 * drawn} of 400 samples are saved beside {tmp_path}/s.npz; run"
        in errors
    ), errors


def test_a_notebook_can_go_on_after_an_interrupt(tmp_path, monkeypatch):
    """Without the commands' listener: Ctrl-C in the loop saves, and raises what a notebook shows;
    signals are as they were before."""
    from diffit_jax.runtime import interruption
    from diffit_jax.training import train as loop

    config = small_latent_config(training__checkpoint_steps=100)
    monkeypatch.setattr(
        loop.Watch,
        "report",
        lambda *_: signal.raise_signal(signal.SIGINT) or {"steps_per_s": 0.0} | REPORT,
    )
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(interruption.Interrupted, match="checkpoint 2 of 6 steps is saved"):
        loop.train(config, workdir=tmp_path / "run")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    monkeypatch.undo()
    assert int(loop.train(config, workdir=tmp_path / "run").step) == 6


REPORT = {"images_per_s": 0.0, "data_wait_share": 0.0, "beside_share": 0.0}


def test_a_run_preempted_at_a_snapshot_and_a_grid_leaves_them_behind_later(tmp_path, monkeypatch):
    """[2, 4, 6], not [2, 6]; the grid of the step too; and nothing that is there is drawn again."""
    from diffit_jax.runtime import distributed, interruption
    from diffit_jax.runtime.checkpoint import Checkpoints
    from diffit_jax.training import train as loop

    ema = {"halflife_images": 64, "power_lengths": (0.05, 0.10), "snapshot_steps": 2}
    config = small_latent_config(ema=ema, training__checkpoint_steps=100, training__grid_steps=4)
    monkeypatch.setattr(distributed.PreemptionNotice, "reached", at_question(4))
    with pytest.raises(interruption.Preempted, match="checkpoint 4 of 6 steps"):
        loop.train(config, workdir=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "grids" / "00000004.png").exists()
    loop.train(config, workdir=tmp_path)
    assert Checkpoints(tmp_path / "ema_snapshots").steps() == [2, 4, 6]
    grids = sorted((tmp_path / "grids").iterdir())
    assert [path.name for path in grids] == ["00000004.png", "00000006.png"]
    # Finished, but killed before its last grid and snapshot were there.
    times = [path.stat().st_mtime_ns for path in grids]
    whole = grids[1].read_bytes()
    grids[1].unlink()
    loop.train(config, workdir=tmp_path)
    assert grids[1].read_bytes() == whole and grids[0].stat().st_mtime_ns == times[0]


def test_a_profile_is_written_however_the_run_ends(tmp_path, monkeypatch, caplog):
    from diffit_jax.runtime import distributed, interruption
    from diffit_jax.training import train as loop

    monkeypatch.setattr(distributed.PreemptionNotice, "reached", at_question(3))
    with caplog.at_level("INFO", logger="diffit_jax"), pytest.raises(interruption.Preempted):
        loop.train(small_latent_config(), workdir=tmp_path / "run", profile_steps=(2, 100))
    assert "wrote a trace of steps 2-3" in caplog.text and list(
        (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    )
    monkeypatch.undo()
    with caplog.at_level("INFO", logger="diffit_jax"):
        loop.train(small_latent_config(), workdir=tmp_path / "run", profile_steps=(50, 60))
    assert "no trace was written: steps 50-60 were not among those of this run" in caplog.text


def test_random_moments(tmp_path, latent_run):
    """SIGTERM at moments from the imports to the last line: status 75, or 0 where all was written
    already."""
    rng, statuses = np.random.default_rng(0), []
    for moment in (0.6, *rng.uniform(0.6, 6, 3)):  # a loaded machine needs a while to start Python
        (tmp_path / "s.npz").unlink(missing_ok=True)
        process = start(
            "sample", tmp_path, "--workdir", latent_run[0], "--seeds", "0-3", "--output", "s.npz"
        )
        time.sleep(moment)
        process.send_signal(signal.SIGTERM)
        status, errors = end(process)
        assert status == (0 if (tmp_path / "s.npz").exists() else 75), errors
        statuses.append(status)
    assert 75 in statuses


IN_C = """
import numpy, threading, time, os, signal
from diffit_jax.runtime import interruption
interruption.listen()

def press():
    for _ in range({count}):
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)

array = numpy.random.rand({size}, {size})
threading.Thread(target=press, daemon=True).start()
with interruption.{block}:
    numpy.linalg.svd(array)  # without the interpreter's lock, as a step of XLA is computed
    print("back", interruption.pressed(), interruption.noticed())
"""


@pytest.mark.parametrize(
    ("count", "block", "status", "lines"),
    [
        (1, "held(ctrl_c=True)", 0, ["interrupted: saving before the end"]),
        (2, "held(ctrl_c=True)", 130, ["interrupted: saving", "interrupted: run the same"]),
        (5, "held(ctrl_c=True)", 130, ["interrupted: saving", "interrupted: run the same"]),
        (1, "expendable()", 130, ["interrupted: run the same"]),
    ],
)
def test_ctrl_c_is_counted_where_it_arrives(count, block, status, lines):
    """While the main thread is in C, where Python's handlers are not called: the answer comes at
    once, and the second one ends the process."""
    began = time.monotonic()
    code = IN_C.format(count=count, block=block, size=5000 if status else 900)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))
    if status == 0:
        assert done.stdout == "back 1 True\n"
    else:
        assert time.monotonic() - began < 10 and not done.stdout
