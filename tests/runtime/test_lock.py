"""One owner at a time: a living one is named, a dead one never stands in the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.configs import small_latent_config
from support.processes import command, environment, write_config

from diffit_jax.errors import UserError
from diffit_jax.run.workdir import claimed
from diffit_jax.runtime import files

OWNER = """
import sys, time
from diffit_jax.runtime import files
from diffit_jax.runtime import files
if sys.argv[2] == "heartbeat":
    files.is_local = lambda _: False
    files.BEAT_S, files.PATIENCE_S, files.SETTLE_S = 0.1, 1.0, 0.1
if len(sys.argv) > 3:
    import socket
    socket.gethostname = lambda: sys.argv[3]
with files.owned(sys.argv[1], "workdir"):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "heartbeat"])
def kind(request, monkeypatch):
    """Both ways to own: that of disks, and that of `gs://`, quicker than there."""
    if request.param == "heartbeat":
        monkeypatch.setattr(files, "is_local", lambda _: False)
        for name, seconds in (
            ("BEAT_S", 0.1),
            ("PATIENCE_S", 1.0),
            ("SETTLE_S", 0.1),
            ("POLL_S", 0.05),
        ):
            monkeypatch.setattr(files, name, seconds)
    return request.param


@pytest.fixture
def owner(kind, tmp_path):
    """Starts a process that owns the folder."""
    started = []

    def start(*host):
        command = [sys.executable, "-c", OWNER, str(tmp_path), kind, *host]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout.readline() == "owned\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_living_owner_is_named(owner, tmp_path):
    process = owner("host-a")
    with pytest.raises(
        UserError,
        match=rf"workdir {tmp_path} is in use by process {process.pid} on host-a .since 20.*: wait",
    ) as error:
        files.owned(tmp_path, "workdir").__enter__()
    assert "\n" not in str(error.value)


def test_a_dead_owner_is_followed_at_once_under_any_host_name(owner, tmp_path):
    """SIGKILL, and again under another name of the same machine, as a container is started anew."""
    for host in ("host-a", "host-b"):
        process = owner(host)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / files.NAME).exists()
    started = time.monotonic()
    with files.owned(tmp_path, "workdir"):
        assert time.monotonic() - started < 0.9
        assert json.loads((tmp_path / files.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / files.NAME).exists()


@pytest.mark.parametrize("kind", ["heartbeat"], indirect=True)
def test_an_owner_elsewhere_that_does_not_beat_is_dead(kind, tmp_path, caplog):
    other = {
        "host": "far-away",
        "pid": os.getpid(),
        "machine": "another",
        "started": "1",
        "since": "then",
        "token": "x",
        "beat": 7,
    }
    (tmp_path / files.NAME).write_text(json.dumps(other))
    started = time.monotonic()
    with caplog.at_level("INFO", logger="diffit_jax"), files.owned(tmp_path, "workdir"):
        assert 0.9 < time.monotonic() - started < 3
    assert "no sign of life of process" in caplog.text and "on far-away (since then)" in caplog.text


@pytest.mark.parametrize("kind", ["heartbeat"], indirect=True)
def test_a_number_of_a_process_that_came_again_is_no_owner(kind, tmp_path):
    """This process's own number, but of one that was started at another time."""
    (tmp_path / files.NAME).write_text(json.dumps(files._me() | {"started": "1", "token": "x"}))
    started = time.monotonic()
    with files.owned(tmp_path, "workdir"):
        assert time.monotonic() - started < 0.9


def test_whoever_waits_follows(kind, tmp_path):
    """As two preparations of a data set do."""
    order, inside = [], threading.Event()

    def first():
        with files.owned(tmp_path, "data"):
            inside.set()
            time.sleep(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with files.owned(tmp_path, "data", wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_the_owner_is_gone_after_an_error(kind, tmp_path):
    with pytest.raises(ZeroDivisionError), files.owned(tmp_path, "workdir"):
        1 / 0  # noqa: B018
    with files.owned(tmp_path, "workdir"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_training_is_refused_and_harms_nothing(latent_run, tmp_path):
    """The first one's directory stays as it is, and the message names it."""

    def refused(result, message):
        status, errors = result
        last = errors.splitlines()[-1]
        assert (
            status == 1
            and last.startswith("error: ")
            and message in last
            and "Traceback" not in errors
        ), errors

    config = small_latent_config()
    with claimed(tmp_path / "run", config):
        before = sorted(
            (path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()
        )
        result = command(
            "train",
            "--config",
            write_config(tmp_path / "c.py", config),
            "--workdir",
            "run",
            cwd=tmp_path,
        )
        refused(result, f"workdir {tmp_path}/run is in use by process {os.getpid()} on ")
        assert before == sorted(
            (path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()
        )
    (tmp_path / "s.npz.parts").mkdir()
    with files.owned(tmp_path / "s.npz.parts", "the sampling request in"):
        result = command(
            "sample", "--workdir", latent_run[0], "--seeds", "0", "--output", "s.npz", cwd=tmp_path
        )
        refused(result, "the sampling request in")
