"""Running the commands of `launch/`, as people do."""

import subprocess
import sys

from support.processes import ROOT, write_config


def launch(name, *arguments, config=None, tmp_path=None):
    if config is not None:
        path = write_config(tmp_path / "config.py", config)
        arguments = ("--config", str(path), *arguments)
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)


def assert_one_line_error(result, message):
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and message in lines[0], lines[0]
