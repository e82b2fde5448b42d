"""Running the commands of `launch/`, as people do."""

import os
import subprocess

from support import warm
from support.processes import ROOT, write_config


def launch(name, *arguments, config=None, tmp_path=None, **more):
    """The finished `launch/NAME.py`; `more` goes into its environment."""
    if config is not None:
        path = write_config(tmp_path / "config.py", config)
        arguments = ("--config", str(path), *arguments)
    command = [warm.python(), str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    env = os.environ | more
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env
    )


def assert_one_line_error(result, message):
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and message in lines[0], lines[0]
