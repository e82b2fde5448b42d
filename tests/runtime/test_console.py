"""Progress as lines of a log: what is left, without what is beside the work."""

import time

import pytest

from diffit_jax.runtime import console
from diffit_jax.runtime.console import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    return Clock


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_first_unit_with_its_compiling_does_not_count(clock, capsys):
    with Progress("encode", 11, unit="image") as progress:
        progress.say("begun")
        assert last_line(capsys) == "encode 0/11 images | begun"  # nobody knows how long
        clock.now += 300  # compiling
        progress.advance()
        clock.now += 4
        progress.advance(2)
        progress.say("")
        assert last_line(capsys) == "encode 3/11 images | 0:16 left"  # two seconds each


def test_what_is_beside_the_work_does_not_count(clock, capsys):
    with Progress("train", 100, done=40) as progress:
        progress.advance()
        clock.now += 1
        progress.advance()
        with progress.beside():
            clock.now += 1000  # drawing a grid
        progress.say("loss 1")
        assert last_line(capsys) == "train 42/100 steps | loss 1 | 0:58 left"


def test_a_silence_before_the_first_unit_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE_S", 0.02)
    with Progress("sample", 16, unit="sample") as progress:
        time.sleep(0.3)
        assert "sample 0/16 samples | the first is under way" in capsys.readouterr().err
        progress.advance()
        time.sleep(0.1)
        capsys.readouterr()
        time.sleep(0.1)
        assert not capsys.readouterr().err
    with Progress("sample", 16, shown=False):
        time.sleep(0.1)
    assert not capsys.readouterr().err


def test_times_are_written_as_people_do():
    times = (0, 42.9, 185, 3600, 11_100, 175_000, 3e6)
    written = ["0:00", "0:42", "3:05", "1:00:00", "3:05:00", "2 days 0 h", "34 days 17 h"]
    assert [duration(seconds) for seconds in times] == written
