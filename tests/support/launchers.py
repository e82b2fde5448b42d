"""Launchers beside stand-ins of the programs that they call."""

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(script, *arguments, root=ROOT, path=None, check=True, **more):
    """(output lines, errors) of a launcher."""
    env = {
        "PATH": os.pathsep.join(filter(None, [path, "/usr/bin:/bin"])),
        "HOME": os.environ.get("HOME", "/"),
        **more,
    }
    result = subprocess.run(
        ["bash", f"launch/{script}.sh", *arguments],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not check or result.returncode == 0, result.stderr
    return (
        (result.stdout.splitlines(), result.stderr) if check else (result.returncode, result.stderr)
    )


def program(folder, name, text):
    """A stand-in for a program, which notes down how it was called in `calls`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(
        f'#!/usr/bin/env bash\necho "{name} $*" >>"{folder}/calls"\n{text}\n'
    )
    (folder / name).chmod(0o755 | stat.S_IXUSR)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    """A copy of the launchers whose environment and `python` are stand-ins."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "setup_env.sh").write_text("exit 0\n")
    return tmp_path
